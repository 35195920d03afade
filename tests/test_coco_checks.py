"""Checks when a dataset is built: suspicious content, meanings of ids, sizes of images, odd JSON."""

import json
import re

import pytest
import torch
from PIL import Image

from datasets import build_dataset, build_datasets
from datasets.coco_api import index_coco
from datasets.coco_checks import compare_categories, warn_of_few_images
from datasets.coco_eval import CocoEvaluator
from datasets.json_file import read_json, write_json
from tests.helpers import parse, write_coco


def change(root, edit, part="train"):
    path = root / "annotations" / f"instances_{part}2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def built(root, part="train", flags=""):
    return build_dataset(part, parse(f"--coco_path {root} {flags}"))


def many_objects(content):
    content["annotations"] += [{**content["annotations"][0], "id": 100 + k} for k in range(100)]


@pytest.mark.parametrize("edit, words", [
    (lambda c: c["annotations"][0].update(bbox=[4, 4, 0, 30]), r"1 boxes without width or height .*: image 11 \[4.0"),
    (lambda c: c["annotations"][0].update(bbox=[4, 4, -5, 3], area=9), "1 boxes without width or height"),
    (lambda c: c["annotations"][0].update(bbox=[4, 4, 64, 34]), r"1 boxes that reach outside .*: image 11 \[4.0"),
    (lambda c: c["annotations"][0].update(bbox=[-2, 4, 9, 9]), "1 boxes that reach outside"),
    (many_objects, r"1 images with more objects than the 100 .*: image 11 \(102\)"),
    (lambda c: c["images"][1].update(file_name="000000000011.jpg"), "1 files listed for several images: 0.*11.jpg"),
    (lambda c: c["categories"][1].update(name="cat"), "1 names of several categories: cat"),
    (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "nothing to train on"),
    (lambda c: [a.update(bbox=[1, 1, 0, 0]) for a in c["annotations"]], "nothing to train on"),
    (lambda c: [a.update(bbox=[999, 1, 5, 5]) for a in c["annotations"]], "nothing to train on"),
])  # fmt: skip
def test_suspicious_content_is_logged_when_the_dataset_is_built(coco_root, caplog, edit, words):
    built(coco_root)
    assert not caplog.records
    change(coco_root, edit)
    built(coco_root)
    assert re.search(words, caplog.text)


def test_a_missing_area_is_never_negative(coco_root):
    change(coco_root, lambda c: (c["annotations"][0].update(bbox=[40, 30, -20, 10]), c["annotations"][0].pop("area")))
    data = built(coco_root)
    assert data.index.area[0] == 0 and data.coco.anns[1]["area"] == 0


def test_images_that_all_have_another_size_are_refused_at_the_start(coco_root):
    for path in (coco_root / "train2017").iterdir():
        Image.open(path).resize((32, 24)).save(path)
    with pytest.raises(ValueError, match=r"4 images, all that were opened, .*000011.jpg is \[24, 32\], not \[48, 64\]"):
        built(coco_root)


def test_num_classes_0_is_refused_by_the_dataset(coco_root):
    args = parse(f"--coco_path {coco_root}")
    args.num_classes = 0
    with pytest.raises(ValueError, match="0 classes: at least 1"):
        build_dataset("train", args)


def test_categories_of_other_names_are_named_in_one_warning(caplog):
    ours, theirs = {1: "bolt", 2: "nut", 3: "x"}, {1: "nut", 2: "bolt", 3: "x", 4: "\x1bnew"}
    assert len(compare_categories(ours, "A", theirs, "B")) == 2
    differ, absent = caplog.messages
    assert "1 is bolt in A and nut in B, 2 is nut in A and bolt in B" in differ and "3 is" not in differ
    assert r"1 categories of B are not in A: 4 (\x1bnew)" in absent
    caplog.clear()
    assert compare_categories(ours, "A", {1: "bolt"}, "B") == [] and not caplog.records


def test_training_and_validation_categories_are_compared(coco_root, caplog):
    change(coco_root, lambda c: c["categories"][0].update(name="bird"), "val")
    build_datasets(parse(f"--coco_path {coco_root}"), None)
    assert "1 is cat in the training data and bird in the validation data" in caplog.text


@pytest.mark.parametrize("text, words", [
    ("[" * 100_000, "nested too deeply"), ('{"images": [{"id": ' + "9" * 5000 + "}]}", "not a JSON file"),
    ('{"images": [], "images": []}', "'images' occurs twice"), ("<html>", "not a JSON file"),
])  # fmt: skip
def test_json_that_breaks_the_parser_is_named(coco_root, text, words):
    path = coco_root / "annotations/instances_train2017.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"instances_train2017.json.*{words}"):
        built(coco_root)


def test_deeply_nested_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="a.json.*nested too deeply"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", [None, 5, ["a.jpg"]])
def test_a_file_name_that_is_no_text_is_refused(coco_root, name):
    change(coco_root, lambda c: c["images"][0].update(file_name=name))
    with pytest.raises(ValueError, match="1 records that cannot be read"):
        built(coco_root)


def test_json_that_is_written_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="a.json is not written"):
        write_json(tmp_path / "a.json", [float("nan")])
    assert not (tmp_path / "a.json").exists()
    write_json(tmp_path / "a.json", [1.5])
    assert read_json(tmp_path / "a.json") == [1.5]


ODD = [[1, 2, 3, 4, 5, 6], [[{"x": 1}]], [[0, None, 9, 0, 9, 9]], {"size": 5, "counts": [3]}, "text", {"counts": 1}]


def evaluated(annotation, scores=(1.0,), boxes=((1.0, 2, 31, 42),), label=1):
    record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], **annotation}
    truth = index_coco({"images": [{"id": 1, "height": 90, "width": 120}], "annotations": [record],
                        "categories": [{"id": 1, "name": "a"}]})  # fmt: skip
    evaluator = CocoEvaluator(truth, ["bbox"])
    result = {"scores": torch.tensor(scores), "boxes": torch.tensor(boxes), "labels": torch.tensor([label])}
    evaluator.update({1: result})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.coco_eval["bbox"].stats[0]


@pytest.mark.parametrize("segmentation", ODD)
def test_box_ap_does_not_depend_on_segmentations(segmentation):
    assert evaluated({"segmentation": segmentation}) == pytest.approx(1)


@pytest.mark.parametrize("bad", [{"scores": (float("nan"),)}, {"boxes": ((0.0, 0, float("inf"), 1),)}])
def test_detections_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="image 1: boxes or scores that are not finite"):
        evaluated({}, **bad)


def test_detections_of_other_categories_only_are_logged(caplog):
    assert evaluated({}, label=7) == 0
    assert "no detection is of an evaluated category: they have the ids [7], the ground truth has [1]" in caplog.text


def test_few_training_images_are_warned_of(caplog):
    warn_of_few_images(1000)
    assert not caplog.text
    warn_of_few_images(100, "small")
    assert not caplog.messages
    warn_of_few_images(99, "small")
    assert "99 training images" in caplog.messages.pop() and "--recipe small" not in caplog.text
    caplog.clear()
    warn_of_few_images(999)
    assert "999 training images" in caplog.text and "--finetune" in caplog.text


def test_number_of_classes_is_that_of_the_training_data_unless_a_flag_or_a_checkpoint_says_more(tmp_path):
    for part, label in (("train", 5), ("val", 2)):
        write_coco(tmp_path, part, [1], [(1, label, [4, 4, 9, 9], {})], [{"id": label, "name": "cat"}])
    args = parse(f"--coco_path {tmp_path}")
    assert build_datasets(args, None)[2] == 6
    assert build_datasets(args, {"model": {"class_embed.bias": torch.zeros(8)}})[2] == 7
    assert build_datasets(parse(f"--coco_path {tmp_path} --num_classes 9"), None)[2] == 9
    train_set, _, num_classes = build_datasets(parse(f"--coco_path {tmp_path} --eval"), None)
    assert train_set is None and num_classes == 3
