"""Panoptic data: what an item is, when maps are opened, and files that cannot be used."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset, get_coco_api_from_dataset
from datasets.coco import load_coco_api
from datasets.coco_backends import pick_backend
from datasets.coco_panoptic import CocoPanoptic, build
from tests.helpers import parse, write_panoptic


def scene():
    """Sky over a cat, a crowd of dogs, another dog of 257 * 1 ids, void, and a thing one pixel wide."""
    ids = np.zeros((48, 64), int)
    ids[:20] = 70000
    ids[10:30, 5:25] = 3
    ids[32:44, 30:60] = 4
    ids[22:30, 30:50] = 257
    ids[22:40, 60] = 9
    return ids, {70000: (7, 0), 3: (1, 0), 4: (2, 1), 257: (2, 0), 9: (1, 0)}


@pytest.fixture
def root(tmp_path):
    void = np.zeros((48, 64), int)
    for part in ("train", "val"):
        write_panoptic(tmp_path / "p", {20: scene(), 3: (void, {})}, part)
    return tmp_path / "p"


def raw(root, masks=True):
    return CocoPanoptic(
        root / "val2017", root / "panoptic_val2017", root / "annotations/panoptic_val2017.json", None, masks
    )


def built(part, root, flags=""):
    return build(part, parse(f"--dataset_file coco_panoptic --coco_path {root} {flags}"))


def test_an_item_holds_things_and_stuff_with_masks_and_their_boxes(root):
    data = raw(root)
    assert (
        data.ids == [3, 20] and data.sizes == [(48, 64)] * 2 and data.thing_classes == [1, 2] and data.num_classes == 8
    )
    image, target = data[1]
    ids = scene()[0]
    assert image.size == (64, 48) and target["labels"].tolist() == [7, 1, 2]  # no crowd, nothing without area
    assert target["boxes"].tolist() == [[0, 0, 63, 19], [5, 10, 24, 29], [30, 22, 49, 29]]
    for mask, segment in zip(target["masks"], (70000, 3, 257), strict=True):
        assert np.array_equal(mask, ids == segment)
    assert target["area"].tolist() == [(ids == 70000).sum(), 400, 160] and target["image_id"].tolist() == [20]
    empty = data[0][1]
    assert empty["masks"].shape == (0, 48, 64) and empty["boxes"].shape == (0, 4)


def test_the_order_of_the_file_does_not_matter(tmp_path):
    two = np.ones((12, 16), int)
    two[:6] = 5
    write_panoptic(tmp_path, {9: (two, {1: (7, 0), 5: (1, 0)}), 4: (two + 1, {6: (2, 0), 2: (7, 0)})})
    for masks in (True, False):
        targets = [raw(tmp_path, masks)[i][1] for i in (0, 1)]
        assert [t["image_id"].item() for t in targets] == [4, 9]
        assert [t["labels"].tolist() for t in targets] == [[2, 7], [7, 1]]
        assert [t["boxes"][:, 1].tolist() for t in targets] == [[0, 6], [6, 0]]


def test_without_masks_maps_are_not_read_and_boxes_are_the_same(root):
    with_masks = raw(root)[1][1]
    for path in (root / "panoptic_val2017").iterdir():
        path.write_bytes(b"")
    target = raw(root, masks=False)[1][1]
    assert "masks" not in target
    assert all(torch.equal(target[name], with_masks[name]) for name in target)


def test_build_from_flags_has_250_classes(root):
    args = parse(f"--dataset_file coco_panoptic --coco_path {root} --masks")
    args.image_dtype = "uint8"
    data = build_dataset("val", args)
    assert data.num_classes == 250 and data.return_masks
    image, target = data[1]
    assert image.dtype == torch.uint8 and target["masks"].shape[1:] == image.shape[1:] == (64, 85)
    assert (
        build_dataset("train", parse(f"--dataset_file coco_panoptic --coco_path {root} --num_classes 9")).num_classes
        == 9
    )
    assert built("val", root, f"--coco_panoptic_path {root}").thing_classes == [1, 2]
    assert data.get_height_and_width(0) == (48, 64)


def test_objects_that_all_vanish_in_the_crop_leave_an_empty_target(tmp_path):
    ids = np.zeros((60, 90), int)
    ids[0:3, 0:3] = 1
    write_panoptic(tmp_path, {1: (ids, {1: (1, 0)})}, "train")
    data = built("train", tmp_path, "--masks --min_size 64 --max_size 96")
    seen = set()
    random.seed(0)
    for _ in range(12):
        image, target = data[0]
        seen.add(len(target["labels"]))
        assert target["masks"].shape == (len(target["labels"]), *image.shape[1:]) and target["boxes"].shape[1] == 4
    assert seen == {0, 1}


def test_ap_uses_the_instances_file_or_else_the_things(root):
    coco = get_coco_api_from_dataset(built("val", root, "--masks"))
    assert sorted(coco.cats) == [1, 2] and [a["iscrowd"] for a in coco.imgToAnns[20]] == [0, 1, 0, 0]
    ids = scene()[0]
    assert np.array_equal(coco.annToMask(coco.imgToAnns[20][1]), ids == 4)
    assert coco.imgToAnns[20][0]["bbox"] == [5, 10, 20, 20]
    path = root / "annotations/instances_val2017.json"
    things = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    objects = [{"id": 5, "image_id": 20, "category_id": 2, "bbox": [1, 2, 3, 4]}]
    good = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (3, 20)],
        "annotations": objects,
        "categories": things,
    }
    path.write_text(json.dumps(good))
    assert built("val", root).coco.anns.keys() == {5}


@pytest.mark.parametrize("edit, words", [
    (lambda c: [r.update(id=r["id"] + 100) for r in c["images"]], "annotations of images that are not listed"),
    (lambda c: (c["images"].pop(0)), "1 images of .*panoptic_val2017.json, which the instances file lacks.*: 3"),
    (lambda c: c["categories"].pop(0), "1 thing categories of .*lacks.*: 1"),
    (lambda c: c["categories"][0].update(name="cow"), r"1 categories that are other things in .*1 \(cow, not cat\)"),
    (lambda c: c.pop("annotations"), "no annotations at all"),
])  # fmt: skip
def test_instances_file_of_other_images_or_categories_is_refused(root, edit, words):
    things = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    objects = [{"id": 5, "image_id": 20, "category_id": 2, "bbox": [1, 2, 3, 4]}]
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in (3, 20)], "annotations": objects}
    content["categories"] = things
    edit(content)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"(?s)instances_val2017.json.*{words}"):
        get_coco_api_from_dataset(built("val", root))


def test_a_missing_map_and_one_of_other_ids_are_named(root):
    path = root / "panoptic_val2017" / "20.png"
    ids = scene()[0]
    ids[ids == 257] = 300
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"20.png.*without a pixel: \[257\]; painted but not listed: \[300\]"):
        raw(root)[1]
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"20.png.*\(5, 6\).*\(48, 64\)"):
        raw(root)[1]
    path.unlink()
    with pytest.raises(ValueError, match="1 panoptic maps that are not in .*20.png"):
        raw(root)


@pytest.mark.parametrize("change, words", [
    (lambda d: d["annotations"].pop(), "images without a map: 3"),
    (lambda d: d["images"].pop(), "maps of images that are not listed: 3"),
    (lambda d: d["annotations"].append(d["annotations"][0]), "more than one map: 20"),
    (lambda d: d["annotations"][0]["segments_info"][1].update(id=4), r"share an id.*image 20 \(segment 4\)"),
    (lambda d: d["annotations"][0]["segments_info"][1].update(category_id=5), "image 20 .segment 3, category 5"),
    (lambda d: d["annotations"][0]["segments_info"][1].update(id=0), "below 1"),
    (lambda d: d["annotations"][0]["segments_info"][1].update(bbox=[1, 2]), "cannot be read"),
    (lambda d: d["annotations"][0]["segments_info"][1].update(id=256**3), "above 16777215 .*segment 16777216"),
    (lambda d: d["annotations"][0]["segments_info"][1].update(area=-3), r"1 areas that are negative.*image 20"),
    (lambda d: d["annotations"][0]["segments_info"][1].update(area=float("nan")), "1 areas that are negative or not"),
    (lambda d: d["annotations"][0]["segments_info"][1].update(iscrowd=2), "1 values of iscrowd other than 0 and 1"),
    (lambda d: d["annotations"][0].update(file_name=None), "1 records that cannot be read"),
    (lambda d: d["annotations"][0].update(file_name="../20.png"), "1 panoptic maps outside .*--allow outside_paths"),
    (lambda d: d["images"][0].update(file_name="/20.jpg"), "1 images outside .*--allow outside_paths"),
    (lambda d: d.pop("categories"), "no list named 'categories'"),
    (lambda d: d["categories"][0].pop("isthing"), "1 categories whose isthing is not 0 or 1: .*cat"),
    (lambda d: d["categories"][0].update(isthing="1"), "1 categories whose isthing is not 0 or 1: .*cat"),
    (lambda d: d["categories"].append(d["categories"][0]), "1 category ids listed more than once: 1"),
])  # fmt: skip
def test_annotations_that_cannot_be_used_are_named(root, change, words):
    path = root / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"(?s)panoptic_val2017.json.*{words}"):
        raw(root)


def test_maps_of_one_channel_are_refused_at_the_start(root):
    ids = np.where(scene()[0] > 255, 5, scene()[0])
    Image.fromarray(ids.astype(np.uint8)).save(root / "panoptic_val2017" / "20.png")
    with pytest.raises(ValueError, match="20.png: a panoptic map of one channel"):
        raw(root)
    assert len(raw(root, masks=False)) == 2  # maps are not read


def test_panoptic_data_with_masks_need_hotcoco(root, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="computed by the package hotcoco: pip install hotcoco"):
        raw(root)
    with pytest.raises(ValueError, match="needs the package hotcoco"):
        pick_backend("hotcoco")
    raw(root, masks=False)


def test_polygons_of_the_instances_file_are_checked_before_masks_are_evaluated(root):
    content = {"images": [{"id": i, "file_name": f"{i}.jpg", "height": 48, "width": 64} for i in (3, 20)]}
    content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    record = {"id": 5, "image_id": 20, "category_id": 2, "bbox": [1, 2, 3, 4]}
    content["annotations"] = [{**record, "segmentation": [[0, 0, 1e9, 0, 9, 9]]}]
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    assert built("val", root).coco.anns.keys() == {5}
    with pytest.raises(ValueError, match="1 segmentations that cannot be drawn: image 20"):
        built("val", root, "--masks").coco  # noqa: B018


def test_missing_paths_are_named(root, tmp_path):
    with pytest.raises(ValueError, match="--coco_path"):
        build("val", parse("--dataset_file coco_panoptic"))
    with pytest.raises(FileNotFoundError, match="--coco_panoptic_path .*nowhere"):
        built("val", root, f"--coco_panoptic_path {tmp_path}/nowhere")
    with pytest.raises(ValueError, match="--num_classes must be at least 8"):
        built("val", root, "--num_classes 5")


def test_shapes_have_stuff_and_masks(tmp_path):
    flags = f"--coco_path {tmp_path}/s --shapes_train 3 --shapes_val 2 --shapes_size 64 --shapes_classes 3 --masks"
    panoptic = build_dataset("train", parse(f"--dataset_file shapes_panoptic {flags}"))
    panoptic._transforms = None
    assert panoptic.num_classes == 6 and panoptic.thing_classes == [1, 2, 3]
    assert {4, 5} <= set(panoptic[0][1]["labels"].tolist())
    instances = build_dataset("train", parse(f"--dataset_file shapes {flags}"))
    instances._transforms = None
    for i in range(3):
        both, things = panoptic[i][1], instances[i][1]
        assert torch.equal(both["masks"][both["labels"] <= 3], things["masks"])
    assert len(load_coco_api(tmp_path / "s/annotations/instances_train2017.json").cats) == 3


@pytest.mark.skipif(
    "DETR_TEST_COCO_PANOPTIC" not in os.environ, reason="DETR_TEST_COCO_PANOPTIC names no COCO panoptic folder"
)
def test_real_maps_go_with_their_annotations():
    folder = Path(os.environ["DETR_TEST_COCO_PANOPTIC"])
    data, boxes_only = built("val", folder, "--masks"), built("val", folder)
    data._transforms = boxes_only._transforms = None
    for i in range(0, len(data), 5):
        target, same = data[i][1], boxes_only[i][1]
        assert torch.equal(target["boxes"], same["boxes"]) and target["masks"].sum(0).max() <= 1
