import gc
import json

import pytest
import torch

from datasets.coco import load_coco_api
from datasets.coco_eval import CocoEvaluator, curves

faster = pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed: nothing to compare with")


@pytest.fixture
def truth(coco_root):
    return load_coco_api(coco_root / "annotations/instances_train2017.json")


def detections(truth, shift=0.0, drop=()):
    """Results as PostProcess gives them: the ground truth moved by `shift` pixels, with a false one in each image."""
    results = {}
    for n, image_id in enumerate(truth.imgs):
        boxes = [[0.0, 0, 5, 5]] + [
            [x + shift, y, x + w + shift, y + h]
            for x, y, w, h in (a["bbox"] for a in truth.imgToAnns[image_id] if not a["iscrowd"])
        ]
        labels = [1] + [a["category_id"] for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
        scores = torch.linspace(0.3, 0.9, len(boxes)) - 0.01 * n
        if image_id not in drop:
            results[image_id] = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": scores}
    return results


def numbers(truth, results, backend="auto"):
    evaluator = CocoEvaluator(truth, ["bbox"], backend)
    for image_id, result in results.items():
        evaluator.update({image_id: result})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.coco_eval["bbox"].stats.tolist()


def test_ground_truth_scores_one(truth):
    assert numbers(truth, detections(truth))[0] == pytest.approx(1)
    assert numbers(truth, detections(truth, shift=4))[0] < 0.8


def test_both_backends_give_the_same_twelve_numbers(truth):
    results = detections(truth, shift=3)
    assert numbers(truth, results, "pycocotools")[:12] == numbers(truth, results, "faster")[:12]


def test_garbage_is_collected_afterwards(truth):
    numbers(truth, detections(truth))
    assert gc.isenabled()


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
def test_the_twelve_numbers_are_printed(truth, capsys, backend):
    numbers(truth, detections(truth), backend)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "IoU metric: bbox" and len(lines) == 13
    assert lines[1].strip().startswith("Average Precision  (AP) @[ IoU=0.50:0.95") and lines[1].endswith("= 1.000")


def test_order_and_repetition_of_images_do_not_matter(truth):
    results = detections(truth, shift=3)
    backwards = dict(reversed(results.items()))
    evaluator = CocoEvaluator(truth, ["bbox"])
    evaluator.update(backwards), evaluator.update(results)
    evaluator.synchronize_between_processes(), evaluator.accumulate(), evaluator.summarize()
    assert evaluator.coco_eval["bbox"].stats.tolist() == numbers(truth, results)
    assert len(evaluator.predictions()) == sum(len(r["labels"]) for r in results.values())


def test_only_images_that_were_seen_count(truth):
    assert numbers(truth, detections(truth, drop=(11, 14)))[0] == pytest.approx(1)


def test_no_detections_at_all_is_an_ap_of_zero(truth):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    for backend in ("pycocotools", "faster"):
        assert numbers(truth, {11: nothing}, backend)[0] == 0


def test_an_index_that_is_no_coco_object(truth):
    class Index:
        dataset, imgs, anns, imgToAnns, cats = truth.dataset, truth.imgs, truth.anns, truth.imgToAnns, truth.cats

    assert numbers(Index(), detections(truth))[0] == pytest.approx(1)


def test_predictions_are_written_in_cocos_format(truth, tmp_path):
    evaluator = CocoEvaluator(truth, ["bbox"])
    evaluator.update(detections(truth))
    evaluator.save_predictions(tmp_path)
    rows = json.loads((tmp_path / "predictions_bbox.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == set(rows[0])
    assert rows[1]["bbox"] == pytest.approx([4, 4, 20, 30])
    from pycocotools.coco import COCO

    assert isinstance(truth.loadRes(str(tmp_path / "predictions_bbox.json")), COCO)


def test_curves_load_without_trusting_the_file(truth, tmp_path):
    evaluator = CocoEvaluator(truth, ["bbox"])
    evaluator.update(detections(truth))
    evaluator.synchronize_between_processes(), evaluator.accumulate()
    torch.save(curves(evaluator.coco_eval["bbox"]), tmp_path / "eval.pth")
    assert torch.load(tmp_path / "eval.pth", weights_only=True)["precision"].shape == (10, 101, 2, 4, 3)


def test_masks_may_be_probabilities_and_results_empty(coco_root):
    path = coco_root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    path.write_text(json.dumps(content))
    truth = load_coco_api(path)
    evaluator = CocoEvaluator(truth, ["segm"])
    for image_id in truth.imgs:
        objects = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
        masks = torch.tensor([truth.annToMask(a).tolist() for a in objects]).view(len(objects), 1, 48, 64)
        result = {
            "boxes": torch.zeros(len(objects), 4), "scores": torch.ones(len(objects)),
            "labels": torch.tensor([a["category_id"] for a in objects]), "masks": 0.1 + 0.8 * masks,
        }  # fmt: skip
        evaluator.update({image_id: result if objects else {}})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.coco_eval["segm"].stats[0] == pytest.approx(1)


def test_an_image_with_an_empty_result_counts_as_missed(truth):
    results = detections(truth)
    whole = numbers(truth, results)
    results[11] = {}
    assert numbers(truth, results)[0] < whole[0]
    with pytest.raises(ValueError, match="keypoints"):
        CocoEvaluator(truth, ["bbox", "keypoints"])
