"""Draw a sheet of images: the annotated objects on the left, a model's detections on the right.

python tools/show_predictions.py --run runs/r50                    # its val data; writes runs/r50/predictions.png
python tools/show_predictions.py --annotations instances_val2017.json --images val2017 \
    --predictions runs/r50/predictions_bbox.json --output sheet.png
"""

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets import build_dataset
from datasets.coco_index import CocoIndex, read_coco_index, read_json
from datasets.files import inside
from datasets.images import read_image
from datasets.json_file import is_whole
from tools.draw import class_colour, class_name, contact_sheet, draw_boxes, fit, titled, to_pil
from util.checkpoint import load_checkpoint
from util.cli import exit_status
from util.logger import logger
from util.text import printable


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, help="output folder of a training run: instead of the four file flags")
    add("--annotations", help="COCO instances file")
    add("--images", help="folder of its images")
    add("--predictions", help="COCO result file, as training writes it to its output folder")
    add("--threshold", type=float, default=0.5, help="lowest score that is drawn (default 0.5)")
    add("--count", type=int, default=12, help="images on the sheet, spread over the file (default 12)")
    add("--columns", type=int, default=2, help="images side by side (default 2)")
    add("--side", type=int, default=420, help="pixels of an image's longer side (default 420)")
    add("--output", help="picture to write")
    add("--allow", action="append", default=[], choices=("outside_paths",),
        help="read images whose names lead out of their folder")  # fmt: skip
    return parser


def files_of_run(run: Path) -> dict[str, Path | None]:
    """Find a run's validation data, by the flags in its checkpoint, and its predictions (`maps`: of panoptic data)."""
    state = load_checkpoint(run / "checkpoint.pth")
    if not state.get("args"):
        raise ValueError(f"{run}/checkpoint.pth does not say where its data are: give the four file flags")
    flags = state["args"]
    val_set = build_dataset("val", argparse.Namespace(**flags) if isinstance(flags, dict) else flags)
    annotations = getattr(val_set, "ann_file", None)
    if annotations is None:
        raise ValueError(f"{run}: its --dataset_file is not read from COCO's files: give the four file flags")
    return {
        "annotations": annotations,
        "images": val_set.img_folder,
        "predictions": run / "predictions_bbox.json",
        "output": run / "predictions.png",
        "maps": getattr(val_set, "ann_folder", None),
    }


def read_predictions(path: str | Path, index: CocoIndex) -> dict[int, list[dict]]:
    """Read a COCO result file into {image id: detections by descending score}.

    Raises ValueError if it is not one, or if none of its detections is of an image and a category of the index.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: not a COCO result file: expected a list of detections")
    by_image = defaultdict(list)
    for i, record in enumerate(records):
        if isinstance(record, dict) and "bbox" not in record and "segmentation" in record:
            record["bbox"] = _box_of_mask(record["segmentation"])  # results of masks have no boxes
        if not _is_detection(record):
            raise ValueError(
                f"{path}: entry {i} is not a detection with image_id, category_id, bbox (four numbers) and score"
            )
        by_image[record["image_id"]].append(record)
    for detections in by_image.values():
        detections.sort(key=lambda record: -record["score"])
    unknown = sorted({record["category_id"] for record in records} - index.categories.keys())
    if not by_image.keys() & set(index.image_ids.tolist()):
        raise ValueError(f"{path} holds no detection in an image of {index.path}")
    if records and all(record["category_id"] in unknown for record in records):
        raise ValueError(f"{path}: no detection is of a category of {index.path}: ids {unknown[:5]}")
    if unknown:
        logger.warning(f"{path}: detections of categories that {index.path} lacks: ids {unknown[:5]}")
    return by_image


def _box_of_mask(code) -> list[float] | None:
    """Return the box (x, y, width, height) of a mask in run-length code, or None for anything else."""
    try:
        return mask_api.toBbox(code).tolist()
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def _is_detection(record) -> bool:
    try:
        numbers = [*record["bbox"], record["score"]]
        ids = is_whole(record["image_id"]) and is_whole(record["category_id"])
        return ids and len(numbers) == 5 and all(map(math.isfinite, numbers))
    except (KeyError, TypeError, OverflowError):
        return False


def draw_pair(index: CocoIndex, i: int, path: Path, detections: list[dict], side: int) -> list[Image.Image]:
    """Draw an image twice: with its annotated objects (crowds dashed), and with the detections."""
    picture, factor = fit(to_pil(read_image(path)), side)
    where, names = index.annotations_of(i), index.categories
    labels = index.labels[where].tolist()
    truth = draw_boxes(
        picture,
        corners(index.boxes[where]) * factor,
        [class_name(names, label) for label in labels],
        [class_colour(label) for label in labels],
        index.iscrowd[where].astype(bool).tolist(),
    )
    prediction = draw_boxes(
        picture,
        corners([record["bbox"] for record in detections]) * factor,
        [f"{class_name(names, record['category_id'])} {record['score']:.2f}" for record in detections],
        [class_colour(record["category_id"]) for record in detections],
    )
    return [
        titled(truth, f"{index.file_names[i]}: {len(labels)} annotated"),
        titled(prediction, f"{len(detections)} detected"),
    ]


def corners(boxes) -> np.ndarray:
    """Convert boxes (x, y, width, height) to (x0, y0, x1, y1)."""
    boxes = np.array(boxes, float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def main(argv: list[str] | None = None) -> None:
    """Draw the sheet."""
    args = get_args_parser().parse_args(argv)
    if args.count < 1 or args.columns < 1 or args.side < 1 or math.isnan(args.threshold):
        raise ValueError("--count, --columns and --side are at least 1, and --threshold is a number")
    files: dict = files_of_run(args.run) if args.run else {}
    for name in ("annotations", "images", "predictions", "output"):
        files[name] = getattr(args, name) or files.get(name)
        if files[name] is None:
            raise ValueError(f"--{name} is missing: give --run, or --annotations, --images, --predictions and --output")
    index = read_coco_index(files["annotations"])
    by_image = read_predictions(files["predictions"], index)
    # Only images with predictions are shown: the model need not have been run on all.
    with_predictions = [i for i, image_id in enumerate(index.image_ids.tolist()) if image_id in by_image]
    count = min(args.count, len(with_predictions))
    pictures = []
    for k in range(count):
        i = with_predictions[k * len(with_predictions) // count]
        detections = [r for r in by_image[int(index.image_ids[i])] if r["score"] >= args.threshold]
        path = inside(files["images"], str(index.file_names[i]), "outside_paths" in args.allow)
        pictures += draw_pair(index, i, path, detections, args.side)
    contact_sheet(pictures, 2 * args.columns).save(files["output"])
    print(f"{count} of {len(index.image_ids)} images, scores from {args.threshold}: {printable(str(files['output']))}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
