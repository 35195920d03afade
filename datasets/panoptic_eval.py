"""Panoptic quality, over several processes: each collects maps, the main one computes."""

import importlib.util
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from datasets.files import leads_outside
from datasets.json_file import read_json, report, write_json
from datasets.masks import check_segment_ids, read_segment_ids
from util.dist import gather_to_main, is_main_process
from util.logger import logger

GROUPS = ("All", "Things", "Stuff")


def check_pq_package() -> None:
    """Raise ValueError if the package that computes PQ is not installed."""
    if importlib.util.find_spec("hotcoco") is None:
        raise ValueError("panoptic quality is computed by the package hotcoco: pip install hotcoco")


class PanopticEvaluator:
    """Collects panoptic maps with `update`, then gives PQ, SQ and RQ (Kirillov et al. 2019), computed by hotcoco.

    `ann_file` and `ann_folder` are the ground truth. The predictions are written to `output_dir` in COCO's format, the
    maps as PNGs (`000000000042.png` for image 42) and `predictions.json`; None writes nothing. Where several processes
    evaluate, all must see that folder. An image counts once however often it was seen, and only seen images count.
    Maps of the ground truth that lie outside `ann_folder` are read only with `allow_outside`.
    """

    def __init__(
        self,
        ann_file: str | Path,
        ann_folder: str | Path,
        output_dir: str | Path | None = "panoptic_eval",
        allow_outside: bool = False,
    ):
        self.ann_file, self.ann_folder = Path(ann_file), Path(ann_folder)
        self.output_dir = Path(output_dir) if output_dir else None
        check_pq_package()
        content = read_json(ann_file)
        self.categories = content["categories"]
        self.truth = {record["image_id"]: record for record in content["annotations"]}
        outside = [record["file_name"] for record in self.truth.values() if leads_outside(record["file_name"])]
        report(ann_file, [(f"panoptic maps outside {ann_folder}", [] if allow_outside else outside)])
        if self.output_dir:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.predictions: dict[int, dict] = {}  # by image id
        self.maps: dict[int, bytes] = {}  # PNGs by image id, where there is no folder to keep them in

    def update(self, predictions: Iterable[dict]) -> None:
        """Add maps: `image_id`, `png_string` (the PNG's bytes) and `segments_info`.

        Raises ValueError for an image or a class that the ground truth does not have, and for a map whose ids are not
        those of its `segments_info`.
        """
        for prediction in predictions:
            image_id, png = int(prediction["image_id"]), prediction["png_string"]
            if image_id not in self.truth:
                raise ValueError(f"{self.ann_file}: no image {image_id}, but there is a prediction for it")
            # The name does not come from the prediction: data must not decide where a file is written.
            record = {"image_id": image_id, "file_name": f"{image_id:012d}.png"}
            record["segments_info"] = [dict(segment) for segment in prediction["segments_info"]]
            self._check(record, png)
            self.predictions[image_id] = record
            if self.output_dir:
                (self.output_dir / record["file_name"]).write_bytes(png)
            else:
                self.maps[image_id] = png

    def synchronize_between_processes(self) -> None:
        """Bring every process's images to the main one, in the order of the image ids."""
        gathered = gather_to_main((self.predictions, self.maps)) or []
        self.predictions = dict(sorted(item for predictions, _ in gathered for item in predictions.items()))
        self.maps = {image_id: png for _, maps in gathered for image_id, png in maps.items()}

    def accumulate(self) -> None:
        """Do nothing: everything is computed by `summarize`."""

    def summarize(self) -> dict | None:
        """Print the table and return it, on the main process; None on the others.

        `All`, `Things` and `Stuff` each hold `pq`, `sq`, `rq` in 0..1 and `n`, the number of classes that occurred;
        `per_class` holds the first three by class id. `predictions.json` is written too.
        """
        if not is_main_process():
            return None
        content = {"annotations": list(self.predictions.values()), "categories": self.categories}
        if self.output_dir:
            write_json(self.output_dir / "predictions.json", content)
            return self._compute(content, self.output_dir)
        with tempfile.TemporaryDirectory() as folder:
            for image_id, png in self.maps.items():
                (Path(folder) / self.predictions[image_id]["file_name"]).write_bytes(png)
            return self._compute(content, folder)

    def _compute(self, content: dict, folder: str | Path) -> dict:
        from hotcoco.panoptic import PanopticEval

        unseen = len(self.truth) - len(self.predictions)
        if unseen:
            logger.warning(f"PQ is over {len(self.predictions)} images; {unseen} of {self.ann_file} were not predicted")
        truth = {"annotations": [self.truth[i] for i in self.predictions], "categories": self.categories}
        evaluation = PanopticEval(truth, content, gt_folder=str(self.ann_folder), pred_folder=str(folder))
        evaluation.evaluate()
        result = evaluation.results()
        logger.info("\n".join(["Panoptic quality", *evaluation.summary_lines()]))
        per_class = {
            int(label): {key: numbers[key] for key in ("pq", "sq", "rq")}
            for label, numbers in result["per_class"].items()
        }
        return {**{group: result[group] for group in GROUPS}, "per_class": per_class}

    def _check(self, prediction: dict, png: bytes) -> None:
        """Compare both maps of an image with their lists of segments."""
        record = self.truth[prediction["image_id"]]
        path, name = self.ann_folder / record["file_name"], f"prediction for image {prediction['image_id']}"
        true, found = read_segment_ids(path), read_segment_ids(io.BytesIO(png))
        if true.shape != found.shape:
            raise ValueError(f"{name}: a map of {found.shape} (height, width), but {path} is one of {true.shape}")
        unknown = {s["category_id"] for s in prediction["segments_info"]} - {c["id"] for c in self.categories}
        if unknown:
            raise ValueError(f"{name}: classes {sorted(unknown)} are not among the categories of {self.ann_file}")
        for where, painted, segments in ((path, true, record), (name, found, prediction)):
            listed = [segment["id"] for segment in segments["segments_info"]]
            check_segment_ids(str(where), np.unique(painted).tolist(), listed)
