"""Report what a detector does well and badly: one HTML page, and its numbers as JSON and CSV.

python tools/report.py --run runs/r50                  # its validation data and predictions; writes runs/r50/report
python tools/report.py --annotations instances_val2017.json --images val2017 \
    --predictions predictions_bbox.json --output report
python tools/report.py --annotations panoptic_val2017.json --maps panoptic_val2017 \
    --predictions panoptic_eval/predictions.json --output report

It needs the package hotcoco. predictions_segm.json gives the report of masks. `tools/predict.py --threshold
report/report.json` uses the best score threshold.
"""

import argparse
import contextlib
import io
import math
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.class_metrics import class_rows, score_curves, write_rows
from datasets.coco_api import load_coco_api
from datasets.coco_backends import ground_truth, pick_backend
from datasets.coco_index import read_coco_index
from datasets.files import inside
from datasets.json_file import read_json, write_json
from datasets.panoptic_eval import PanopticEvaluator
from tools.report_page import detection_page, panoptic_page
from tools.show_predictions import files_of_run, read_predictions
from util.cli import HelpFormatter, exit_status
from util.flags import check_numbers
from util.text import printable

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
METRICS += ("AR_1", "AR_10", "AR", "AR_small", "AR_medium", "AR_large")


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, help="output folder of a training run: instead of the file flags")
    add("--annotations", help="COCO instances file, or panoptic file")
    add("--images", help="folder of the images, for pictures of the worst ones; may be left out")
    add("--maps", help="folder of the annotated maps of a panoptic file")
    add("--predictions", help="COCO result file, as training and --eval write it")
    add("--max_dets", type=int, default=100, help="detections of an image that count; COCO's protocol says 100")
    add("--worst", type=int, default=12, help="images that are drawn")
    add("--output", type=Path, help="folder to write")
    add("--allow", action="append", default=[], choices=("outside_paths",),
        help="read images whose names lead out of their folder")  # fmt: skip
    return parser


def evaluate(truth, records: list[dict], iou_type: str, max_dets: int):
    """Run COCO's evaluation on detections in its result format; return hotcoco's COCOeval."""
    backend = pick_backend("hotcoco")
    found = truth.load_res(records) if records else backend.detections(truth, np.zeros((0, 7)), [])
    evaluation = backend.evaluation(truth, found, iou_type)
    evaluation.params.maxDets = [1, 10, max_dets]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        backend.summarize(evaluation)
    return evaluation


def detection_numbers(truth, records: list[dict], max_dets: int) -> tuple[dict, dict[int, list[dict]]]:
    """Compute the numbers of boxes or masks; return them, and the marked boxes of each image by its id.

    A marked box is a record in COCO's format with a `mark`: "correct", "false", "confused" (of another class than the
    object there) or "missed". Detections below the best threshold are left out.
    """
    iou_type = "segm" if records and "segmentation" in records[0] else "bbox"
    whole = evaluate(truth, records, iou_type, max_dets)
    best = score_curves(whole)[1].best()
    shown = [record for record in records if record["score"] >= best["threshold"]]
    diagnostics = evaluate(truth, shown, iou_type, max_dets).image_diagnostics(score_thr=0.0)
    confusion = whole.confusion_matrix(min_score=best["threshold"], max_det=max_dets)
    calibration = whole.calibration()
    numbers = {
        "kind": iou_type,
        "max_dets": max_dets,
        "metrics": dict(zip(METRICS, map(float, whole.stats[:12]), strict=True)),
        "best": best,
        "classes": [asdict(row) for row in class_rows(whole)],
        "curves": thin_curves(whole),
        "confusion": {"names": [*confusion["cat_names"], "background"], "matrix": confusion["matrix"].tolist()},
        "calibration": {"expected_error": calibration["ece"], "bins": calibration["bins"]},
        "tide": whole.tide_errors(),
        "images": worst_first(diagnostics),
    }
    return numbers, marked_boxes(truth, shown, diagnostics)


def thin_curves(evaluation) -> dict[str, dict[str, list[float]]]:
    """Return the curve of all classes together and those of each class, with at most 100 points each."""
    curves, together = score_curves(evaluation)
    named = {"all classes": together} | {str(evaluation.cocoGt.cats[k]["name"]): curve for k, curve in curves.items()}
    result = {}
    for name, curve in named.items():
        kept = np.unique(np.linspace(0, len(curve.scores) - 1, 100).astype(int)) if len(curve.scores) else []
        columns = {"score": curve.scores, "precision": curve.precision, "recall": curve.recall, "f1": curve.f1}
        result[name] = {key: column[kept].tolist() for key, column in columns.items() if len(kept)}
    return result


def worst_first(diagnostics: dict) -> list[dict]:
    """List the images by ascending F1: correct, false and missed ones (`tp`, `fp`, `fn`) of each."""
    images = [
        {"image_id": int(image_id), **{key: row[key] for key in ("tp", "fp", "fn", "f1")}}
        for image_id, row in diagnostics["img_summary"].items()
    ]
    return sorted(images, key=lambda row: (row["f1"], -row["fp"] - row["fn"], row["image_id"]))


def marked_boxes(truth, shown: list[dict], diagnostics: dict) -> dict[int, list[dict]]:
    """Return the detections and the missed objects of each image, with their mark."""
    marks = {
        number: {"tp": "correct", "fp": "false"}.get(status) for number, status in diagnostics["dt_status"].items()
    }
    marks |= {e["dt_id"]: "confused" for e in diagnostics["label_errors"] if e["type"] == "wrong_label"}
    boxes = defaultdict(list)
    for number, record in enumerate(shown, start=1):  # hotcoco numbers the detections so
        if marks.get(number):
            boxes[record["image_id"]].append({**record, "mark": marks[number]})
    for number, status in diagnostics["gt_status"].items():
        if status == "fn":
            record = truth.anns[number]
            boxes[record["image_id"]].append({**record, "mark": "missed"})
    return boxes


def detection_report(files: dict, max_dets: int, worst: int, allow: list[str]) -> tuple[dict, str]:
    """Return the numbers and the page of a file of boxes or masks."""
    index = read_coco_index(files["annotations"])
    by_image = read_predictions(files["predictions"], index)
    records = [r for found in by_image.values() for r in found if r["category_id"] in index.categories]
    truth = pick_backend("hotcoco").index(ground_truth(load_coco_api(files["annotations"])))
    numbers, boxes = detection_numbers(truth, records, max_dets)
    paths = {}
    if files.get("images"):
        names = dict(zip(index.image_ids.tolist(), index.file_names.tolist(), strict=True))
        for row in numbers["images"][:worst]:
            paths[row["image_id"]] = inside(files["images"], names[row["image_id"]], "outside_paths" in allow)
    return numbers, detection_page(numbers, boxes, paths, index.categories)


def panoptic_report(files: dict) -> tuple[dict, str]:
    """Return the numbers and the page of a file of panoptic predictions."""
    if not files.get("maps"):
        raise ValueError("panoptic predictions need --maps, the folder of the annotated maps")
    content = read_json(files["predictions"])
    evaluator = PanopticEvaluator(files["annotations"], files["maps"], None)
    for record in content["annotations"]:
        png = (Path(files["predictions"]).parent / record["file_name"]).read_bytes()
        evaluator.update([{**record, "png_string": png}])
    quality = evaluator.summarize() or {}
    names = {category["id"]: str(category["name"]) for category in evaluator.categories}
    rows = [{"category_id": k, "name": names[k], **row} for k, row in quality.pop("per_class").items()]
    numbers = {
        "kind": "panoptic",
        "metrics": quality,
        "classes": sorted(rows, key=lambda row: -np.nan_to_num(row["pq"], nan=-1)),
    }
    return numbers, panoptic_page(numbers)


def main(argv: list[str] | None = None) -> None:
    """Write the report."""
    args = get_args_parser().parse_args(argv)
    check_numbers({"max_dets": args.max_dets, "worst": args.worst}, {"max_dets": 11, "worst": 0})
    files: dict = {**files_of_run(args.run), "output": args.run / "report"} if args.run else {}
    if files.get("maps"):
        files["predictions"] = args.run / "panoptic_eval" / "predictions.json"
    for name in ("annotations", "predictions", "output", "images", "maps"):
        files[name] = getattr(args, name) or files.get(name)
        if files[name] is None and name not in ("images", "maps"):
            raise ValueError(f"--{name} is missing: give --run, or --annotations, --predictions and --output")
    is_panoptic = isinstance(read_json(files["predictions"]), dict)
    numbers, text = (
        panoptic_report(files) if is_panoptic else detection_report(files, args.max_dets, args.worst, args.allow)
    )
    folder = Path(files["output"])
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "classes.csv", numbers["classes"])
    write_json(folder / "report.json", without_nan(numbers))
    (folder / "report.html").write_text(text, encoding="utf-8")
    if not is_panoptic:
        best = numbers["best"]
        print(f"best score threshold {best['threshold']:.3f}: precision {best['precision']:.3f}, "
              f"recall {best['recall']:.3f}, F1 {best['f1']:.3f} at IoU 0.5")  # fmt: skip
    print(f"written: {printable(str(folder))}/report.html, report.json, classes.csv")


def without_nan(value):
    """Replace NaN, which JSON does not have, by null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(exit_status(main))
