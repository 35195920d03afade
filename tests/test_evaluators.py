"""The tables that users extend with data and metrics of their own, and the number of classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

import datasets
from datasets import build_dataset, evaluators, get_coco_api_from_dataset
from datasets.evaluators import Batch, build_evaluators
from engine import evaluate
from models import build_model
from tests.helpers import parse
from util.nested_tensor import collate_fn


class Recall:
    """A metric in a few lines: the share of objects for which the model has a detection of the right class."""

    def __init__(self):
        self.found, self.objects = 0, 0

    def update(self, predictions, batch):
        for image_id, target in zip(batch.image_ids, batch.targets, strict=True):
            self.found += sum(label in predictions[image_id]["labels"] for label in target["labels"])
            self.objects += len(target["labels"])

    def synchronize_between_processes(self):
        pass

    def accumulate(self):
        self.recall = float(self.found / self.objects)

    def summarize(self):
        return {"my_recall": self.recall}


def test_metric_added_to_the_table_is_computed_by_evaluate(coco_root, monkeypatch):
    monkeypatch.setitem(evaluators.EVALUATORS, "recall", lambda *parts: Recall())
    args = parse(f"--coco_path {coco_root} --num_classes 4")
    data = build_dataset("val", args)
    model, criterion, post = build_model(args)
    with torch.no_grad():
        model.class_embed.bias[1] = 100  # every query finds a cat
    loader = DataLoader(Subset(data, [0, 1]), 2, collate_fn=collate_fn)
    base_ds = get_coco_api_from_dataset(loader.dataset)
    stats, evaluator = evaluate(model, criterion, post, loader, base_ds, torch.device("cpu"), "")
    assert stats["my_recall"] == pytest.approx(2 / 3) and len(stats["coco_eval_bbox"]) == 12
    assert set(evaluator.results) == {21, 22}


def test_evaluators_follow_the_postprocessors():
    assert list(build_evaluators({"bbox": 0}, None, None, "")) == ["coco", "detections"]
    assert build_evaluators({"bbox": 0, "segm": 0}, None, None, "")["coco"].iou_types == ["segm", "bbox"]


def test_batch_gives_ids_and_sizes_of_its_targets():
    sizes = {"orig_size": torch.tensor([4, 6]), "size": torch.tensor([8, 12])}
    batch = Batch({}, None, [{"image_id": torch.tensor([5]), **sizes}, {"image_id": torch.tensor([7]), **sizes}])
    assert batch.image_ids == [5, 7]
    assert batch.original_sizes.tolist() == [[4, 6]] * 2 and batch.sizes.tolist() == [[8, 12]] * 2


def test_dataset_added_to_the_table_is_built_by_its_function(monkeypatch):
    class Mine(Dataset):
        num_classes = 7

    def build(image_set, args):
        mine = Mine()
        mine.image_set, mine.args = image_set, args
        return mine

    monkeypatch.setitem(datasets.DATASETS, "mine", build)
    data = build_dataset("train", {"dataset_file": "mine", "root": "/data"})
    assert data.image_set == "train" and data.args.root == "/data"
    assert data.args.max_size == 1333 and data.args.image_dtype == "float32"


def test_panoptic_quality_is_logged_by_group():
    result = {"All": {"pq": 0.1}, "Things": {"pq": 0.2}, "Stuff": {"pq": 0.3}, "per_class": {}}
    quality = evaluators.PanopticQuality(None, SimpleNamespace(summarize=lambda: result))
    assert quality.summarize() == {"PQ_all": {"pq": 0.1}, "PQ_th": {"pq": 0.2}, "PQ_st": {"pq": 0.3}}
    assert evaluators.PanopticQuality(None, SimpleNamespace(summarize=lambda: None)).summarize() == {}


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_examples_are_the_pixels_with_annotated_and_detected_boxes(coco_root, dtype, tmp_path):
    data = build_dataset("val", parse(f"--coco_path {coco_root} --image_dtype {dtype} --min_size 48 --max_size 64"))
    samples, targets = next(iter(DataLoader(data, 3, collate_fn=collate_fn)))
    assert "examples" not in build_evaluators({"bbox": 0}, DataLoader(data), None, str(tmp_path))
    (tmp_path / "tensorboard").mkdir()
    drawn = build_evaluators({"bbox": 0}, DataLoader(data), None, str(tmp_path))["examples"]
    batch = Batch({}, samples, targets)
    box = torch.tensor([[16.0, 12.0, 48.0, 36.0], [0, 0, 5, 5]])  # the second has a low score
    found = {"boxes": box, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.2])}
    drawn.update(dict.fromkeys(batch.image_ids, found), batch)
    assert drawn.summarize() == {}
    picture = np.asarray(Image.open(tmp_path / "tensorboard/examples.png")).astype(int)
    assert picture.shape == (2 * 300, 3 * 404, 3)
    yellow = (picture[300:600, :400] == [255, 255, 0]).all(-1)
    rows, columns = np.nonzero(yellow)
    assert abs(rows.min() - 75) < 3 and abs(rows.max() - 225) < 5  # within the border's width
    assert abs(columns.min() - 100) < 3 and abs(columns.max() - 300) < 5
    image = np.asarray(Image.open(coco_root / "val2017/000000000021.jpg").resize((400, 300), Image.Resampling.BILINEAR))
    inside = (slice(10, 60), slice(330, 390))
    assert np.abs(picture[300:600, :400][inside] - image[inside]).mean() < 3
