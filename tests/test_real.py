"""Real COCO images, where a folder of them is named: DETR_TEST_COCO, in COCO's layout."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset
from datasets.coco_eval import CocoEvaluator
from models import build_model
from tests.helpers import parse
from util.nested_tensor import collate_fn

ROOT = os.environ.get("DETR_TEST_COCO")
pytestmark = pytest.mark.skipif(not ROOT, reason="DETR_TEST_COCO names no folder of COCO images and annotations")


def build(part, flags=""):
    return build_dataset(part, parse(f"--coco_path {ROOT} {flags}"))


@pytest.mark.parametrize("part", ["train", "val"])
def test_items_hold_what_pycocotools_reads(part):
    dataset = build(part)
    dataset._transforms = None
    for i in range(0, len(dataset), 10):
        image, target = dataset[i]
        expected = np.asarray(Image.open(dataset.img_folder / str(dataset.index.file_names[i])).convert("RGB"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
        annotations = [a for a in dataset.coco.imgToAnns[dataset.ids[i]] if not a["iscrowd"]]
        x, y, w, h = np.reshape([a["bbox"] for a in annotations], (-1, 4)).T
        height, width = expected.shape[:2]
        corners = np.stack([x, y, x + w, y + h], 1).clip(0, [width, height, width, height])
        np.testing.assert_allclose(target["boxes"], corners, rtol=1e-5, atol=1e-3)
        assert target["labels"].tolist() == [a["category_id"] for a in annotations]
    assert dataset.num_classes == 91


def test_ground_truth_as_detections_scores_one():
    dataset = build("val")
    dataset._transforms = None
    evaluator = CocoEvaluator(dataset.coco, ["bbox"])
    for i, image_id in enumerate(dataset.ids):
        target = dataset[i][1]
        found = {name: target[name] for name in ("boxes", "labels")}
        evaluator.update({image_id: found | {"scores": torch.ones(len(target["labels"]))}})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.coco_eval["bbox"].stats[0] == pytest.approx(1, abs=1e-3)


def test_the_published_model_takes_a_training_step_at_a_quarter_of_the_size():
    flags = "--backbone resnet50 --hidden_dim 256 --nheads 8 --dim_feedforward 2048 --enc_layers 6 --dec_layers 6"
    model, criterion, _ = build_model(parse(f"{flags} --num_queries 100 --num_classes 91"))
    dataset = build("train", "--min_size 200 --max_size 333")
    samples, targets = collate_fn([dataset[0], dataset[1]])
    losses = criterion(model(samples), targets)
    loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
    loss.backward()
    assert torch.isfinite(loss) and len(criterion.weight_dict) == 18
