"""What tools/check_dataset.py sees in a dataset, and whether its verdict is training's own."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset
from tests.helpers import parse, write_panoptic
from tools.check_dataset import main
from util.cli import exit_status


def change(root, part, edit):
    path = root / "annotations" / f"instances_{part}2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def report(root, capsys, *flags):
    status = main(["--coco_path", str(root), *flags])
    return status, capsys.readouterr().out


def test_a_sound_dataset_is_counted_and_passes(coco_root, capsys, tmp_path):
    status, text = report(coco_root, capsys, "--output", str(tmp_path / "sheet.png"))
    assert status == 0 and "training would start" in text and "FATAL" not in text
    for line in (
        "images                       4, with 5 annotations",
        "images without objects       1",
        "crowds                       1",
        "category ids                 2, from 1 to 3: the model has 4 classes",
        "unused ids                   1",
        "  1 cat                      3 in 2 images",
        "object sizes                 4 small (box below 32 x 32), 1 medium, 0 large",
    ):
        assert line in text
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_every_kind_of_bad_box_is_named(coco_root, capsys):
    def spoil(content):
        records = content["annotations"]
        records[0]["bbox"] = [4, 4, 0, 30]
        records[1]["bbox"] = [30, 10, 50, 25]
        records[2]["bbox"] = [100, 100, 5, 5]
        records[4]["bbox"] = [5, 20, 2, 20]
        records.append({**records[4], "id": 77})

    change(coco_root, "train", spoil)
    status, text = report(coco_root, capsys)
    assert status == 0
    for problem, boxes in (
        ("1 annotation(s) have degenerate bboxes", "(training drops them): image 11 [4.0, 4.0, 0.0, 30.0]"),
        (
            "2 annotation(s) have bboxes extending outside",
            "image 11 [30.0, 10.0, 50.0, 25.0], image 12 [100.0, 100.0, ",
        ),
        ("2 annotation(s) appear to be near-duplicates", "image 14 [5.0, 20.0, 2.0, 20.0], image 14 [5.0, 20.0, 2.0, "),
    ):
        (line,) = [line for line in text.splitlines() if problem in line]
        assert boxes in line


def test_sizes_queries_and_parts_are_compared(coco_root, capsys):
    change(coco_root, "train", lambda content: content["images"][2].update(width=65))
    change(coco_root, "val", lambda content: content["categories"][0].update(name="bird"))
    shutil.copy(coco_root / "train2017" / "000000000011.jpg", coco_root / "val2017" / "000000000011.jpg")
    change(coco_root, "val", lambda content: content["images"][0].update(file_name="000000000011.jpg"))
    status, text = report(coco_root, capsys, "--num_queries", "1")
    assert status == 1
    (line,) = [line for line in text.splitlines() if "000000000013.jpg is [48, 64], not [48, 65]" in line]
    assert "FATAL: 1 images of another (height, width) than listed, training would stop there" in line
    assert "2 images with more objects than the 1 queries (--num_queries): image 11 (2), image 12 (2)" in text
    assert "1 is 'cat' in train, 'bird' in val" in text
    assert "1 images that are in both parts (trained on, then evaluated on): 000000000011.jpg" in text


def missing_image(root):
    (root / "train2017" / "000000000013.jpg").unlink()


def stray_category(root):
    change(root, "train", lambda content: content["annotations"][0].update(category_id=5))


def repeated_id(root):
    change(root, "train", lambda content: content["images"][1].update(id=11))


def not_json(root):
    (root / "annotations" / "instances_train2017.json").write_text("hello")


@pytest.mark.parametrize("spoil", [missing_image, stray_category, repeated_id, not_json])
def test_what_stops_training_is_fatal_and_nothing_else(coco_root, capsys, spoil):
    build_dataset("train", parse(f"--coco_path {coco_root}"))
    spoil(coco_root)
    with pytest.raises(ValueError):
        build_dataset("train", parse(f"--coco_path {coco_root}"))
    status, text = report(coco_root, capsys)
    assert status == 1 and "FATAL" in text and "training would fail" in text


def test_a_text_file_named_jpg_is_fatal(coco_root, capsys):
    (coco_root / "train2017" / "000000000012.jpg").write_text("hello")
    status, text = report(coco_root, capsys)
    assert status == 1 and "1 images cannot be decoded" in text and "000000000012.jpg" in text
    assert report(coco_root, capsys, "--no_decode")[0] == 0


@pytest.mark.parametrize("flags", [[], ["--coco_path", "gone"], ["--images", "x"]])
def test_flags_that_name_no_dataset_end_in_a_sentence(flags, capsys):
    assert exit_status(lambda: main(flags)) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_check_dataset_reports_an_image_that_is_too_large(coco_root, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    status, text = report(coco_root, capsys)
    assert status == 1 and "4 images cannot be decoded" in text and "exceeds limit" in text


def test_check_dataset_prints_names_escaped(coco_root, capsys):
    change(coco_root, "train", lambda content: content["categories"][0].update(name="\x1b[31mcat"))
    change(coco_root, "val", lambda content: content["images"][0].update(file_name="\x1bgone.jpg"))
    status, text = report(coco_root, capsys)
    assert status == 1 and "\x1b" not in text and text.count("\\x1b") >= 2


def test_check_dataset_needs_only_what_training_needs(coco_root, capsys):
    def strip(content):
        for record in content["annotations"]:
            del record["id"], record["area"], record["iscrowd"]
        for record in content["images"]:
            del record["height"], record["width"]

    change(coco_root, "train", strip)
    status, text = report(coco_root, capsys, "--no_decode")
    assert status == 0 and "outside the image" not in text


def test_check_dataset_allows_boxes_one_pixel_outside(coco_root, capsys):
    change(coco_root, "train", lambda content: content["annotations"][0].update(bbox=[-0.9, -0.9, 65.5, 49.5]))
    assert "outside the image" not in report(coco_root, capsys)[1]
    change(coco_root, "train", lambda content: content["annotations"][0].update(bbox=[-1.5, 0, 65.5, 49.5]))
    assert "outside the image" in report(coco_root, capsys)[1]


TRIANGLE = [[0, 0, 9, 0, 9, 9]]


def with_segmentations(root, first):
    change(root, "train", lambda c: [a.update(segmentation=TRIANGLE) for a in c["annotations"]])
    change(root, "train", lambda c: c["annotations"][0].update(segmentation=first))


@pytest.mark.parametrize("segmentation", [
    [[10, 20, 50, 70]], TRIANGLE[0], [[*TRIANGLE[0], 3]], [[{"x": 1, "y": 2}] * 3], [[0, None, 9, 0, 9, 9]],
    [[0, 1e9, 9, 0, 9, 9]], {"size": [64, 48], "counts": [3072]}, {"size": 5, "counts": [3]}, "text",
])  # fmt: skip
def test_segmentations_that_masks_could_not_use_are_fatal(coco_root, capsys, segmentation):
    with_segmentations(coco_root, segmentation)
    with pytest.raises(ValueError, match="1 segmentations that cannot be drawn"):
        build_dataset("train", parse(f"--coco_path {coco_root} --masks"))
    status, text = report(coco_root, capsys)
    assert status == 1 and "FATAL: 1 segmentations cannot be drawn, --masks would not start" in text
    assert report(coco_root, capsys, "--boxes_only")[0] == 0


def test_segmentations_that_masks_can_use_are_no_problem(coco_root, capsys):
    with_segmentations(coco_root, [*TRIANGLE, [1, 2, 3, 4]])
    build_dataset("train", parse(f"--coco_path {coco_root} --masks"))
    status, text = report(coco_root, capsys)
    assert status == 0 and "segmentations                none: only boxes can be trained" in text  # the other part


def test_annotations_without_a_segmentation_beside_others_are_a_warning(coco_root, capsys):
    with_segmentations(coco_root, None)
    status, text = report(coco_root, capsys)
    assert status == 0 and "1 annotations without a segmentation (--masks would not start): 11" in text


def test_files_outside_the_folder_are_not_opened_unless_allowed(coco_root, capsys):
    (coco_root / "secret.jpg").write_text("no picture")
    change(coco_root, "train", lambda c: c["images"][0].update(file_name="../secret.jpg"))
    change(coco_root, "val", lambda c: c["images"][0].update(file_name="../secret.jpg"))
    status, text = report(coco_root, capsys, "--output", str(coco_root / "sheet.png"))
    assert status == 1 and "1 images outside" in text and "cannot be decoded" not in text and "both parts" not in text
    status, text = report(coco_root, capsys, "--allow", "outside_paths")
    assert status == 1 and "1 images outside" not in text and "secret.jpg: not a readable image" in text


@pytest.mark.parametrize("flags", ["--num_classes 0", "--num_queries -1", "--count 0", "--coco_panoptic_path gone"])
def test_flags_of_check_dataset_that_make_no_sense_are_refused(coco_root, capsys, flags):
    assert exit_status(lambda: main(["--coco_path", str(coco_root), *flags.split()])) == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.fixture
def panoptic_root(tmp_path):
    ids = np.ones((48, 64), int)
    ids[10:30, 10:40] = 2
    for part in ("train", "val"):
        write_panoptic(tmp_path / "p", {1: (ids, {1: (7, 0), 2: (1, 0)}), 2: (ids, {1: (7, 0), 2: (2, 0)})}, part)
    return tmp_path / "p"


def other_map(pixels):
    def spoil(root):
        Image.fromarray(np.array(pixels, np.uint8).repeat(16, 0).repeat(16, 1)).save(root / "panoptic_train2017/2.png")

    return spoil  # fmt: skip


def instances_of_others(root):
    content = {"images": [{"id": 9, "file_name": "9.jpg"}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize("spoil, words", [
    (other_map([[[1, 0, 0]] * 4] * 3), "2.png: the map does not match its segments_info"),
    (other_map([[[1, 0, 0], [2, 0, 0]]]), r"2.png: \[16, 32\] .height, width., not \[48, 64\]"),
    (other_map([[1, 1, 2, 2]] * 3), "2.png: a panoptic map of one channel"),
    (lambda root: (root / "panoptic_train2017/2.png").write_text("x"), "2.png: not a readable panoptic map"),
    (lambda root: (root / "panoptic_train2017/2.png").unlink(), "1 panoptic maps that are not in"),
    (instances_of_others, "2 images of .*, which the instances file lacks"),
])  # fmt: skip
def test_panoptic_maps_are_checked_with_their_pixels(panoptic_root, capsys, spoil, words):
    flags = ("--coco_panoptic_path", str(panoptic_root), "--decode")
    status, text = report(panoptic_root, capsys, *flags)
    assert status == 0 and "2, with 4 annotations" in text
    spoil(panoptic_root)
    status, text = report(panoptic_root, capsys, *flags)
    assert status == 1 and re.search(f"(?s)FATAL: .*{words}", text)
