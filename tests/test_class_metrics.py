"""Numbers for each class: equal to pycocotools' own, and the score threshold with the highest F1."""

import contextlib
import csv
import io
import math
import random

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval

from datasets.class_metrics import class_rows, score_curves, write_classes
from datasets.coco_api import index_coco
from datasets.coco_eval import CocoEvaluator


def evaluator(backend="auto", images=6, seed=0):
    """Evaluate noised objects of three classes, one of which occurs nowhere."""
    draw = random.Random(seed)
    annotations, found = [], {}
    for image_id in range(1, images + 1):
        rows = []
        for _ in range(4):
            x, y, label = draw.uniform(0, 60), draw.uniform(0, 60), draw.choice([1, 2])
            annotations.append({"image_id": image_id, "category_id": label, "bbox": [x, y, 20, 20], "area": 400,
                                "iscrowd": int(draw.random() < 0.1), "id": len(annotations) + 1})  # fmt: skip
            x, y = x + draw.gauss(0, 4), y + draw.gauss(0, 4)
            rows.append((round(draw.random(), 1), label if draw.random() < 0.8 else 3 - label, x, y, x + 20, y + 20))
        rows = torch.tensor(rows)
        found[image_id] = {"scores": rows[:, 0], "labels": rows[:, 1].long(), "boxes": rows[:, 2:]}
    truth = index_coco(
        {
            "images": [{"id": i, "height": 90, "width": 90} for i in found],
            "categories": [{"id": i, "name": name} for i, name in ((1, "cat"), (2, "dog"), (3, "fox"))],
            "annotations": annotations,
        }
    )
    result = CocoEvaluator(truth, ["bbox"], backend)
    result.update(found)
    result.accumulate()
    result.summarize()
    return result, truth


@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
def test_class_rows_equal_pycocotools_run_on_one_class(backend):
    result, truth = evaluator(backend)
    rows = {row.category_id: row for row in class_rows(result.coco_eval["bbox"])}
    for label in (1, 2):
        with contextlib.redirect_stdout(io.StringIO()):
            alone = COCOeval(truth, truth.loadRes(result.predictions()), "bbox")
            alone.params.catIds = [label]
            alone.evaluate()
            alone.accumulate()
            alone.summarize()
        assert [rows[label].ap, rows[label].ap50, rows[label].ar] == pytest.approx(alone.stats[[0, 1, 8]], abs=1e-12)
        objects = sum(a["category_id"] == label and not a["iscrowd"] for a in truth.anns.values())
        assert rows[label].objects == objects
    assert rows[3].objects == 0 and math.isnan(rows[3].ap)
    assert [row.ap for row in class_rows(result.coco_eval["bbox"])[:2]] == sorted(
        [rows[1].ap, rows[2].ap], reverse=True
    )


def test_best_threshold_equals_that_of_a_count_over_all_thresholds():
    evaluation = evaluator()[0].coco_eval["bbox"]
    curves, together = score_curves(evaluation)
    for label in (1, 2):
        matches = [m for m in evaluation.evalImgs if m and m["category_id"] == label and list(m["aRng"])[1] > 1e9]
        pairs = [
            (score, hit > 0)
            for m in matches
            for score, hit, ignored in zip(m["dtScores"], m["dtMatches"][0], m["dtIgnore"][0], strict=True)
            if not ignored
        ]
        objects = sum(int((~np.asarray(m["gtIgnore"], bool)).sum()) for m in matches)
        f1 = {
            t: 2 * sum(hit for s, hit in pairs if s >= t) / (sum(s >= t for s, _ in pairs) + objects)
            for t in {score for score, _ in pairs}
        }
        best = curves[label].best()
        assert best["f1"] == pytest.approx(max(f1.values())) and f1[best["threshold"]] == pytest.approx(best["f1"])
        assert len(curves[label].scores) == len(f1)
    assert together.objects == curves[1].objects + curves[2].objects
    assert curves[3].best()["threshold"] == 1.0 or len(curves[3].scores) == 0


def test_write_classes_logs_a_table_and_writes_csv(tmp_path, caplog):
    caplog.set_level("INFO", "detr")
    write_classes(evaluator()[0], tmp_path)
    assert "best threshold" in caplog.text and "dog" in caplog.text
    with (tmp_path / "classes_bbox.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == {"cat", "dog", "fox"} and float(rows[0]["ap"]) >= float(rows[1]["ap"])
    write_classes(None, tmp_path)  # a process that is not the main one
