"""Numbers for each class, from an evaluation by hotcoco or pycocotools: AP, recall, the best score threshold."""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from util.logger import logger
from util.text import printable


@dataclass
class ClassRow:
    """A class's row of the table. AP and AR are means over IoU 0.5 to 0.95; NaN for a class without objects.

    `threshold` is the score from which on detections give the highest F1 at IoU 0.5; `f1`, `precision` and `recall`
    are those at it.
    """

    category_id: int
    name: str
    objects: int
    ap: float
    ap50: float
    ar: float
    threshold: float
    f1: float
    precision: float
    recall: float


@dataclass
class ScoreCurve:
    """Precision, recall and F1 at IoU 0.5 of the detections that score at least `scores`, which descend: each [N]."""

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    objects: int

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of precision and recall."""
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)

    def best(self) -> dict[str, float]:
        """Return `threshold`, `f1`, `precision` and `recall` where F1 is highest; without detections, zeros."""
        if not len(self.scores):
            return {"threshold": 0.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}
        k = int(self.f1.argmax())
        names = ("threshold", "f1", "precision", "recall")
        columns = (self.scores, self.f1, self.precision, self.recall)
        return {name: float(column[k]) for name, column in zip(names, columns, strict=True)}


def score_curves(evaluation) -> tuple[dict[int, ScoreCurve], ScoreCurve]:
    """Return the curve of each category id, and that of all detections together; `evaluate` has been called."""
    limits = list(evaluation.params.areaRng[0])  # objects of all sizes
    parts: dict[int, list] = {int(label): [] for label in evaluation.params.catIds}
    for match in evaluation.evalImgs:
        if match is not None and list(match["aRng"]) == limits:
            counted = ~np.asarray(match["dtIgnore"], bool)[0]
            scores, hit = np.asarray(match["dtScores"]), np.asarray(match["dtMatches"])[0] > 0
            objects = int((~np.asarray(match["gtIgnore"], bool)).sum())
            parts[int(match["category_id"])].append((scores[counted], hit[counted], objects))
    together = [part for matches in parts.values() for part in matches]
    return {label: _curve(matches) for label, matches in parts.items()}, _curve(together)


def _curve(matches: list[tuple]) -> ScoreCurve:
    scores = np.concatenate([np.zeros(0), *(scores for scores, _, _ in matches)])
    hit = np.concatenate([np.zeros(0, bool), *(hit for _, hit, _ in matches)])
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(hit[order])
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # equal scores pass a threshold together
    count = np.arange(1, len(scores) + 1)
    objects = sum(objects for _, _, objects in matches)
    return ScoreCurve(scores[last], (found / count)[last], (found / max(objects, 1))[last], objects)


def class_rows(evaluation) -> list[ClassRow]:
    """Return the classes, the one with the highest AP first; `accumulate` has been called."""
    precision, recall = np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])
    curves, rows = score_curves(evaluation)[0], []
    for k, label in enumerate(map(int, evaluation.params.catIds)):
        name = str(evaluation.cocoGt.cats[label]["name"])
        numbers = (precision[:, :, k, 0, -1], precision[0, :, k, 0, -1], recall[:, k, 0, -1])
        rows.append(ClassRow(label, name, curves[label].objects, *map(_mean, numbers), **curves[label].best()))
    return sorted(rows, key=lambda row: (-np.nan_to_num(row.ap, nan=-1), row.category_id))


def _mean(values: np.ndarray) -> float:
    counted = values[values > -1]  # -1 stands for classes without objects
    return float(counted.mean()) if counted.size else float("nan")


def write_classes(evaluator, folder: str | Path) -> None:
    """Log the table of the classes of a CocoEvaluator; write `classes_bbox.csv` (and `_segm`) where there is a folder.

    Processes other than the main one have nothing to write.
    """
    if evaluator is None or not evaluator.results:
        return
    for iou_type, evaluation in evaluator.coco_eval.items():
        rows = class_rows(evaluation)
        logger.info(f"Classes ({iou_type})\n{table(rows)}")
        if folder:
            write_rows(Path(folder) / f"classes_{iou_type}.csv", [asdict(row) for row in rows])


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[ClassRow]) -> str:
    """Lay the rows out for a terminal."""
    width = max(5, *(len(printable(row.name)) for row in rows)) if rows else 5
    lines = [f"{'class':{width}}  objects     AP   AP50     AR  best threshold     F1"]
    for row in rows:
        numbers = (
            f"{row.objects:7}  {row.ap:5.3f}  {row.ap50:5.3f}  {row.ar:5.3f}  {row.threshold:14.3f}  {row.f1:5.3f}"
        )
        lines.append(f"{printable(row.name):{width}}  {numbers}")
    return "\n".join(lines)
