"""Would training start on this dataset, and what in it would hurt? A table, and a sheet of pictures.

python tools/check_dataset.py --coco_path /data/mine                                       # COCO's layout
python tools/check_dataset.py --images photos --annotations labels.json --output sheet.png

Exit status: 0, training would start; 1, it would not, or would stop on the way; 2, the tool could not be run so.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.images import read_image
from tools.cli import exit_status
from tools.dataset_report import Report, compare_parts, inspect_part
from tools.draw import class_colour, contact_sheet, draw_boxes, fit, titled

RED = (255, 0, 0)


def draw_sheet(reports: list[Report], folders: list[Path], count: int) -> Image.Image | None:
    """Draw suspects first, then images spread over the rest, `count` in all; boxes that are at fault in red, dashed."""
    pictures = []
    for report, folder in zip(reports, folders, strict=True):
        if report.index is None:
            continue
        share, total = max(count // len(reports), 1), len(report.index.image_ids)
        spread = {i: "sample" for i in range(0, total, max(total // share, 1))}
        for i, why in [*report.suspects.items(), *((i, w) for i, w in spread.items() if i not in report.suspects)][
            :share
        ]:
            try:
                pictures.append(_draw(report, folder, i, why))
            except (OSError, ValueError):
                continue  # reported already
    return contact_sheet(pictures, 4) if pictures else None


def _draw(report: Report, folder: Path, i: int, why: str) -> Image.Image:
    index, where = report.index, report.index.annotations_of(i)
    pixels = read_image(folder / str(index.file_names[i]))
    picture, factor = fit(Image.fromarray(pixels.permute(1, 2, 0).numpy()), 420)
    boxes = index.boxes[where].copy()
    boxes[:, 2:] += boxes[:, :2]
    bad, labels = report.bad_boxes[where], index.labels[where].tolist()
    names = [index.categories[label] for label in labels]
    colours = [RED if wrong else class_colour(label) for wrong, label in zip(bad, labels, strict=True)]
    return titled(
        draw_boxes(picture, boxes * factor, names, colours, bad.tolist()), f"{report.part} {index.image_ids[i]}: {why}"
    )


def show(report: Report) -> None:
    """Print a report."""
    print(f"\n{report.part}")
    for name, value in report.table:
        print(f"  {name:28} {value}")
    for text in report.warnings:
        print(f"  warning: {text}")
    for text in report.fatal:
        print(f"  FATAL: {text}")


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--coco_path", type=Path, help="folder with train2017/, val2017/ and annotations/")
    add("--images", type=Path, help="folder of images, where the layout is another")
    add("--annotations", type=Path, help="their COCO instances file")
    add("--num_classes", type=int, help="as for training; default: the largest id of the training part + 1")
    add("--num_queries", type=int, default=100, help="as for training (default 100)")
    add("--output", help="picture sheet to write")
    add("--count", type=int, default=24, help="pictures on it (default 24)")
    add("--no_decode", action="store_true", help="do not open the images (quick; broken ones go unseen)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check, print, draw; return 1 if training would not start or would stop."""
    args = get_args_parser().parse_args(argv)
    if bool(args.coco_path) == bool(args.images and args.annotations):
        raise ValueError("which dataset? Give --coco_path, or --images and --annotations")
    if args.coco_path and not args.coco_path.is_dir():
        raise FileNotFoundError(f"--coco_path {args.coco_path}: no such folder")
    parts = [("dataset", args.images, args.annotations)]
    if args.coco_path:
        files = args.coco_path / "annotations"
        parts = [(p, args.coco_path / f"{p}2017", files / f"instances_{p}2017.json") for p in ("train", "val")]
    reports, num_classes = [], args.num_classes
    for part, images, annotations in parts:
        reports.append(inspect_part(part, images, annotations, num_classes, args.num_queries, not args.no_decode))
        num_classes = num_classes or (reports[0].index and reports[0].index.num_classes)
    if len(reports) == 2:
        compare_parts(*reports, *(images for _, images, _ in parts))
    for report in reports:
        show(report)
    sheet = draw_sheet(reports, [images for _, images, _ in parts], args.count) if args.output else None
    if sheet:
        sheet.save(args.output)
        print(f"\nwritten: {args.output}")
    fatal = any(report.fatal for report in reports)
    print("\ntraining would not get through: see FATAL above" if fatal else "\ntraining would start")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
