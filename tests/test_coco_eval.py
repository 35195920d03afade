"""AP of boxes and masks: hotcoco against pycocotools, indices of other kinds, and the functions of DETR's evaluator."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets import coco_eval
from datasets.coco_api import index_coco, load_coco_api
from datasets.coco_eval import CocoEvaluator, curves

BACKENDS = ("pycocotools", "hotcoco")
HEIGHT, WIDTH = 60, 80


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


def run(truth, results, iou_types=("bbox",), backend="auto", change=None):
    evaluator = CocoEvaluator(truth, iou_types, backend)
    if change:
        change(evaluator.coco_eval)
    for image_id, result in results.items():
        evaluator.update({image_id: result})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.stats = evaluator.summarize()
    return evaluator


def numbers(truth, results, backend="auto"):
    return run(truth, results, backend=backend).stats["coco_eval_bbox"]


def blob(rng):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    y, x = rng.integers(0, 50, 2)
    mask[y : y + rng.integers(2, 40), x : x + rng.integers(2, 40)] = 1
    return mask


def random_scene(seed):
    """Random objects with crowds and empty images and categories, and detections with tied scores, with masks."""
    rng = np.random.default_rng(seed)
    images = [{"id": 3 * i + 1, "height": HEIGHT, "width": WIDTH} for i in range(25)]
    annotations, results = [], {}
    for image in images:
        masks = [blob(rng) for _ in range(rng.integers(0, 8) * (rng.random() < 0.85))]
        labels = rng.choice([1, 3, 7], len(masks))
        for mask, label in zip(masks, labels, strict=True):
            code = mask_api.encode(np.asfortranarray(mask))
            box = [float(side) for side in mask_api.toBbox(code)]
            crowd = {"iscrowd": int(rng.random() < 0.15), "area": float(mask.sum())}
            record = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": int(label), "bbox": box}
            annotations.append(record | crowd | {"segmentation": {**code, "counts": code["counts"].decode()}})
        picked = rng.integers(0, 99, 20) % len(masks) if masks else []
        guesses = [np.roll(masks[k], rng.integers(-2, 3, 2), (0, 1)) for k in picked]
        guesses += [blob(rng) for _ in range(5 if rng.random() < 0.8 else 0)]
        right = np.append(labels[picked] if masks else [], np.full(len(guesses) - len(picked), 12)).astype(int)
        other = rng.choice([1, 3, 9], len(right))
        if guesses:
            stack = torch.from_numpy(np.stack(guesses))
            boxes = mask_api.toBbox(mask_api.encode(np.asfortranarray(stack.permute(1, 2, 0).numpy())))
            boxes[:, 2:] += boxes[:, :2]
            results[image["id"]] = {
                "scores": torch.from_numpy(rng.integers(0, 8, len(guesses)) / 8), "boxes": torch.from_numpy(boxes),
                "labels": torch.from_numpy(np.where(rng.random(len(right)) < 0.8, right, other)),
                "masks": stack[:, None],
            }  # fmt: skip
        else:
            results[image["id"]] = {}
    categories = [{"id": i, "name": str(i)} for i in (1, 3, 7, 9)]  # 9 has no object; detections have an unknown 12
    return index_coco({"images": images, "annotations": annotations, "categories": categories}), results


@pytest.mark.parametrize("seed", range(4))
def test_hotcoco_on_random_scenes_equals_pycocotools(seed, capfd):
    truth, results = random_scene(seed)
    expected, found = (run(truth, results, ("bbox", "segm"), backend) for backend in BACKENDS)
    assert expected.stats == found.stats and 0.05 < found.stats["coco_eval_bbox"][0] < 0.9
    for iou_type in ("bbox", "segm"):
        for name in ("precision", "recall", "scores"):
            arrays = [evaluator.coco_eval[iou_type].eval[name] for evaluator in (expected, found)]
            assert np.array_equal(*arrays), (iou_type, name)
    assert not capfd.readouterr().err  # hotcoco warns of categories that are not in the ground truth


def test_ap_of_the_ground_truth_is_one(truth):
    assert numbers(truth, detections(truth))[0] == pytest.approx(1)
    assert numbers(truth, detections(truth, shift=4))[0] < 0.8


@pytest.mark.parametrize("backend", BACKENDS)
def test_summarize_prints_the_twelve_numbers(truth, caplog, backend):
    caplog.set_level("INFO", logger="detr")
    numbers(truth, detections(truth), backend)
    lines = caplog.messages[-1].splitlines()
    assert lines[0] == "IoU metric: bbox" and len(lines) == 13
    assert lines[1].strip().startswith("Average Precision") and lines[1].endswith("= 1.000")


def test_order_and_repetition_of_images_do_not_change_ap(truth):
    results = detections(truth, shift=3)
    evaluator = CocoEvaluator(truth, ["bbox"])
    evaluator.update(dict(reversed(results.items())))
    evaluator.update(results)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    assert evaluator.summarize()["coco_eval_bbox"] == numbers(truth, results)
    assert len(evaluator.predictions()) == sum(len(r["labels"]) for r in results.values())


def test_ap_counts_only_images_that_were_seen(truth):
    assert numbers(truth, detections(truth, drop=(11, 14)))[0] == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ap_without_detections_is_zero(truth, backend):
    assert numbers(truth, {11: {}}, backend)[0] == 0
    assert run(truth, {11: {}}, ["bbox"], backend).coco_eval["bbox"].eval["precision"].shape == (10, 101, 2, 4, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ap_without_annotated_objects_is_minus_one_with_a_warning(truth, caplog, backend):
    assert numbers(truth, {13: {}}, backend)[0] == -1
    assert "AP (bbox) is -1: the 1 evaluated images have no annotated object" in caplog.text


def test_evaluator_with_detections_of_unknown_images_raises(truth):
    with pytest.raises(ValueError, match=r"lacks: ids \[77\]"):
        numbers(truth, {77: {}})


class OwnIndex:
    """An index like those of other projects: its methods say what the ids are, its `dataset` does not."""

    def __init__(self, truth):
        self.truth, self.imgs, self.cats, self.dataset = truth, truth.imgs, {"cat": {"id": "cat"}}, {"categories": []}

    def getImgIds(self):
        return range(11, 15)

    def getCatIds(self):
        return [1, 3]

    def getAnnIds(self, imgIds=(), catIds=()):
        return [a["id"] for a in self.truth.anns.values() if a["image_id"] in imgIds and a["category_id"] in catIds]

    def loadAnns(self, ids):
        return [self.truth.anns[i] for i in ids]


class IndexWithoutMethods:
    def __init__(self, truth):
        self.imgs, self.cats, self.anns = truth.imgs, truth.cats, truth.anns


@pytest.mark.parametrize("kind", [OwnIndex, IndexWithoutMethods])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ap_with_an_own_index_is_that_of_its_methods(truth, kind, backend):
    results = detections(truth, shift=2)
    assert numbers(kind(truth), results, backend) == numbers(truth, results, "pycocotools")


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_ids_beyond_the_precision_of_floats_are_kept_apart(backend):
    images = [{"id": 2**53 + i} for i in range(3)]
    annotations = [
        {"id": i + 1, "image_id": 2**53 + i, "category_id": 1, "bbox": [9 * i, 0, 8, 8], "area": 64, "iscrowd": 0}
        for i in range(3)
    ]
    truth = index_coco({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]})
    evaluator = run(truth, detections(truth), ["bbox"], backend)
    assert evaluator.stats["coco_eval_bbox"][0] == pytest.approx(1)
    assert [r["image_id"] for r in evaluator.predictions()[::2]] == [2**53, 2**53 + 1, 2**53 + 2]


@pytest.mark.filterwarnings("ignore:hotcoco. iou_thrs differ")
@pytest.mark.parametrize("backend", BACKENDS)
def test_params_set_before_accumulate_are_used(truth, backend):
    def change(evaluations):
        evaluations["bbox"].params.iouThrs = np.array([0.5])
        evaluations["bbox"].params.catIds = [3]

    evaluator = CocoEvaluator(truth, ["bbox"], backend)
    change(evaluator.coco_eval)
    evaluator.update(detections(truth))
    evaluator.accumulate()
    assert evaluator.coco_eval["bbox"].eval["precision"].shape == (1, 101, 1, 4, 3)


def test_save_predictions_writes_cocos_format(truth, tmp_path):
    evaluator = CocoEvaluator(truth, ["bbox"])
    evaluator.update(detections(truth))
    evaluator.save_predictions(tmp_path)
    rows = json.loads((tmp_path / "predictions_bbox.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == set(rows[0])
    assert rows[1]["bbox"] == pytest.approx([4, 4, 20, 30])
    assert isinstance(truth.loadRes(str(tmp_path / "predictions_bbox.json")), COCO)


def test_curves_load_with_weights_only(truth, tmp_path):
    evaluator = run(truth, detections(truth))
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
    results = {}
    for image_id in truth.imgs:
        objects = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
        masks = torch.tensor([truth.annToMask(a).tolist() for a in objects]).view(len(objects), 1, 48, 64)
        result = {
            "boxes": torch.zeros(len(objects), 4), "scores": torch.ones(len(objects)),
            "labels": torch.tensor([a["category_id"] for a in objects]), "masks": 0.1 + 0.8 * masks,
        }  # fmt: skip
        results[image_id] = result if objects else {}
    assert run(truth, results, ["segm"]).stats["coco_eval_masks"][0] == pytest.approx(1)


def test_an_image_with_an_empty_result_counts_as_missed(truth):
    results = detections(truth)
    whole = numbers(truth, results)
    results[11] = {}
    assert numbers(truth, results)[0] < whole[0]


def test_evaluator_with_unknown_kind_or_backend_raises(truth):
    with pytest.raises(ValueError, match="keypoints"):
        CocoEvaluator(truth, ["bbox", "keypoints"])
    with pytest.raises(ValueError, match="'slow'.*auto, hotcoco, pycocotools"):
        CocoEvaluator(truth, ["bbox"], "slow")


def test_prepare_gives_cocos_result_records(truth):
    evaluator = CocoEvaluator(truth, ["bbox"])
    masks = torch.zeros(1, 1, 6, 8)
    masks[:, :, 2:4] = 1
    result = {"scores": torch.tensor([0.5]), "labels": torch.tensor([3]), "boxes": torch.tensor([[1.0, 2, 4, 8]])}
    result |= {"masks": masks, "keypoints": torch.tensor([[[5.0, 6, 1]]])}
    record = {"image_id": 7, "category_id": 3, "score": 0.5}
    assert evaluator.prepare({7: result}, "bbox") == [record | {"bbox": [1, 2, 3, 6]}]
    assert evaluator.prepare_for_coco_keypoint({7: result}) == [record | {"keypoints": [5, 6, 1]}]
    code = evaluator.prepare_for_coco_segmentation({7: result, 8: {}})[0]["segmentation"]
    assert np.array_equal(mask_api.decode(code), masks[0, 0].numpy())


def test_functions_of_the_old_evaluator_give_the_same_ap(truth):
    results = detections(truth, shift=3)
    expected = run(truth, results, ["bbox"], "pycocotools")
    found = truth.loadRes(CocoEvaluator(truth, ["bbox"]).prepare(results, "bbox"))
    parts = []
    for image_id in (11, *reversed(truth.getImgIds())):
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = [image_id]
        parts.append(coco_eval.evaluate(evaluation))
    whole = COCOeval(truth, found, "bbox")
    matches = np.concatenate([m for _, m in parts], axis=2)
    coco_eval.create_common_coco_eval(whole, [i for ids, _ in parts for i in ids], matches)
    whole.accumulate()
    assert np.array_equal(whole.eval["precision"], expected.coco_eval["bbox"].eval["precision"])


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize(("limit", "expected"), [(100, 0.663), (200, 1.0)])
def test_limit_of_detections_decides_how_many_of_150_objects_count(backend, limit, expected):
    boxes = [[k % 15 * 8, k // 15 * 9, 6, 7] for k in range(150)]
    annotations = [{"image_id": 5, "category_id": 1, "bbox": box, "area": 42, "iscrowd": 0} for box in boxes]
    content = {"images": [{"id": 5}], "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes])
    evaluator = CocoEvaluator(index_coco(content), ["bbox"], backend)
    evaluator.set_max_detections(limit)
    evaluator.update({5: {"scores": torch.rand(150), "labels": torch.ones(150, dtype=torch.int64), "boxes": corners}})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    assert evaluator.summarize()["coco_eval_bbox"][:2] == pytest.approx([expected, expected], abs=1e-3)


def test_images_with_more_objects_than_ap_counts_are_named(caplog):
    boxes = [[k % 15 * 8, k // 15 * 9, 6, 7] for k in range(101)]
    annotations = [{"image_id": 5, "category_id": 1, "bbox": box, "area": 42, "iscrowd": 0} for box in boxes]
    content = {"images": [{"id": 5}], "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    numbers(index_coco(content), {5: {}})
    assert "1 images have more than 100 objects" in caplog.text
    content["annotations"] = annotations[:100]
    caplog.clear()
    numbers(index_coco(content), {5: {}})
    assert "more than 100 objects" not in caplog.text


@pytest.mark.parametrize("backend", ["auto", "pycocotools"])
def test_evaluation_curves_can_be_saved_as_in_the_original(backend, tmp_path):
    truth = {
        "images": [{"id": 1}], "categories": [{"id": 1}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}],
    }  # fmt: skip
    evaluator = CocoEvaluator(index_coco(truth), ["bbox"], backend)
    box = {"scores": torch.tensor([0.9]), "labels": torch.tensor([1]), "boxes": torch.tensor([[0.0, 0, 9, 9]])}
    evaluator.update({1: box})
    evaluator.accumulate()
    torch.save(evaluator.coco_eval["bbox"].eval, tmp_path / "eval.pth")
    loaded = torch.load(tmp_path / "eval.pth", weights_only=False)
    assert loaded["precision"].shape == (10, 101, 1, 4, 3) and len(loaded["params"].iouThrs) == 10
