"""The detection dataset: what an item holds, what is refused when it is built, and the index behind it."""

import copy
import json
import random
import re
import unicodedata

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Subset

import datasets.transforms as T
from datasets import build_dataset, get_coco_api_from_dataset
from datasets.coco import (
    CocoDetection,
    ConvertCocoPolysToMask,
    build,
    convert_coco_poly_to_mask,
    make_coco_transforms,
)
from datasets.coco_index import read_coco_index
from datasets.loaders import SeededDataset
from tests.helpers import parse, write_coco
from util.nested_tensor import collate_fn


def plain(root, **options):
    """The training part, without transforms unless given: items are PIL images."""
    return CocoDetection(root / "train2017", root / "annotations/instances_train2017.json", **options)


def change(root, edit):
    """Apply `edit` to the training annotations on disk."""
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_item_without_transforms_is_a_pil_image_and_its_objects(coco_root):
    dataset = plain(coco_root)
    assert dataset.ids == [11, 12, 13, 14] and dataset.num_classes == 4 and dataset.class_names == {1: "cat", 3: "dog"}
    image, target = dataset[0]
    assert isinstance(image, Image.Image) and image.size == (64, 48)
    assert target["boxes"].tolist() == [[4, 4, 24, 34], [30, 10, 55, 35]]
    assert target["labels"].tolist() == [1, 3] and target["area"].tolist() == [600, 625]
    assert target["image_id"].tolist() == [11] and target["iscrowd"].tolist() == [0, 0]
    assert target["orig_size"].tolist() == target["size"].tolist() == [48, 64]


def test_item_as_tensor_holds_the_pixels_of_the_pil_image(coco_root):
    image, target = plain(coco_root, as_tensor=True)[0]
    assert image.dtype == torch.uint8 and target["orig_size"].tolist() == [48, 64]
    assert np.array_equal(image.permute(1, 2, 0), np.asarray(plain(coco_root)[0][0]))


def test_dataset_is_torchvisions_and_builds_its_index_late(coco_root):
    dataset = plain(coco_root, return_masks=False)
    assert isinstance(dataset, torchvision.datasets.CocoDetection) and dataset.root == coco_root / "train2017"
    assert "coco" not in vars(dataset) and dataset._transforms is None
    assert [a["id"] for a in dataset._load_target(11)] == [1, 2] and "coco" in vars(dataset)
    assert dataset._load_image(12).size == (64, 48) and "datapoints: 4" in repr(dataset)


def test_subclass_of_the_dataset_gets_pil_images_and_targets(coco_root):
    class Fork(CocoDetection):
        def __getitem__(self, idx):
            image, target = super().__getitem__(idx)
            return image.rotate(90), target | {"names": [a["category_id"] for a in self._load_target(self.ids[idx])]}

    fork = Fork(coco_root / "train2017", coco_root / "annotations/instances_train2017.json", None, False)
    fork.ids = fork.ids[1:]
    image, target = fork[0]
    assert len(fork) == 3 and target["names"] == [1, 1] and target["labels"].tolist() == [1] and image.size == (64, 48)


def test_prepare_converts_pycocotools_records(coco_root):
    dataset = plain(coco_root)
    for idx, image_id in enumerate(dataset.ids):
        image, target = dataset.prepare(
            dataset._load_image(image_id), {"image_id": image_id, "annotations": dataset._load_target(image_id)}
        )
        assert all(torch.equal(target[name], value) for name, value in dataset[idx][1].items())
    triangle = {"category_id": 1, "bbox": [0, 0, 8, 8], "segmentation": [[0, 0, 8, 0, 8, 8]]}
    people = {"image_id": 5, "annotations": [triangle | {"iscrowd": 0, "keypoints": [1, 2, 2, 3, 4, 1]}]}
    target = ConvertCocoPolysToMask(True)(image, people)[1]
    assert target["masks"].shape == (1, 48, 64) and target["keypoints"].tolist() == [[[1, 2, 2], [3, 4, 1]]]
    assert target["area"].tolist() == [64] and target["image_id"].tolist() == [5]
    assert torch.equal(convert_coco_poly_to_mask([triangle["segmentation"]], 48, 64), target["masks"])


def test_crowds_are_left_out_and_an_image_may_be_empty(coco_root):
    dataset = plain(coco_root)
    assert dataset[1][1]["labels"].tolist() == [1]
    empty = dataset[2][1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,) and empty["labels"].dtype == torch.int64


def test_crowds_only(coco_root):
    change(coco_root, lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    assert all(len(plain(coco_root)[i][1]["labels"]) == 0 for i in range(4))


def test_boxes_are_clamped_and_those_without_area_dropped(coco_root):
    def edit(content):
        boxes = [[-10, -5, 30, 20], [60, 40, 100, 100], [10, 10, 0, 5], [70, 10, 5, 5], [5, 5, -3, 9]]
        first = content["annotations"][0]
        content["annotations"] = [{**first, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)]

    change(coco_root, edit)
    assert plain(coco_root)[0][1]["boxes"].tolist() == [[0, 0, 20, 15], [60, 40, 64, 48]]


def test_missing_area_and_iscrowd_are_filled_in(coco_root):
    change(coco_root, lambda c: [(a.pop("area"), a.pop("iscrowd")) for a in c["annotations"]])
    dataset = plain(coco_root)
    assert dataset[0][1]["area"].tolist() == [600, 625]
    annotation = dataset.coco.loadAnns([1])[0]
    assert annotation["area"] == 600 and annotation["iscrowd"] == 0


def test_annotation_ids_from_zero_are_renumbered_for_the_evaluation(coco_root):
    change(coco_root, lambda c: [a.update(id=i) for i, a in enumerate(c["annotations"])])
    assert sorted(get_coco_api_from_dataset(Subset(plain(coco_root), [0])).anns) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("ids", [[1, 2, 3, 1, 2], [-1, -2, -3, -4, -5], [None] * 5, list("abcde"), [1, 2, 3, 4, 2**70]])
def test_annotation_ids_that_do_not_tell_objects_apart_are_renumbered_too(coco_root, ids):
    change(coco_root, lambda c: [a.update(id=i) for a, i in zip(c["annotations"], ids, strict=True)])
    assert sorted(plain(coco_root).coco.anns) == [1, 2, 3, 4, 5]


def test_whole_numbers_may_be_written_as_fractions(coco_root):
    change(coco_root, lambda c: [a.update(image_id=float(a["image_id"]), category_id=3.0) for a in c["annotations"]])
    dataset = plain(coco_root)
    assert dataset[0][1]["labels"].tolist() == [3, 3]
    assert all(type(a["category_id"]) is type(a["image_id"]) is int for a in dataset.coco.anns.values())


@pytest.mark.parametrize("edit, words", [
    (lambda c: c["annotations"][0].update(category_id=9), "1 annotations of a category that is not listed: image 11"),
    (lambda c: c["annotations"][0].update(image_id=99), "1 annotations of images that are not listed: image 99"),
    (lambda c: c["annotations"][0].update(bbox=[0, float("nan"), 1, 1]), "1 boxes that are not finite: image 11"),
    (lambda c: c["annotations"][0].update(bbox=[0, 1]), "1 records that cannot be read"),
    (lambda c: c["annotations"][0].pop("bbox"), "1 records that cannot be read"),
    (lambda c: c["annotations"][0].update(category_id="1"), "1 records that cannot be read.*'1' is not a whole number"),
    (lambda c: c["annotations"][0].update(category_id=1.5), "1 records that cannot be read.*1.5 is not a whole"),
    (lambda c: c["annotations"][0].update(iscrowd=300), "1 records that cannot be read.*300"),
    (lambda c: c["annotations"][0].update(bbox=list("1234")), "1 records that cannot be read"),
    (lambda c: c["annotations"][0].pop("image_id"), "1 records that cannot be read: .*bbox.*'image_id'"),
    (lambda c: c["images"][0].pop("file_name"), "1 records that cannot be read.*'file_name'"),
    (lambda c: c["annotations"].append("text"), "1 records that cannot be read: 'text'"),
    (lambda c: c["categories"][0].update(id="1"), "1 categories without a whole number as id: .*cat"),
    (lambda c: c["images"][0].update(file_name="gone.jpg"), "1 images that are not in .*gone.jpg"),
    (lambda c: c["images"].append(c["images"][0]), "1 images with an id used before: 11"),
    (lambda c: c.update(images=[], annotations=[]), "no images at all"),
    (lambda c: c.pop("categories"), "not a COCO instances file: no list named 'categories'"),
])  # fmt: skip
def test_unusable_annotations_are_refused_with_counts_and_examples(coco_root, edit, words):
    change(coco_root, edit)
    with pytest.raises(ValueError, match=f"(?s)instances_train2017.json.*{words}"):
        plain(coco_root)


def test_all_problems_are_reported_together(coco_root):
    def edit(content):
        content["annotations"][0].update(category_id=9)
        content["annotations"][1].update(image_id=77)

    change(coco_root, edit)
    with pytest.raises(ValueError, match="(?s)image 77.*category 9"):
        plain(coco_root)


def test_a_class_id_equal_to_k_is_refused_and_holes_are_not(coco_root):
    assert plain(coco_root, num_classes=4).num_classes == 4
    with pytest.raises(
        ValueError, match=r"2 annotations of classes outside 0..2 .*at least 4.*image 11 \(category 3\)"
    ):
        plain(coco_root, num_classes=3)


@pytest.mark.parametrize("text, words", [("[1, 2]", "not a COCO"), ("{broken", "not a JSON"), ('{"a": 1}', "'images'")])
def test_json_of_another_kind_is_refused(coco_root, text, words):
    (coco_root / "annotations/instances_train2017.json").write_text(text)
    with pytest.raises(ValueError, match=f"instances_train2017.json.*{words}"):
        plain(coco_root)


def test_missing_paths_are_named(coco_root, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_dataset("train", parse(f"--coco_path {tmp_path}/nowhere"))
    with pytest.raises(ValueError, match="--coco_path"):
        build_dataset("train", parse())
    with pytest.raises(ValueError, match="one of coco, coco_panoptic, shapes"):
        build_dataset("train", parse("--dataset_file voc"))
    (coco_root / "train2017").rename(coco_root / "elsewhere")
    with pytest.raises(FileNotFoundError, match="train2017"):
        build_dataset("train", parse(f"--coco_path {coco_root}"))
    flags = f"--train_images {coco_root}/elsewhere --train_annotations {coco_root}/annotations/instances_train2017.json"
    assert len(build_dataset("train", parse(flags))) == 4


def test_augmentation_is_a_function_of_seed_epoch_and_image(coco_root):
    def draw(epoch, seed=0, workers=0):
        dataset = SeededDataset(build_dataset("train", parse(f"--coco_path {coco_root}")), seed)
        dataset.set_epoch(epoch)
        batches = DataLoader(dataset, collate_fn=collate_fn, num_workers=workers)
        return [(samples.tensors, targets[0]["boxes"]) for samples, targets in batches]

    def same(a, b):
        return all(
            x.shape == y.shape and torch.equal(x, y)
            for p, q in zip(a, b, strict=True)
            for x, y in zip(p, q, strict=True)
        )

    first = draw(1)
    random.random()
    assert same(first, draw(1)) and same(first, draw(1, workers=2))
    assert not same(first, draw(2)) and not same(first, draw(1, seed=1))


def test_the_epoch_reaches_workers_that_are_running(coco_root):
    dataset = SeededDataset(build_dataset("train", parse(f"--coco_path {coco_root}")), 0)
    loader = DataLoader(dataset, collate_fn=collate_fn, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append([samples.tensors for samples, _ in loader])
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[2], strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))


def test_training_sizes_scale_with_min_size():
    select = make_coco_transforms("train", 400, 666).transforms[2]
    assert select.transforms1.sizes[0] == 240 and select.transforms1.sizes[-1] == 400
    crop = select.transforms2.transforms
    assert crop[0].sizes == [200, 250, 300] and (crop[1].min_size, crop[1].max_size) == (192, 300)
    published = make_coco_transforms("train").transforms[2].transforms1
    assert published.sizes == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800] and published.max_size == 1333
    with pytest.raises(ValueError, match="test"):
        make_coco_transforms("test")


def test_lighter_augmentation_keeps_the_size_of_the_evaluation():
    image, target = Image.new("RGB", (60, 40)), {"boxes": torch.tensor([[0.0, 0, 30, 20]])}
    centres = {}
    for augment in ("crop", "flip", "none"):
        drawn = [make_coco_transforms("train", 80, 200, augment)(image, target) for _ in range(20)]
        assert {tuple(pixels.shape) for pixels, _ in drawn} == {(3, 80, 120)}
        centres[augment] = {made["boxes"][0, 0].item() for _, made in drawn}
    assert len(centres.pop("crop")) > 5 and centres == {"flip": {0.25, 0.75}, "none": {0.25}}
    with pytest.raises(ValueError, match="crops"):
        make_coco_transforms("train", augment="crops")


def test_images_are_normalised_floats_unless_image_dtype_is_uint8(coco_root):
    args = parse(f"--coco_path {coco_root}")
    items = {}
    for dtype in ("float32", "uint8"):
        args.image_dtype = dtype
        items[dtype] = build_dataset("val", args)[0][0]
    del args.image_dtype
    assert items["uint8"].dtype == torch.uint8 and items["uint8"].shape == (3, 64, 85)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (items["uint8"] / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(items["float32"], expected)
    for image in (build_dataset("val", args)[0][0], build("val", args)[0][0], make_coco_transforms("val")):
        made = image(Image.new("RGB", (60, 40)), None)[0] if callable(image) else image
        assert made.dtype == torch.float32


def test_targets_of_the_pipeline_are_relative_and_inside(coco_root):
    dataset = build_dataset("train", parse(f"--coco_path {coco_root}"))
    for _ in range(10):
        for image, target in (dataset[i] for i in range(4)):
            assert image.shape[1:] == tuple(target["size"].tolist())
            half = target["boxes"][:, 2:] / 2
            assert (target["boxes"][:, :2] - half >= -1e-6).all() and (target["boxes"][:, :2] + half <= 1 + 1e-6).all()


def test_the_index_agrees_with_pycocotools(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.permutation(50)[:20].tolist()
    objects = [(int(rng.choice(ids)), int(rng.choice([1, 3])), rng.uniform(0, 30, 4).tolist(), {}) for _ in range(100)]
    write_coco(tmp_path / "c", "train", ids, objects)
    dataset = plain(tmp_path / "c")
    coco = dataset.coco
    assert dataset.ids == sorted(ids) == sorted(coco.imgs)
    for i, image_id in enumerate(dataset.ids):
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        where = dataset.index.annotations_of(i)
        np.testing.assert_allclose(dataset.index.boxes[where], np.reshape([a["bbox"] for a in annotations], (-1, 4)))
        assert dataset.index.labels[where].tolist() == [a["category_id"] for a in annotations]
        assert str(dataset.index.file_names[i]) == coco.imgs[image_id]["file_name"]


def test_segmentations_are_kept_only_when_asked(coco_root):
    shapes = [[[1, 2, 3, 4, 5, 6]], {"size": [48, 64], "counts": "abc"}, {"size": [2, 2], "counts": [1, 3]}, None, []]
    change(coco_root, lambda c: [a.update(segmentation=s) for a, s in zip(c["annotations"], shapes, strict=True)])
    path = coco_root / "annotations/instances_train2017.json"
    assert read_coco_index(path).segmentations is None
    kept = read_coco_index(path, with_segmentations=True)
    assert [kept.segmentations[k] for k in range(5)] == copy.deepcopy(shapes)


def test_item_of_another_size_than_listed_raises(coco_root):
    triangle = [[0, 0, 9, 0, 9, 9]]
    change(coco_root, lambda c: [a.update(segmentation=triangle) for a in c["annotations"]])
    assert plain(coco_root, return_masks=True)[0][1]["masks"].shape == (2, 48, 64)
    change(coco_root, lambda c: c["images"][0].update(height=64, width=48))
    for masks in (True, False):
        with pytest.raises(ValueError, match=r"000011.jpg is \[48, 64\].*lists image 11 as \[64, 48\]"):
            plain(coco_root, return_masks=masks)[0]
    change(coco_root, lambda c: c["images"][0].pop("height"))
    assert len(plain(coco_root)[0][1]["labels"]) == 2
    with pytest.raises(ValueError, match="1 images without height and width: 11"):
        plain(coco_root, return_masks=True)
    with pytest.raises(ValueError, match="1 images without height and width: 11"):
        plain(coco_root).sizes  # noqa: B018


def test_augmentation_varies_between_calls_unless_it_is_seeded(coco_root):
    dataset = plain(coco_root, transforms=make_coco_transforms("train", 64, 96))
    assert len({dataset[0][0].shape for _ in range(20)}) > 3
    seeded = SeededDataset(dataset, 0)
    assert len({seeded[0][0].shape for _ in range(20)}) == 1


def test_transforms_written_for_pil_images_take_its_items(coco_root):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    steps = [T.RandomHorizontalFlip(), T.RandomResize([64], 96), T.ToTensor(), T.Normalize(mean, std)]
    image, target = plain(coco_root, transforms=T.Compose(steps))[0]
    assert image.shape == (3, 64, 85) and -2.2 < image.min() < image.max() < 2.7
    assert 0 < target["boxes"].min() and target["boxes"].max() < 1


def test_args_may_be_a_dict_without_the_new_flags(coco_root):
    assert len(build_dataset("val", {"dataset_file": "coco", "coco_path": str(coco_root), "masks": False})) == 3


def test_the_longest_side_is_limited_everywhere():
    (_, _, select, *_), (_, resize, *_) = (make_coco_transforms(part).transforms for part in ("train", "val"))
    whole, cropped = select.transforms1, select.transforms2.transforms[2]
    assert whole.max_size == cropped.max_size == resize.max_size == 1333
    assert select.p == 0.5 and whole.sizes == cropped.sizes == list(range(480, 801, 32)) and resize.sizes == [800]


@pytest.mark.parametrize("edit, words", [
    (lambda c: c["annotations"][0].update(area=-600), r"1 areas that are negative or not finite.*image 11 \(area -600"),
    (lambda c: c["annotations"][0].update(area=float("nan")), r"1 areas that are .*area nan"),
    (lambda c: c["annotations"][0].update(area=float("inf")), r"1 areas that are .*area inf"),
    (lambda c: c["annotations"][0].update(iscrowd=2), "1 values of iscrowd other than 0 and 1: image 11"),
    (lambda c: c["categories"].append({"id": 3, "name": "cow"}), "1 category ids listed more than once: 3"),
    (lambda c: c["categories"].append({"id": 74_673_216}), "1 category ids above 99999 .renumber.*: 74673216"),
    (lambda c: c["images"][0].update(height=2**40), "1 records that cannot be read"),
])  # fmt: skip
def test_numbers_that_would_give_wrong_results_are_refused(coco_root, edit, words):
    change(coco_root, edit)
    with pytest.raises(ValueError, match=f"(?s)instances_train2017.json.*{words}"):
        plain(coco_root)


def test_index_reads_only_the_top_level_lists(coco_root):
    record = {"id": 99, "image_id": 11, "category_id": 1, "bbox": [0, 0, 9, 9]}
    nested = {"image": {"id": 1, "file_name": "a.jpg"}, "attributes": {"image_id": "x"}, "history": [record]}

    def edit(content):
        content["annotations"][0].update(nested)
        content["images"][0]["image_id"] = 11
        content["rejected_annotations"], content["videos"] = [record], [{"id": 7, "file_name": "b.jpg"}]
        content["scene_annotations"] = [{"image_id": 11, "background_ids": [2]}]

    change(coco_root, edit)
    index = read_coco_index(coco_root / "annotations/instances_train2017.json")
    assert len(index.image_ids) == 4 and len(index.labels) == 5


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_index_in_other_encodings_is_read(coco_root, encoding):
    path = coco_root / "annotations/instances_train2017.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"author": "Łukasz"}, ensure_ascii=False, indent=1), encoding
    )
    assert len(read_coco_index(path).image_ids) == 4


@pytest.mark.parametrize(
    "text", ['{"images": [{"id": 1} {"id": 2}]}', '{"images": [', '{"images" []}', '{"a": 1', "{1: 2}", ""]
)
def test_index_of_broken_json_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json: not a "):
        read_coco_index(tmp_path / "a.json")


def test_dataset_without_annotations_can_be_read_with_a_warning(coco_root, caplog):
    change(coco_root, lambda c: c.pop("annotations"))
    assert all(len(plain(coco_root)[i][1]["labels"]) == 0 for i in range(4))
    assert "there is nothing to train on" in caplog.text
    assert plain(coco_root).coco.getAnnIds() == []


TRIANGLE = [[0, 0, 9, 0, 9, 9]]


@pytest.mark.parametrize("segmentation, words", [
    ([[10, 20, 50, 70]], "neither polygons of at least three points"), (TRIANGLE[0], "not a list of polygons"),
    ([[*TRIANGLE[0], 3]], "odd number"), ([[0, None, 9, 0, 9, 9]], "not a number"),
    ([[0, float("nan"), 9, 0, 9, 9]], "not finite"), ([[0, 1e9, 9, 0, 9, 9]], "beyond 100000"),
    ([[0, 1e400, 9, 0, 9, 9]], "not finite"), ([[{"x": 1, "y": 2}] * 6], "not a number"),
    ({"size": [64, 48], "counts": [0, 3072]}, r"size \[64, 48\] for an image of \[48, 64\]"),
    ({"size": [48, 64], "counts": [0, 99]}, "99 pixels for an image of 3072"),
    ({"size": [48, 64], "counts": "abc"}, "compressed text"),
    ({"counts": [0, 3072]}, "nor a run-length code"), ("text", "nor a run-length code"),
])  # fmt: skip
def test_segmentations_that_cannot_be_drawn_are_refused_when_masks_are_used(coco_root, segmentation, words):
    change(coco_root, lambda c: [a.update(segmentation=TRIANGLE) for a in c["annotations"]])
    change(coco_root, lambda c: c["annotations"][0].update(segmentation=segmentation))
    with pytest.raises(ValueError, match=f"(?s)1 segmentations that cannot be drawn: image 11 .*{words}"):
        plain(coco_root, return_masks=True)
    assert len(plain(coco_root)) == 4


def test_slivers_beside_a_polygon_are_ignored(coco_root):
    change(coco_root, lambda c: [a.update(segmentation=[*TRIANGLE, [1, 2, 3, 4]]) for a in c["annotations"]])
    masks = plain(coco_root, return_masks=True)[0][1]["masks"]
    assert torch.equal(masks, convert_coco_poly_to_mask([TRIANGLE, TRIANGLE], 48, 64))


@pytest.mark.parametrize("on_disk, listed", [
    ("images/a.jpg", "images\\a.jpg"), ("my photo.jpg", "my%20photo.jpg"), ("b.JPG", "b.jpg"),
    (unicodedata.normalize("NFC", "Küche.jpg"), unicodedata.normalize("NFD", "Küche.jpg")),
])  # fmt: skip
def test_image_under_a_similar_name_is_suggested(coco_root, on_disk, listed):
    (coco_root / "train2017/images").mkdir()
    (coco_root / "train2017/000000000011.jpg").rename(coco_root / "train2017" / on_disk)
    change(coco_root, lambda c: c["images"][0].update(file_name=listed))
    with pytest.raises(ValueError, match=re.escape(f"{listed} (did you mean {on_disk}?)")):
        plain(coco_root)


@pytest.mark.parametrize("sizes", [(-5, 100), (0, 10), (100, 50)])
def test_transforms_with_meaningless_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="max_size not below min_size"):
        make_coco_transforms("val", *sizes)
