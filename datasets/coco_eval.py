"""COCO's average precision, over several processes: each collects detections, the main one computes."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from datasets.coco_backends import ground_truth, pick_backend, renumber
from datasets.json_file import write_json
from datasets.masks import encode_masks
from util.checkpoint import save_checkpoint
from util.dist import all_gather, gather_to_main, is_main_process
from util.logger import logger

LOG_NAMES = {"bbox": "coco_eval_bbox", "segm": "coco_eval_masks"}
ENTRIES = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # names in COCO's result format


class CocoEvaluator:
    """Collects detections with `update`, then gives COCO's twelve numbers for each of `iou_types` (bbox, segm).

    `coco_gt` is pycocotools' COCO or an index like it (see `ground_truth`); None on processes other than the main one.
    An image counts once however often it was seen, and only seen images count. `backend` is "hotcoco", "pycocotools"
    (the same numbers) or "auto": hotcoco where it is installed.

    `coco_eval[iou_type].params` may be changed before `accumulate`; `.eval` holds the precision curves after it, and
    `.stats` the numbers after `summarize`. On other processes `coco_eval` is empty.
    """

    def __init__(self, coco_gt, iou_types: Iterable[str], backend: str = "auto"):
        self.coco_gt, self.iou_types = coco_gt, list(iou_types)
        unknown = sorted(set(self.iou_types) - LOG_NAMES.keys())
        if unknown:
            raise ValueError(f"no AP of {', '.join(unknown)} here: choose from bbox and segm")
        self.results: dict[int, dict[str, np.ndarray]] = {}  # by image id
        self.coco_eval: dict = {}
        if coco_gt is not None:
            self._backend = pick_backend(backend)
            truth = ground_truth(coco_gt, "segm" in self.iou_types)
            self._numbers = renumber(truth)  # of each image id: the id in `coco_eval`
            self._objects = Counter(record["image_id"] for record in truth["annotations"])
            self._category_ids = [category["id"] for category in truth["categories"]]
            self._truth = self._backend.index(truth)
            for iou_type in self.iou_types:
                nothing = self._backend.detections(self._truth, np.zeros((0, 7)), [])
                self.coco_eval[iou_type] = self._backend.evaluation(self._truth, nothing, iou_type)

    def set_max_detections(self, number: int) -> None:
        """Count so many detections of an image, the best ones; COCO's protocol, and the default, is 100."""
        for evaluation in self.coco_eval.values():
            evaluation.params.maxDets = [1, 10, number]

    def update(self, predictions: dict[int, dict[str, Tensor]], batch=None) -> None:
        """Add results by image id, as the post-processors give them (`batch` is not used).

        A result holds `scores` [Q], `labels` [Q], `boxes` [Q, 4] (x0 y0 x1 y1 in pixels) and, for segm, `masks`
        [Q, 1, H, W], binary or probabilities. An empty result is one without detections.
        """
        for image_id, result in predictions.items():
            arrays = _as_arrays(result, "segm" in self.iou_types)
            if not (np.isfinite(arrays["bbox"]).all() and np.isfinite(arrays["scores"]).all()):
                raise ValueError(f"image {image_id}: boxes or scores that are not finite: has the model diverged?")
            self.results[int(image_id)] = arrays

    def synchronize_between_processes(self) -> None:
        """Bring every process's results to the main one, in the order of the image ids."""
        gathered = gather_to_main(self.results)
        merged = {image_id: result for part in gathered or [] for image_id, result in part.items()}
        self.results = dict(sorted(merged.items()))

    def accumulate(self) -> None:
        """Match detections with objects and compute the precision curves, on the main process.

        Raises ValueError for results of images that the ground truth does not have.
        """
        if not self.results or not self.coco_eval:
            return
        strange = sorted(self.results.keys() - self._numbers.keys())
        if strange:
            raise ValueError(f"detections of images that the ground truth (base_ds) lacks: ids {strange[:5]}")
        labels = {label for result in self.results.values() for label in result["labels"].tolist()}
        if labels and not labels & set(self._category_ids):
            logger.warning(
                f"no detection is of an evaluated category: they have the ids {sorted(labels)[:5]}, "
                f"the ground truth has {sorted(self._category_ids)[:5]}"
            )
        for iou_type in self.iou_types:
            found = self._backend.detections(self._truth, *self._rows(iou_type))
            evaluation = self._backend.evaluation(self._truth, found, iou_type)
            evaluation.params = self.coco_eval[iou_type].params
            evaluation.params.imgIds = [self._numbers[image_id] for image_id in self.results]
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation.evaluate()
                evaluation.accumulate()
            self.coco_eval[iou_type] = evaluation

    def summarize(self) -> dict[str, list[float]]:
        """Print the twelve numbers of each kind, and return them by their names in the log (main process only)."""
        stats = {}
        for iou_type, evaluation in self.coco_eval.items():
            if not self.results:
                continue
            with contextlib.redirect_stdout(io.StringIO()) as table:
                self._backend.summarize(evaluation)
            logger.info(f"IoU metric: {iou_type}\n{table.getvalue().rstrip()}")
            stats[LOG_NAMES[iou_type]] = [float(number) for number in evaluation.stats[:12]]
            if evaluation.stats[0] == -1:
                logger.warning(
                    f"AP ({iou_type}) is -1: the {len(self.results)} evaluated images have no annotated object of "
                    "the evaluated categories (crowds do not count)"
                )
            limit = max(evaluation.params.maxDets)
            crowded = [image_id for image_id, number in self._numbers.items() if self._objects[number] > limit]
            if crowded:
                logger.warning(
                    f"{len(crowded)} images have more than {limit} objects, but AP counts only the {limit} best "
                    f"detections of an image (--eval_max_dets raises that limit): images {crowded[:5]}"
                )
        return stats

    def predictions(self, iou_type: str = "bbox") -> list[dict]:
        """Return the detections in COCO's result format: boxes as (x, y, width, height), masks as run-length codes."""
        return _records(self.results, iou_type)

    def save_predictions(self, folder: str | Path) -> None:
        """Write `predictions_bbox.json` (and `_segm`) in COCO's result format, for other tools."""
        for iou_type in self.iou_types:
            write_json(Path(folder) / f"predictions_{iou_type}.json", self.predictions(iou_type))

    def prepare(self, predictions: dict[int, dict[str, Tensor]], iou_type: str) -> list[dict]:
        """Convert results, as `update` takes them, to COCO's result format."""
        results = {int(i): _as_arrays(r, iou_type == "segm", iou_type == "keypoints") for i, r in predictions.items()}
        return _records(results, iou_type)

    def prepare_for_coco_detection(self, predictions: dict[int, dict[str, Tensor]]) -> list[dict]:
        """Convert boxes to COCO's result format."""
        return self.prepare(predictions, "bbox")

    def prepare_for_coco_segmentation(self, predictions: dict[int, dict[str, Tensor]]) -> list[dict]:
        """Convert masks to COCO's result format."""
        return self.prepare(predictions, "segm")

    def prepare_for_coco_keypoint(self, predictions: dict[int, dict[str, Tensor]]) -> list[dict]:
        """Convert `keypoints` [Q, K, 3] to COCO's result format."""
        return self.prepare(predictions, "keypoints")

    def _rows(self, iou_type: str) -> tuple[np.ndarray, list[dict]]:
        """Return detections as rows (image id, x, y, w, h, score, category id), and masks as run-length codes.

        Categories that are not evaluated are left out: they cannot match, and would only cause warnings.
        """
        rows, codes = [np.zeros((0, 7))], []
        for image_id, result in self.results.items():
            known = np.isin(result["labels"], self._category_ids)
            columns = (np.full(len(known), self._numbers[image_id]), result["bbox"], result["scores"], result["labels"])
            rows.append(np.column_stack(columns).astype(np.float64)[known])
            if iou_type == "segm":
                codes += result["segm"][known].tolist()
        return np.concatenate(rows), codes


def _as_arrays(result: dict[str, Tensor], masks: bool, keypoints: bool = False) -> dict[str, np.ndarray]:
    """Convert the result of one image to arrays by COCO's names."""
    if not result:
        result = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        result |= {"masks": torch.zeros(0, 1, 1, 1), "keypoints": torch.zeros(0, 1, 3)}
    arrays = {
        "bbox": convert_to_xywh(result["boxes"].detach().float().cpu()).numpy(),
        "scores": result["scores"].detach().float().cpu().numpy(),
        "labels": result["labels"].cpu().numpy(),
    }
    if masks:
        arrays["segm"] = np.array(encode_masks(result["masks"][:, 0] > 0.5), dtype=object)
    if keypoints:
        arrays["keypoints"] = result["keypoints"].detach().float().cpu().flatten(1).numpy()
    return arrays


def _records(results: dict[int, dict[str, np.ndarray]], iou_type: str) -> list[dict]:
    """Return detections in COCO's result format."""
    return [
        {"image_id": image_id, "category_id": label, ENTRIES[iou_type]: value, "score": score}
        for image_id, result in results.items()
        for label, value, score in zip(
            result["labels"].tolist(), result[iou_type].tolist(), result["scores"].tolist(), strict=True
        )
    ]


def convert_to_xywh(boxes: Tensor) -> Tensor:
    """Convert boxes [N, 4] from corners to (x, y, width, height)."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def curves(evaluation) -> dict:
    """Return the precision curves of an evaluation, as tensors and numbers that load with `weights_only=True`."""
    result, params = evaluation.eval, evaluation.params
    return {
        **{name: torch.as_tensor(np.asarray(result[name])) for name in ("precision", "recall", "scores")},
        "iou_thresholds": torch.as_tensor(np.asarray(params.iouThrs)),
        "recall_thresholds": torch.as_tensor(np.asarray(params.recThrs)),
        "category_ids": [int(i) for i in params.catIds],
        "area_labels": list(params.areaRngLbl),
        "max_detections": [int(n) for n in params.maxDets],
    }


def write_evaluation(evaluator: CocoEvaluator | None, output_dir: str, *names: str) -> None:
    """Write the predictions, and the precision curves under each of `names` in `output_dir` (main process only)."""
    if output_dir and is_main_process() and evaluator and "bbox" in evaluator.coco_eval:
        evaluator.save_predictions(output_dir)
        files = [Path(output_dir) / name for name in names]
        files[0].parent.mkdir(exist_ok=True)
        save_checkpoint(curves(evaluator.coco_eval["bbox"]), *files)


# Functions of DETR's own evaluator, for code that imports them. They work on pycocotools' COCOeval.


def evaluate(self: COCOeval) -> tuple[list[int], np.ndarray]:
    """Match detections with objects; return the image ids and the matches [categories, areas, images]."""
    with contextlib.redirect_stdout(io.StringIO()):
        self.evaluate()
    image_ids = self.params.imgIds
    return image_ids, np.asarray(self.evalImgs).reshape(-1, len(self.params.areaRng), len(image_ids))


def merge(img_ids: Iterable[int], eval_imgs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join the results of `evaluate` from all processes; an image counts once."""
    ids = np.concatenate([np.asarray(part) for part in all_gather(list(img_ids))])
    matches = np.concatenate(all_gather(eval_imgs), axis=2)
    ids, first = np.unique(ids, return_index=True)
    return ids, matches[..., first]


def create_common_coco_eval(coco_eval: COCOeval, img_ids: Iterable[int], eval_imgs: np.ndarray) -> None:
    """Give a COCOeval the matches of all processes, ready for its `accumulate`."""
    ids, matches = merge(img_ids, eval_imgs)
    coco_eval.evalImgs, coco_eval.params.imgIds = list(matches.ravel()), list(ids)
    coco_eval._paramsEval = coco_eval.params
