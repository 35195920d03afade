"""The report: its numbers against a count by hand, its page, and files that it refuses."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import main
from datasets.coco_api import load_coco_api
from datasets.coco_eval import CocoEvaluator
from tests.helpers import parse, write_coco, write_panoptic
from tools import report
from util.cli import exit_status

pytest.importorskip("hotcoco", reason="the report needs hotcoco")
NAMES = {1: "<b>cat</b>", 2: "a $dog$"}


@pytest.fixture
def files(tmp_path):
    """Images 1 (all found), 2 (one missed, one of a wrong class) and 3 (one false, one of a low score)."""
    objects = [(1, 1, [4, 4, 20, 20]), (1, 2, [30, 10, 20, 30]), (2, 1, [4, 4, 20, 20]), (2, 2, [30, 10, 20, 30]),
               (3, 1, [4, 4, 20, 20])]  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in NAMES.items()]
    write_coco(tmp_path, "val", [1, 2, 3], [(i, c, box, {}) for i, c, box in objects], categories)
    found = [(1, 1, [4, 4, 20, 20], 0.9), (1, 2, [31, 10, 20, 30], 0.8), (2, 1, [30, 10, 20, 30], 0.7),
             (3, 1, [4, 4, 20, 19], 0.6), (3, 2, [40, 2, 20, 20], 0.65), (3, 2, [40, 25, 20, 20], 0.1)]  # fmt: skip
    records = [{"image_id": i, "category_id": c, "bbox": box, "score": s} for i, c, box, s in found]
    (tmp_path / "found.json").write_text(json.dumps(records))
    return tmp_path


def run(folder, *more, predictions="found.json"):
    flags = ["--annotations", folder / "annotations/instances_val2017.json", "--images", folder / "val2017"]
    flags += ["--predictions", folder / predictions, "--output", folder / "report", *more]
    return exit_status(lambda: report.main([str(flag) for flag in flags]))


def test_report_has_the_numbers_of_a_count_by_hand(files, capsys):
    assert run(files) == 0
    numbers = json.loads((files / "report/report.json").read_text())
    # 3 correct of 5 detections from 0.6 on, of 5 objects; from 0.8 on 2 of 2: F1 4/7
    assert numbers["best"] == pytest.approx({"threshold": 0.6, "f1": 0.6, "precision": 0.6, "recall": 0.6})
    assert numbers["confusion"]["matrix"] == [[2, 0, 1], [1, 1, 0], [0, 1, 0]]
    assert [(row["image_id"], row["tp"], row["fp"], row["fn"]) for row in numbers["images"]] == [
        (2, 0, 1, 2), (3, 1, 1, 0), (1, 2, 0, 0)]  # fmt: skip
    assert {row["name"]: row["objects"] for row in numbers["classes"]} == {NAMES[1]: 3, NAMES[2]: 2}
    assert numbers["tide"]["counts"]["Cls"] == 1 and numbers["max_dets"] == 100
    assert "best score threshold 0.600" in capsys.readouterr().out
    with (files / "report/classes.csv").open() as file:
        assert {row["name"] for row in csv.DictReader(file)} == set(NAMES.values())


def test_confusion_matrix_equals_a_brute_force_count(tmp_path):
    draw = np.random.default_rng(0)
    objects = [(i, int(draw.integers(1, 3)), [int(x), int(y), 16, 16], {}) for i in range(1, 9)
               for x, y in draw.integers(0, 32, (1, 2))]  # fmt: skip
    write_coco(tmp_path, "val", list(range(1, 9)), objects, [{"id": i, "name": name} for i, name in NAMES.items()])
    records = [
        {"image_id": i, "category_id": int(draw.integers(1, 3)), "bbox": [box[0] + int(draw.integers(0, 9)), *box[1:]],
         "score": 0.9} for i, _, box, _ in objects]  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(records))
    assert run(tmp_path) == 0
    expected = np.zeros((3, 3), int)
    for (_, label, box, _), found in zip(objects, records, strict=True):  # one object and one detection in an image
        pair = torch.tensor([box, found["bbox"]], dtype=torch.float64)
        pair[:, 2:] += pair[:, :2]
        if box_iou(pair[:1], pair[1:]) >= 0.5:
            expected[label - 1, found["category_id"] - 1] += 1
        else:
            expected[label - 1, 2] += 1
            expected[2, found["category_id"] - 1] += 1
    assert json.loads((tmp_path / "report/report.json").read_text())["confusion"]["matrix"] == expected.tolist()


def test_page_needs_no_other_file_and_escapes_names(files):
    assert run(files, "--worst", "2") == 0
    page = (files / "report/report.html").read_text()
    assert "&lt;b&gt;cat&lt;/b&gt;" in page and "<b>cat" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/jpeg") == 2 and page.count("data:image/png") == 2


def test_report_without_images_has_no_pictures(files):
    flags = ["--annotations", files / "annotations/instances_val2017.json", "--predictions", files / "found.json"]
    assert exit_status(lambda: report.main([str(f) for f in [*flags, "--output", files / "plain"]])) == 0
    assert "data:image/jpeg" not in (files / "plain/report.html").read_text()


def test_report_of_masks_has_the_ap_of_the_evaluation_that_wrote_them(files):
    file = files / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    results = {}
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        record["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        mask = torch.zeros(1, 1, 48, 64)
        mask[0, 0, y : y + h, x + record["id"] : x + w] = 1  # cut off by its id
        found = {"scores": torch.tensor([0.5 + record["id"] / 20]), "labels": torch.tensor([record["category_id"]])}
        results[record["image_id"]] = {**found, "boxes": torch.tensor([[x, y, x + w, y + h]]), "masks": mask}
    file.write_text(json.dumps(content))
    evaluator = CocoEvaluator(load_coco_api(file), ["segm"])
    evaluator.update(results)
    evaluator.accumulate()
    expected = evaluator.summarize()["coco_eval_masks"]
    evaluator.save_predictions(files)
    assert "bbox" not in json.loads((files / "predictions_segm.json").read_text())[0]
    assert run(files, predictions="predictions_segm.json") == 0
    numbers = json.loads((files / "report/report.json").read_text())
    assert numbers["kind"] == "segm" and list(numbers["metrics"].values()) == pytest.approx(expected)
    assert "Detections: masks" in (files / "report/report.html").read_text()


def test_panoptic_report_has_pq_of_each_class(tmp_path):
    write_panoptic(tmp_path, {1: (np.arange(24 * 32).reshape(24, 32) // 300 + 1, {1: (1, 0), 2: (2, 0), 3: (1, 0)})})
    truth, folder = tmp_path / "annotations/panoptic_val2017.json", tmp_path / "panoptic_val2017"
    content = json.loads(truth.read_text())
    (tmp_path / "found").mkdir()
    for record in content["annotations"]:
        Image.open(folder / record["file_name"]).save(tmp_path / "found" / record["file_name"])
    (tmp_path / "found/predictions.json").write_text(json.dumps(content))
    flags = ["--annotations", truth, "--maps", folder, "--predictions", tmp_path / "found/predictions.json"]
    assert exit_status(lambda: report.main([str(f) for f in [*flags, "--output", tmp_path / "report"]])) == 0
    numbers = json.loads((tmp_path / "report/report.json").read_text())
    assert [(row["name"], row["pq"]) for row in numbers["classes"]][:2] == [("cat", 1.0), ("dog", 1.0)]
    assert numbers["metrics"]["All"]["pq"] == 1.0
    assert "<h2>Classes</h2>" in (tmp_path / "report/report.html").read_text()
    assert exit_status(lambda: report.main([str(f) for f in [*flags[:2], *flags[4:], "--output", tmp_path / "r"]])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("masks", [False, True])
def test_report_of_a_run_finds_its_data_and_predictions(masks, tmp_path):
    shapes = f"--shapes_train 4 --shapes_val 2 --shapes_size 64 --coco_path {tmp_path / 'data'} --augment flip"
    kind = "shapes_panoptic --masks --hidden_dim 128 --nheads 8" if masks else "shapes"
    main.main(parse(f"--dataset_file {kind} {shapes} --epochs 1 --output_dir {tmp_path / 'run'}"))
    assert exit_status(lambda: report.main(["--run", str(tmp_path / "run")])) == 0
    numbers = json.loads((tmp_path / "run/report/report.json").read_text())
    assert numbers["kind"] == ("panoptic" if masks else "bbox")
    assert (
        masks or len(numbers["images"]) == 2 and "data:image/jpeg" in (tmp_path / "run/report/report.html").read_text()
    )


def test_bad_files_are_refused_in_a_sentence(files, capsys):
    (files / "other.json").write_text(
        json.dumps([{"image_id": 77, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}])
    )
    assert run(files, predictions="other.json") == 2
    assert "no detection in an image" in capsys.readouterr().err
    assert run(files, predictions="gone.json") == 2
    assert exit_status(lambda: report.main([])) == 2
    assert "give --run" in capsys.readouterr().err
