"""Datasets in other formats, brought into COCO's layout."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset
from tests.helpers import parse
from tools import import_data
from util.cli import exit_status

pytest.importorskip("hotcoco", reason="reading these formats needs hotcoco")

VOC = """<annotation><filename>{name}.jpg</filename><size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>cat</name><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>{more}
</annotation>"""
DOG = """<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>"""


def images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(folder / name)


def convert(output, *flags):
    assert exit_status(lambda: import_data.main([*map(str, flags), "--output", str(output)])) == 0
    return {path.stem.split("_")[1]: json.loads(path.read_text()) for path in (output / "annotations").iterdir()}


def boxes(content):
    names = {image["id"]: image["file_name"] for image in content["images"]}
    kinds = {kind["id"]: kind["name"] for kind in content["categories"]}
    return [(names[a["image_id"]], kinds[a["category_id"]], a["bbox"]) for a in content["annotations"]]


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "voc"
    images(root / "JPEGImages", "a.jpg", "b.jpg", "c.jpg")
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, more in (("a", ""), ("b", DOG), ("c", "")):
        (root / "Annotations" / f"{name}.xml").write_text(VOC.format(name=name, more=more))
    return root


def test_voc_keeps_its_parts_and_links_its_images(voc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, names in (("train", "a\n"), ("val", "b 1\n"), ("test", "c\n"), ("trainval", "a\nb\n")):
        (voc / "ImageSets/Main" / f"{part}.txt").write_text(names)
    parts = convert(tmp_path / "out", "--voc", "voc")
    assert set(parts) == {"train2017", "val2017", "test2017"}
    assert boxes(parts["train2017"]) == [("a.jpg", "cat", [10, 5, 20, 20])]
    assert boxes(parts["val2017"]) == [("b.jpg", "cat", [10, 5, 20, 20]), ("b.jpg", "dog", [0, 0, 64, 48])]
    assert os.path.realpath(tmp_path / "out/val2017/b.jpg") == os.path.realpath(voc / "JPEGImages/b.jpg")
    image, target = build_dataset("val", parse(f"--coco_path {tmp_path / 'out'}"))[0]
    assert target["labels"].tolist() == [1, 2]


def test_a_source_without_a_validation_part_is_split_repeatably(voc, tmp_path):
    parts = convert(tmp_path / "out", "--voc", voc, "--val_share", "0.34")
    names = {part: {image["file_name"] for image in content["images"]} for part, content in parts.items()}
    assert len(names["val2017"]) == 1 and names["train2017"] | names["val2017"] == {"a.jpg", "b.jpg", "c.jpg"}
    many = {"images": [{"id": i} for i in range(100)], "annotations": []}
    assert import_data.split(many, 0.2, seed=0) == import_data.split(many, 0.2, seed=0)
    assert import_data.split(many, 0.2, seed=0) != import_data.split(many, 0.2, seed=1)
    assert exit_status(lambda: import_data.main(["--voc", str(voc), "--output", str(tmp_path / "no"), "--val_share",
                                                 "1"])) == 2  # fmt: skip


@pytest.mark.parametrize("names", ["names: [cat, dog]", "names:\n  0: cat\n  1: dog"])
def test_yolo_with_an_image_without_objects(names, tmp_path):
    root = tmp_path / "yolo"
    images(root / "images/train", "a.jpg", "empty.png")
    images(root / "images/val", "b.jpg")
    for part, name, text in (("train", "a", "1 0.5 0.5 0.25 0.5\n"), ("val", "b", "0 0.25 0.25 0.5 0.5\n")):
        (root / "labels" / part).mkdir(parents=True)
        (root / "labels" / part / f"{name}.txt").write_text(text)
    (root / "data.yaml").write_text(f"path: /elsewhere\ntrain: images/train\nval: images/val\n{names}\n")
    parts = convert(tmp_path / "out", "--yolo", root / "data.yaml")
    assert boxes(parts["train2017"]) == [("a.jpg", "dog", [24, 12, 16, 24])]
    assert {image["file_name"] for image in parts["train2017"]["images"]} == {"a.jpg", "empty.png"}
    assert boxes(parts["val2017"]) == [("b.jpg", "cat", [0, 0, 32, 24])]


def test_cvat_with_images_in_a_subfolder(tmp_path):
    images(tmp_path / "photos/sub", "a.jpg", "b.jpg")
    box = '<box label="cat" xtl="1" ytl="2" xbr="11" ybr="12" occluded="0"/>'
    listed = "".join(
        f'<image id="{i}" name="sub/{n}.jpg" width="64" height="48">{box}</image>' for i, n in enumerate("ab")
    )
    labels = "<meta><task><labels><label><name>cat</name></label></labels></task></meta>"
    (tmp_path / "a.xml").write_text(f"<annotations><version>1.1</version>{labels}{listed}</annotations>")
    parts = convert(tmp_path / "out", "--cvat", tmp_path / "a.xml", "--images", tmp_path / "photos")
    assert [box for part in parts.values() for _, _, box in boxes(part)] == [[1, 2, 10, 10]] * 2
    assert len(list((tmp_path / "out").glob("*2017/sub/*.jpg"))) == 2


def test_roboflow_export_keeps_its_files(tmp_path):
    for name in ("train", "valid"):
        images(tmp_path / "export" / name, f"{name}.jpg")
        content = {
            "images": [{"id": 0, "file_name": f"{name}.jpg", "height": 48, "width": 64}],
            "categories": [{"id": 0, "name": "animals"}, {"id": 1, "name": "cat"}],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
        }
        (tmp_path / "export" / name / "_annotations.coco.json").write_text(json.dumps(content))
    parts = convert(tmp_path / "out", "--roboflow", tmp_path / "export")
    assert boxes(parts["val2017"]) == [("valid.jpg", "cat", [1, 2, 3, 4])]


def test_bad_sources_are_refused_in_a_sentence(voc, tmp_path, capsys):
    (tmp_path / "data.yaml").write_text("train: x\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    os.remove(voc / "JPEGImages/b.jpg")
    for flags, message in (
        (["--voc", "gone"], "gone: no such file"),
        (["--voc", voc], "1 images are not in .*: b.jpg"),
        (["--yolo", tmp_path / "data.yaml"], "no `names`"),
        (["--cvat", tmp_path / "x.xml"], "--cvat needs --images"),
        (["--roboflow", tmp_path], "no train/_annotations.coco.json"),
        (["--voc", voc, "--output", tmp_path / "full"], "is not empty"),
    ):
        words = [*map(str, flags)] + ([] if "--output" in flags else ["--output", str(tmp_path / "o")])
        assert exit_status(lambda words=words: import_data.main(words)) == 2
        assert re.search(message, capsys.readouterr().err), message
    assert not Path("gone").exists()
