"""Panoptic quality: by hand, against numbers of the official code, and the files written."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.panoptic_eval import PanopticEvaluator
from tests.helpers import write_panoptic


def png(ids):
    ids, file = np.asarray(ids), io.BytesIO()
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def predict(image_id, ids, classes):
    segments = [{"id": k, "category_id": c, "isthing": c < 7} for k, c in classes.items()]
    return {"image_id": image_id, "png_string": png(ids), "segments_info": segments}


def stripes(*widths, height=10):
    """Columns of ids: as many of each as its width says."""
    return np.tile(np.repeat([i for i, _ in widths], [n for _, n in widths]), (height, 1))


TRUTH = {
    1: (stripes((1, 40), (2, 30), (0, 20), (3, 10)), {1: (7, 0), 2: (1, 0), 3: (2, 0)}),
    2: (stripes((1, 50), (2, 40), (3, 10)), {1: (1, 1), 2: (7, 0), 3: (2, 0)}),
}
FOUND = [
    # sky 40 of 45; the cat covers 25 of 30 and 5 of void, which do not count; a dog wholly on void is excused
    predict(1, stripes((0, 40), (9, 5), (2, 30), (300, 15), (4, 10)), {0: 7, 9: 7, 2: 1, 300: 2, 4: 1}),
    # two cats on the crowd are excused; half a sky is too little: one missed and one false; the dog is called a cat
    predict(2, stripes((1, 30), (2, 20), (3, 20), (4, 20), (5, 10)), {1: 1, 2: 1, 3: 7, 4: 2, 5: 1}),
]


@pytest.fixture
def truth(tmp_path):
    write_panoptic(tmp_path, TRUTH)
    return tmp_path / "annotations/panoptic_val2017.json", tmp_path / "panoptic_val2017"


def score(truth, predictions, output_dir=None):
    evaluator = PanopticEvaluator(*truth, output_dir)
    for prediction in predictions:
        evaluator.update([prediction])
    evaluator.synchronize_between_processes()
    return evaluator, evaluator.summarize()


def test_panoptic_quality_equals_a_calculation_by_hand(truth):
    _, result = score(truth, FOUND)
    # sky: image 1 matches with 40 / 40 and the piece of 5 on the cat is false; image 2: 20 of 40 is not more than half
    sky = {"sq": 1.0, "rq": 1 / (1 + 2 / 2 + 1 / 2)}
    # cat: 25 / 30; false ones: on the dog of image 1, on the dog of image 2
    cat = {"sq": 25 / 30, "rq": 1 / (1 + 2 / 2)}
    # dog: missed twice, false once (on the sky of image 2)
    for label, expected in ((7, sky), (1, cat), (2, {"sq": 0.0, "rq": 0.0})):
        assert result["per_class"][label]["sq"] == pytest.approx(expected["sq"])
        assert result["per_class"][label]["rq"] == pytest.approx(expected["rq"])
        assert result["per_class"][label]["pq"] == pytest.approx(expected["sq"] * expected["rq"])
    pq = {label: numbers["pq"] for label, numbers in result["per_class"].items()}
    assert result["Things"] == {"pq": (pq[1] + pq[2]) / 2, "sq": cat["sq"] / 2, "rq": cat["rq"] / 2, "n": 2}
    assert result["Stuff"]["pq"] == pq[7] and result["All"]["n"] == 3


def test_panoptic_quality_of_the_ground_truth_is_one(truth):
    same = [predict(i, ids, {k: c for k, (c, _) in classes.items()}) for i, (ids, classes) in TRUTH.items()]
    assert score(truth, same)[1]["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 3}


def test_panoptic_quality_of_empty_maps_is_zero(truth):
    _, result = score(truth, [predict(1, np.zeros((10, 100), int), {}), predict(2, np.zeros((10, 100), int), {})])
    assert result["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 3}


def test_panoptic_quality_of_one_class_does_not_count_classes_that_never_occur(tmp_path):
    write_panoptic(tmp_path, {1: (stripes((1, 60), (0, 40)), {1: (1, 0)})})
    truth = tmp_path / "annotations/panoptic_val2017.json", tmp_path / "panoptic_val2017"
    result = score(truth, [predict(1, stripes((1, 45), (2, 15), (0, 40)), {1: 1, 2: 7})])[1]
    assert result["All"] == {"pq": 0.375, "sq": 0.375, "rq": 0.5, "n": 2}  # the false sky counts as a class
    assert result["Things"] == {"pq": 0.75, "sq": 0.75, "rq": 1.0, "n": 1}


def test_panoptic_quality_counts_an_image_once_and_only_seen_images(truth):
    once = score(truth, FOUND[:1])[1]
    assert score(truth, [FOUND[0], FOUND[0]])[1] == once and once != score(truth, FOUND)[1]


def test_panoptic_evaluator_writes_the_evaluated_predictions(truth, tmp_path):
    evaluator, result = score(truth, FOUND, tmp_path / "out")
    left = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [record["file_name"] for record in left["annotations"]] == ["000000000001.png", "000000000002.png"]
    again = [{**r, "png_string": (tmp_path / "out" / r["file_name"]).read_bytes()} for r in left["annotations"]]
    assert score(truth, again)[1] == result


@pytest.mark.parametrize("ids, classes, words", [
    (stripes((1, 50), (2, 50)), {1: 7}, r"image 1.*not listed: \[2\]"),
    (stripes((1, 100)), {1: 7, 2: 1}, r"image 1.*without a pixel: \[2\]"),
    (stripes((1, 99)), {1: 7}, r"image 1.*\(10, 99\).*\(10, 100\)"),
    (stripes((1, 100)), {1: 8}, r"image 1.*\[8\]"),
])  # fmt: skip
def test_panoptic_evaluator_with_inconsistent_prediction_raises(truth, ids, classes, words):
    with pytest.raises(ValueError, match=words):
        score(truth, [predict(1, ids, classes)])


def test_panoptic_evaluator_with_wrong_ground_truth_map_raises(truth):
    with pytest.raises(ValueError, match="no image 5"):
        score(truth, [predict(5, *FOUND[:0], stripes((1, 100)), {1: 7})])
    (truth[1] / "1.png").write_bytes(png(stripes((1, 40), (2, 60))))
    with pytest.raises(ValueError, match=r"1.png.*without a pixel: \[3\]"):
        score(truth, FOUND)
    (truth[1] / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1.png"):
        score(truth, FOUND)


@pytest.mark.skipif(
    "DETR_TEST_COCO_PANOPTIC" not in os.environ, reason="DETR_TEST_COCO_PANOPTIC names no COCO panoptic folder"
)
def test_panoptic_quality_of_real_ground_truth_is_one():
    root = Path(os.environ["DETR_TEST_COCO_PANOPTIC"])
    files = root / "annotations/panoptic_val2017.json", root / "panoptic_val2017"
    records = json.loads(files[0].read_text())["annotations"]
    found = [{**record, "png_string": (files[1] / record["file_name"]).read_bytes()} for record in records]
    assert score(files, found)[1]["All"]["pq"] == 1.0


def test_panoptic_evaluator_with_a_file_name_of_another_folder_writes_into_its_own(truth, tmp_path):
    score(truth, [{**FOUND[0], "file_name": "../escaped.png"}], tmp_path / "out")
    assert not (tmp_path / "escaped.png").exists() and (tmp_path / "out/000000000001.png").exists()


def test_panoptic_quality_equals_the_official_numbers():
    root = Path(__file__).parent / "data/panoptic_quality"  # void, crowds, things and stuff; PQ by COCO's panoptic API
    predictions = json.loads((root / "pred.json").read_text())["annotations"]
    found = [{**record, "png_string": (root / "pred" / record["file_name"]).read_bytes()} for record in predictions]
    result = score((root / "gt.json", root / "gt"), found)[1]
    expected = json.loads((root / "expected.json").read_text())
    assert {group: result[group] for group in ("All", "Things", "Stuff")} == {
        group: expected[group] for group in ("All", "Things", "Stuff")
    }
    assert result["per_class"] == {int(label): numbers for label, numbers in expected["per_class"].items()}


def test_panoptic_evaluator_reads_true_maps_only_inside_their_folder(truth):
    content = json.loads(truth[0].read_text())
    content["annotations"][0]["file_name"] = "../panoptic_val2017/1.png"
    truth[0].write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 panoptic maps outside"):
        PanopticEvaluator(*truth, None)
    PanopticEvaluator(*truth, None, allow_outside=True)


def test_panoptic_evaluator_without_hotcoco_names_the_package(truth, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package hotcoco: pip install hotcoco"):
        PanopticEvaluator(*truth, None)
