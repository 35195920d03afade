"""A sheet of images: on the left what the annotations say, on the right what a model found.

python tools/show_predictions.py --run runs/r50                    # its val data; writes runs/r50/predictions.png
python tools/show_predictions.py --annotations instances_val2017.json --images val2017 \
    --predictions runs/r50/predictions_bbox.json --output sheet.png
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets import build_dataset
from datasets.coco_index import CocoIndex, read_coco_index, read_json
from datasets.images import read_image
from util.checkpoint import load_checkpoint
from util.draw import class_colour, contact_sheet, draw_boxes, fit, titled
from util.tool import exit_status

LETTERS = 14  # height of the titles


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="output folder of a training: in place of the four file flags")
    parser.add_argument("--annotations", help="COCO instances file")
    parser.add_argument("--images", help="folder of its images")
    parser.add_argument("--predictions", help="COCO result file, as training leaves in its output folder")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score that is drawn (default 0.5)")
    parser.add_argument("--count", type=int, default=12, help="images on the sheet, spread over the file (default 12)")
    parser.add_argument("--columns", type=int, default=2, help="images side by side (default 2)")
    parser.add_argument("--side", type=int, default=420, help="pixels of a picture's longer side (default 420)")
    parser.add_argument("--output", help="picture to write")
    return parser


def files_of_run(run: Path) -> dict[str, Path]:
    """Where a training's validation data are, by the flags in its checkpoint, and its predictions."""
    state = load_checkpoint(run / "checkpoint.pth")
    if not state.get("args"):
        raise ValueError(f"{run}/checkpoint.pth does not say where its data are: give the four file flags")
    val_set = build_dataset("val", state["args"])
    return {
        "annotations": val_set.ann_file,
        "images": val_set.img_folder,
        "predictions": run / "predictions_bbox.json",
        "output": run / "predictions.png",
    }


def read_predictions(path: str | Path) -> dict[int, list[dict]]:
    """Read a COCO result file into image id -> detections, best first. ValueError says what is wrong with it."""
    records = read_json(path)
    wanted = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(records, list):
        raise ValueError(f"{path}: not a COCO result file: expected a list of detections")
    by_image = defaultdict(list)
    for i, record in enumerate(records):
        if not isinstance(record, dict) or wanted - record.keys():
            raise ValueError(f"{path}: entry {i} is not a detection with {', '.join(sorted(wanted))}")
        by_image[record["image_id"]].append(record)
    for found in by_image.values():
        found.sort(key=lambda record: -record["score"])
    return by_image


def corners(box, factor: float) -> list[float]:
    """(x, y, width, height) -> (x0, y0, x1, y1), scaled."""
    x, y, w, h = (float(number) * factor for number in box)
    return [x, y, x + w, y + h]


def draw_pair(index: CocoIndex, i: int, folder: Path, found: list[dict], side: int) -> list[Image.Image]:
    """Draw image i twice: its objects (crowds dashed), and the detections `found`."""
    pixels = read_image(folder / str(index.file_names[i]))
    picture, factor = fit(Image.fromarray(pixels.permute(1, 2, 0).numpy()), side)
    where = index.annotations_of(i)
    labels = index.labels[where].tolist()
    truth = draw_boxes(
        picture,
        [corners(box, factor) for box in index.boxes[where]],
        [index.categories[label] for label in labels],
        [class_colour(label) for label in labels],
        index.iscrowd[where].astype(bool).tolist(),
    )
    guess = draw_boxes(
        picture,
        [corners(record["bbox"], factor) for record in found],
        [f"{index.categories.get(r['category_id'], r['category_id'])} {r['score']:.2f}" for r in found],
        [class_colour(record["category_id"]) for record in found],
    )
    return [
        titled(truth, f"{index.file_names[i]}: {len(labels)} annotated", LETTERS),
        titled(guess, f"{len(found)} found", LETTERS),
    ]


def main(argv: list[str] | None = None) -> None:
    """Draw the sheet."""
    args = get_args_parser().parse_args(argv)
    if args.count < 1 or args.columns < 1 or args.side < 1:
        raise ValueError("--count, --columns and --side are at least 1")
    found = files_of_run(args.run) if args.run else {}
    for name in ("annotations", "images", "predictions", "output"):
        if getattr(args, name) is None and name not in found:
            raise ValueError(f"--{name} is missing: give --run, or --annotations, --images, --predictions and --output")
        setattr(args, name, getattr(args, name) or found[name])
    index = read_coco_index(args.annotations)
    by_image = read_predictions(args.predictions)
    # Only images the model was run on can be judged.
    seen = [i for i, image_id in enumerate(index.image_ids.tolist()) if image_id in by_image]
    if not seen:
        raise ValueError(f"{args.predictions} holds no detection in an image of {args.annotations}")
    count = min(args.count, len(seen))
    pictures = []
    for i in (seen[k * len(seen) // count] for k in range(count)):
        found = [r for r in by_image[int(index.image_ids[i])] if r["score"] >= args.threshold]
        pictures += draw_pair(index, i, Path(args.images), found, args.side)
    contact_sheet(pictures, 2 * args.columns).save(args.output)
    print(f"{count} of {len(index.image_ids)} images, scores from {args.threshold}: {args.output}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
