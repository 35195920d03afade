"""Panoptic quality over many processes: each judges its own images, the main one adds up."""

import importlib.util
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from datasets.coco_index import read_json
from datasets.masks import check_segment_ids, read_segment_ids
from util.dist import gather_to_main, is_main_process
from util.logger import logger

GROUPS = {"All": (True, False), "Things": (True,), "Stuff": (False,)}  # by `isthing`
Tally = dict[int, np.ndarray]  # for each class: sum of IoU, true positives, false positives, false negatives


class PanopticEvaluator:
    """Collects panoptic maps with `update`, then gives PQ, SQ and RQ (Kirillov et al. 2019) as COCO does.

    `ann_file` and `ann_folder` are the truth. With an `output_dir` the predictions stay there in COCO's
    format, the maps as PNGs and the rest in `predictions.json`, so that any other tool can judge them; None leaves
    nothing. An image counts once however often it was seen, and only seen images count.

    Where the official `panopticapi` is installed and has the files to read, it does the computing.
    """

    def __init__(self, ann_file: str | Path, ann_folder: str | Path, output_dir: str | Path | None = "panoptic_eval"):
        self.ann_file, self.ann_folder = Path(ann_file), Path(ann_folder)
        self.output_dir = Path(output_dir) if output_dir else None
        truth = read_json(ann_file)
        self.categories = {c["id"]: c for c in truth["categories"]}
        self.truth = {record["image_id"]: record for record in truth["annotations"]}
        if self.output_dir:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.predictions: dict[int, dict] = {}  # by image id
        self.tallies: dict[int, Tally] = {}

    def update(self, predictions: Iterable[dict]) -> None:
        """Add maps: `image_id`, `png_string` (the PNG's bytes), `segments_info`, and maybe the PNG's `file_name`.

        Raises ValueError for an image or a class that the true annotations do not have, and for a map whose ids are
        not those of its `segments_info`.
        """
        for prediction in predictions:
            image_id = int(prediction["image_id"])
            if image_id not in self.truth:
                raise ValueError(f"{self.ann_file}: no image {image_id}, but there is a prediction for it")
            record = {"image_id": image_id, "file_name": prediction.get("file_name") or f"{image_id:012d}.png"}
            record["segments_info"] = [dict(segment) for segment in prediction["segments_info"]]
            self.tallies[image_id] = self._judge(record, prediction["png_string"])
            self.predictions[image_id] = record
            if self.output_dir:
                (self.output_dir / record["file_name"]).write_bytes(prediction["png_string"])

    def synchronize_between_processes(self) -> None:
        """Bring every process's images to the main one."""
        gathered = gather_to_main((self.predictions, self.tallies)) or []
        self.predictions = dict(sorted(item for predictions, _ in gathered for item in predictions.items()))
        self.tallies = {image_id: tally for _, tallies in gathered for image_id, tally in tallies.items()}

    def summarize(self) -> dict | None:
        """Print the table and return it, on the main process; None on the others.

        `All`, `Things` and `Stuff` each hold `pq`, `sq`, `rq` in 0..1 and `n`, the number of classes that were there;
        `per_class` holds the first three by class id. `predictions.json` is written too.
        """
        if not is_main_process():
            return None
        if self.output_dir:
            content = {"annotations": list(self.predictions.values()), "categories": list(self.categories.values())}
            (self.output_dir / "predictions.json").write_text(json.dumps(content))
        unseen = len(self.truth) - len(self.predictions)
        if unseen:
            logger.warning(f"PQ is over {len(self.predictions)} images; {unseen} of {self.ann_file} were not predicted")
        official = self.output_dir and not unseen and importlib.util.find_spec("panopticapi")
        result = self._official() if official else panoptic_quality(self.tallies.values(), self.categories)
        logger.info("\n".join(_table(result)))
        return result

    def _official(self) -> dict:
        from panopticapi.evaluation import pq_compute

        files = str(self.ann_file), str(self.output_dir / "predictions.json")
        return pq_compute(*files, gt_folder=str(self.ann_folder), pred_folder=str(self.output_dir))

    def _judge(self, prediction: dict, png: bytes) -> Tally:
        record = self.truth[prediction["image_id"]]
        path, name = self.ann_folder / record["file_name"], f"prediction for image {prediction['image_id']}"
        true, found = read_segment_ids(path), read_segment_ids(io.BytesIO(png))
        if true.shape != found.shape:
            raise ValueError(f"{name}: a map of {found.shape} (height, width), but {path} is one of {true.shape}")
        unknown = {s["category_id"] for s in prediction["segments_info"]} - set(self.categories)
        if unknown:
            raise ValueError(f"{name}: classes {sorted(unknown)} are not among the categories of {self.ann_file}")
        check_segment_ids(str(path), *_ids(true, record))
        check_segment_ids(name, *_ids(found, prediction))
        return judge_image(true, found, record["segments_info"], prediction["segments_info"])


def _ids(painted: np.ndarray, record: dict) -> tuple[list[int], list[int]]:
    return np.unique(painted).tolist(), [segment["id"] for segment in record["segments_info"]]


def judge_image(true: np.ndarray, found: np.ndarray, truth: list[dict], prediction: list[dict]) -> Tally:
    """Compare two maps of ids [H, W] with their segments, and count for each class.

    Two segments of a class match when their IoU, without pixels that are void in the truth, is above 0.5; then nothing
    else can match either. A true crowd is neither found nor missed, and a prediction that lies for more than half on
    void, or on the crowd of its class, is not held against it.
    """
    tally: Tally = defaultdict(lambda: np.zeros(4))
    true_of, found_of = {s["id"]: s for s in truth}, {s["id"]: s for s in prediction}
    pairs, pixels = np.unique(true << 24 | found, return_counts=True)  # ids have 24 bits
    shared = {divmod(pair, 1 << 24): n for pair, n in zip(pairs.tolist(), pixels.tolist(), strict=True)}
    true_area, found_area = defaultdict(int), defaultdict(int)
    for (t, f), n in shared.items():
        true_area[t] += n
        found_area[f] += n

    matched = set()
    for (t, f), n in shared.items():
        if t in true_of and f in found_of and not true_of[t].get("iscrowd"):
            label = true_of[t]["category_id"]
            iou = n / (true_area[t] + found_area[f] - n - shared.get((0, f), 0))
            if label == found_of[f]["category_id"] and iou > 0.5:
                tally[label] += (iou, 1, 0, 0)
                matched |= {("true", t), ("found", f)}
    crowds = {s["category_id"]: s["id"] for s in truth if s.get("iscrowd")}
    for t, segment in true_of.items():
        if ("true", t) not in matched and not segment.get("iscrowd"):
            tally[segment["category_id"]] += (0, 0, 0, 1)
    for f, segment in found_of.items():
        if ("found", f) not in matched:
            label = segment["category_id"]
            excused = shared.get((0, f), 0) + shared.get((crowds.get(label), f), 0)
            if excused / found_area[f] <= 0.5:
                tally[label] += (0, 0, 1, 0)
    return dict(tally)


def panoptic_quality(tallies: Iterable[Tally], categories: dict[int, dict]) -> dict:
    """Add up images and return PQ, SQ and RQ of every class, and their means over groups of classes that were there."""
    total = {label: np.zeros(4) for label in categories}
    for tally in tallies:
        for label, numbers in tally.items():
            total[label] += numbers
    per_class = {}
    for label, (iou, hits, false, missed) in total.items():
        sq = float(iou / hits) if hits else 0.0
        rq = float(hits / (hits + false / 2 + missed / 2)) if hits else 0.0
        pq = float(iou / (hits + false / 2 + missed / 2)) if hits else 0.0
        per_class[label] = {"pq": pq, "sq": sq, "rq": rq}
    result: dict = {}
    for group, kinds in GROUPS.items():
        members = [
            label for label, c in categories.items() if bool(c.get("isthing")) in kinds and total[label][1:].any()
        ]
        means = {
            key: sum(per_class[label][key] for label in members) / max(len(members), 1) for key in ("pq", "sq", "rq")
        }
        result[group] = {**means, "n": len(members)}
    return result | {"per_class": per_class}


def _table(result: dict) -> list[str]:
    head = f"{'Panoptic quality':<16} |    PQ     SQ     RQ  classes"
    return [head] + [
        f"{group:<16} | " + " ".join(f"{100 * result[group][key]:6.1f}" for key in ("pq", "sq", "rq"))
        + f"  {result[group]['n']:7d}"
        for group in GROUPS
    ]  # fmt: skip
