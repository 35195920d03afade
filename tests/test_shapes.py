import json

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset, shapes
from tests.helpers import parse


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_same_settings_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        shapes.generate(tmp_path / name, {"train": 4, "val": 2}, 64, 3, seed=5)
    shapes.generate(tmp_path / "c", {"train": 4, "val": 2}, 64, 3, seed=6)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and a != c and set(map(str, a)) >= {"annotations/panoptic_val2017.json", "train2017/000000000004.jpg"}
    assert (
        a[next(p for p in a if "train2017/000000000001.jpg" in str(p))]
        != a[next(p for p in a if "val2017/000000000001.jpg" in str(p) and "panoptic" not in str(p))]
    )


def test_scenes_have_crowds_overlaps_and_all_sizes():
    scenes = [shapes.draw_scene(np.random.default_rng(i), 192, 4) for i in range(200)]
    records = [[r for r in found if r["category_id"] <= 4] for _, _, found in scenes]
    areas = [r["area"] for found in records for r in found]
    assert min(map(len, records)) == 0 and max(map(len, records)) == len(shapes.COUNTS)
    assert min(areas) < 32**2 and max(areas) > 96**2  # small and large, as COCO calls it
    assert {r["category_id"] for found in records for r in found} == {1, 2, 3, 4}
    assert any(r["iscrowd"] for found in records for r in found)
    assert any((ids == 0).any() for _, ids, _ in scenes)
    boxes = [[r["bbox"] for r in found if not r["iscrowd"]] for found in records]
    overlaps = sum(
        a is not b and a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
        for found in boxes for a in found for b in found
    )  # fmt: skip
    assert overlaps > 20


def test_records_describe_the_map():
    for i in range(10):
        pixels, ids, records = shapes.draw_scene(np.random.default_rng(i), 96, 8)
        assert pixels.shape == (*ids.shape, 3) and pixels.dtype == np.uint8
        assert {r["id"] for r in records} == set(np.unique(ids).tolist()) - {0}
        for r in records:
            x, y, w, h = r["bbox"]
            inside = ids == r["id"]
            assert inside.sum() == r["area"] == inside[y : y + h, x : x + w].sum()
            assert inside[y].any() and inside[:, x].any() and inside[y + h - 1].any() and inside[:, x + w - 1].any()


def test_the_dataset_is_cocos_in_boxes_masks_and_panoptic(tmp_path, monkeypatch):
    from pycocotools.coco import COCO

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = "--dataset_file shapes --shapes_train 6 --shapes_val 5 --shapes_size 96 --shapes_classes 3"
    dataset = build_dataset("val", parse(flags))
    assert len(dataset) == 5 and dataset.num_classes == 4 and len(build_dataset("train", parse(flags))) == 6
    root = dataset.img_folder.parent
    assert root.parent == tmp_path / "detr"
    coco = COCO(str(dataset.ann_file))
    for annotation in coco.dataset["annotations"]:
        assert coco.annToMask(annotation).sum() == annotation["area"]
    panoptic = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    assert [c["name"] for c in panoptic["categories"]] == ["circle", "square", "triangle", "ground", "sky"]
    for row in panoptic["annotations"]:
        ids = np.asarray(Image.open(root / "panoptic_val2017" / row["file_name"]))[..., 0]
        assert set(np.unique(ids).tolist()) - {0} == {s["id"] for s in row["segments_info"]}


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(shapes, "_write_part", fail)
    with pytest.raises(OSError, match="disk full"):
        shapes.generate(tmp_path / "s", {"train": 1}, 64)
    assert list(tmp_path.iterdir()) == []


def test_too_many_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 to 8 classes, not 9"):
        shapes.generate(tmp_path / "s", {"train": 1}, 64, classes=9)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    counts, root = {"train": 2, "val": 1}, tmp_path / "made"
    root.mkdir()  # empty: room to draw in
    shapes.generate(root, counts, 64, 3)
    before = files(root)
    shapes.generate(root, counts, 64, 3)
    assert files(root) == before
    with pytest.raises(ValueError, match="made holds shapes of other settings .train 2, not 4; classes 3, not 2"):
        shapes.generate(root, counts | {"train": 4}, 64, 2)
    with pytest.raises(ValueError, match="on 8 pixels"):
        shapes.generate(tmp_path / "small", counts, 8)
    shapes.generate(tmp_path / "small", counts, shapes.SMALLEST)


@pytest.mark.parametrize("counts", [{"train": 0, "val": 2}, {"train": 2, "val": -1}])
def test_shapes_without_images_are_refused_before_anything_is_written(tmp_path, counts):
    with pytest.raises(ValueError, match="at least 1 in each part"):
        shapes.generate(tmp_path / "s", counts)
    assert not (tmp_path / "s").exists()


def test_shapes_with_unreadable_settings_are_named(tmp_path):
    (tmp_path / "shapes.json").write_text("{broken")
    with pytest.raises(ValueError, match="shapes.json: not a JSON file"):
        shapes.generate(tmp_path, {"train": 1, "val": 1})
