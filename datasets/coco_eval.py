"""COCO's AP over many processes: each collects, the main one judges."""

import contextlib
import copy
import gc
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from datasets.masks import encode_masks
from util.box_ops import box_xyxy_to_cxcywh
from util.dist import gather_to_main
from util.logger import logger


class CocoEvaluator:
    """Collects detections with `update`, then gives COCO's twelve numbers for each of `iou_types`.

    `coco_gt` is a COCO, or anything with its `dataset`. An image counts once however often it was seen, and only seen
    images count. `backend` is "pycocotools", "faster" (faster-coco-eval: the same numbers, sooner) or "auto": faster
    where it is installed. After `summarize`, `coco_eval["bbox"].stats` holds the numbers; on processes other than the
    main one `coco_eval` stays empty.
    """

    def __init__(self, coco_gt, iou_types: Iterable[str], backend: str = "auto"):
        self.coco_gt = coco_gt
        self.iou_types = list(iou_types)
        unknown = sorted(set(self.iou_types) - {"bbox", "segm"})
        if unknown:
            raise ValueError(f"no AP of {', '.join(unknown)} here: choose from bbox and segm")
        self.backend = backend
        self.coco_eval: dict[str, COCOeval] = {}
        self.results: dict[int, dict[str, np.ndarray]] = {}  # by image id

    def update(self, predictions: dict[int, dict[str, Tensor]]) -> None:
        """Add results by image id, as the post-processors give them.

        That is `scores` [Q], `labels` [Q], `boxes` [Q, 4] (x0 y0 x1 y1 in pixels) and, for segm, `masks` [Q, 1, H, W],
        binary or probabilities. An empty result is one without detections.
        """
        nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        for image_id, result in predictions.items():
            result = result or nothing | {"masks": torch.zeros(0, 1, 1, 1)}
            boxes = result["boxes"].detach().float().cpu()
            boxes = box_xyxy_to_cxcywh(boxes)
            boxes[:, :2] -= boxes[:, 2:] / 2
            scores, labels = result["scores"].detach().float().cpu(), result["labels"].cpu()
            kept = {"bbox": boxes.numpy(), "scores": scores.numpy(), "labels": labels.numpy()}
            if "segm" in self.iou_types:
                kept["segm"] = np.array(encode_masks(result["masks"][:, 0] > 0.5), dtype=object)
            self.results[int(image_id)] = kept

    def synchronize_between_processes(self) -> None:
        """Bring every process's results to the main one, in the order of the image ids."""
        gathered = gather_to_main(self.results)
        merged = {image_id: result for part in gathered or [] for image_id, result in part.items()}
        self.results = dict(sorted(merged.items()))

    def accumulate(self) -> None:
        """Match detections with objects and build the precision curves."""
        if not self.results:
            return
        coco_class, eval_class = self._backend()
        with contextlib.redirect_stdout(io.StringIO()), _no_collection():
            truth = _coco(coco_class, self.coco_gt.dataset)
            for iou_type in self.iou_types:
                found = {**self.coco_gt.dataset, "annotations": self._annotations(iou_type)}
                evaluation = eval_class(truth, _coco(coco_class, found), iou_type)
                evaluation.print_function = print  # faster-coco-eval would log the table; pycocotools prints it
                evaluation.params.imgIds = list(self.results)
                evaluation.evaluate()
                evaluation.accumulate()
                self.coco_eval[iou_type] = evaluation

    def summarize(self) -> None:
        """Print the twelve numbers, on the main process."""
        for iou_type, evaluation in self.coco_eval.items():
            with contextlib.redirect_stdout(io.StringIO()) as table:
                evaluation.summarize()
            twelve = table.getvalue().splitlines()[:12]  # faster-coco-eval adds two of its own
            logger.info("\n".join([f"IoU metric: {iou_type}", *twelve]))

    def predictions(self, iou_type: str = "bbox") -> list[dict]:
        """Return the detections in COCO's result format: boxes as (x, y, width, height), masks as run-length codes."""
        entry = {"segm": "segmentation"}.get(iou_type, iou_type)
        return [
            {"image_id": image_id, "category_id": label, entry: value, "score": score}
            for image_id, result in self.results.items()
            for label, value, score in zip(
                result["labels"].tolist(), result[iou_type].tolist(), result["scores"].tolist(), strict=True
            )
        ]

    def save_predictions(self, folder: str | Path) -> None:
        """Write `predictions_bbox.json` (and `_segm`), COCO's result format, for any other tool to judge or draw."""
        for iou_type in self.iou_types:
            (Path(folder) / f"predictions_{iou_type}.json").write_text(json.dumps(self.predictions(iou_type)))

    def _annotations(self, iou_type: str) -> list[dict]:
        found = self.predictions(iou_type)
        if iou_type == "segm":
            areas = [float(mask_api.area(record["segmentation"])) for record in found]  # one by one: 256 are too many
        else:
            areas = [record["bbox"][2] * record["bbox"][3] for record in found]
        for i, (record, area) in enumerate(zip(found, areas, strict=True), start=1):
            record.update(id=i, iscrowd=0, area=area)
        return found

    def _backend(self) -> tuple[type, type]:
        installed = importlib.util.find_spec("faster_coco_eval") is not None
        if self.backend == "pycocotools" or (self.backend == "auto" and not installed):
            return COCO, COCOeval
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster

        return FasterCOCO, COCOeval_faster


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector from searching half a million small dicts, none of them garbage, again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _coco(coco_class: type, dataset: dict):
    coco = coco_class()
    coco.dataset = copy.copy(dataset)
    coco.createIndex()
    return coco


def curves(evaluation: COCOeval) -> dict:
    """Return what the precision curves are drawn from, as tensors and numbers that load with `weights_only=True`."""
    result, params = evaluation.eval, evaluation.params
    return {
        **{name: torch.as_tensor(np.asarray(result[name])) for name in ("precision", "recall", "scores")},
        "iou_thresholds": torch.as_tensor(np.asarray(params.iouThrs)),
        "recall_thresholds": torch.as_tensor(np.asarray(params.recThrs)),
        "category_ids": [int(i) for i in params.catIds],
        "area_labels": list(params.areaRngLbl),
        "max_detections": [int(n) for n in params.maxDets],
    }
