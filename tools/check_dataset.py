"""Check a dataset before training: print statistics and problems, and draw a sheet of suspicious images.

python tools/check_dataset.py --coco_path /data/mine                                       # COCO's layout
python tools/check_dataset.py --images photos --annotations labels.json --output sheet.png
python tools/check_dataset.py --coco_path /data/mine --coco_panoptic_path /data/mine       # panoptic maps too

Segmentations are checked as --masks needs them, where there are any; --boxes_only leaves them out.

Exit status: 0, training would start; 1, it would not, or would stop on the way; 2, wrong flags or missing files.
"""

import argparse
import filecmp
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.coco import ALLOWED
from datasets.images import allow_large_images, read_image
from tools.dataset_advice import advise
from tools.dataset_report import Options, Part, Report, inspect_part
from tools.draw import class_colour, class_name, contact_sheet, draw_boxes, fit, titled, to_pil
from util.cli import exit_status
from util.text import printable

RED = (255, 0, 0)


def compare_parts(train: Report, val: Report) -> None:
    """Add the differences between the two parts to `val`."""
    if train.index is None or val.index is None:
        return
    ours, theirs = train.index.categories, val.index.categories
    differ = [
        f"{i} is {ours.get(i, 'absent')!r} in train, {theirs.get(i, 'absent')!r} in val"
        for i in sorted(ours.keys() | theirs.keys())
        if ours.get(i) != theirs.get(i)
    ]
    val.warn("categories that differ between the parts", differ)
    shared = sorted(set(train.index.file_names.tolist()) & set(val.index.file_names.tolist()))
    pairs = [(train.images / name, val.images / name) for name in shared if train.may_read(name)]
    same = [b.name for a, b in pairs if a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)]
    val.warn("images that are in both parts (trained on, then evaluated on)", same)


def draw_sheet(reports: list[Report], count: int) -> Image.Image | None:
    """Draw `count` images: suspicious ones first, then a sample of the others."""
    reports = [report for report in reports if report.index is not None]
    pictures = []
    for report in reports:
        share, total = max(count // len(reports), 1), len(report.index.image_ids)
        sample = {i: "sample" for i in range(0, total, max(total // share, 1))}
        for i, why in list({**report.suspects, **{**sample, **report.suspects}}.items())[:share]:
            try:
                pictures.append(_draw(report, i, why))
            except (OSError, ValueError):
                continue  # reported already
    return contact_sheet(pictures, 4) if pictures else None


def _draw(report: Report, i: int, why: str) -> Image.Image:
    """Draw one image with its objects; boxes with a problem are red and dashed."""
    index, name = report.index, str(report.index.file_names[i])
    if not report.may_read(name):
        raise ValueError(f"{name} lies outside {report.images}")
    where = index.annotations_of(i)
    picture, factor = fit(to_pil(read_image(report.images / name)), 420)
    boxes = index.boxes[where].copy()
    boxes[:, 2:] += boxes[:, :2]
    bad = [k in report.bad_boxes for k in range(where.start, where.stop)]
    labels = index.labels[where].tolist()
    names = [class_name(index.categories, label) for label in labels]
    colours = [RED if is_bad else class_colour(label) for is_bad, label in zip(bad, labels, strict=True)]
    picture = draw_boxes(picture, boxes * factor, names, colours, bad)
    return titled(picture, f"{report.part} {index.image_ids[i]}: {why}")


def show(report: Report) -> None:
    """Print a report."""
    print(f"\n{report.part}")
    for name, value in report.table:
        print(f"  {printable(name):28} {value}")
    for kind, texts in (("warning", report.warnings), ("FATAL", report.fatal)):
        for text in texts:
            lines = [printable(line) for line in text.split("\n")]
            print(f"  {kind}:", "\n".join(lines))


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--coco_path", type=Path, help="folder with train2017/, val2017/ and annotations/")
    add("--images", type=Path, help="folder of images, for another layout")
    add("--annotations", type=Path, help="their COCO instances file")
    add("--num_classes", type=int, help="as for training; default: the largest id of the training part + 1")
    add("--num_queries", type=int, default=100, help="as for training (default 100)")
    add("--output", help="picture sheet to write")
    add("--count", type=int, default=24, help="images on it (default 24)")
    add("--coco_panoptic_path", type=Path, help="folder with panoptic_train2017/, panoptic_val2017/ and annotations/")
    add("--boxes_only", action="store_true", help="do not check segmentations: training is without --masks")
    add("--decode", action="store_true", default=True, help="decode every image and every map (the default)")
    add("--no_decode", dest="decode", action="store_false",
        help="do not open the images (quick, but broken ones are not found)")
    add("--allow", action="append", default=[], choices=ALLOWED, help="as for training")
    # fmt: on
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for flags that make no sense."""
    if bool(args.coco_path) == bool(args.images and args.annotations):
        raise ValueError("which dataset? Give --coco_path, or --images and --annotations")
    if args.coco_panoptic_path and not args.coco_path:
        raise ValueError("--coco_panoptic_path needs --coco_path, the folder of the images")
    for name in ("coco_path", "coco_panoptic_path"):
        folder = getattr(args, name)
        if folder and not folder.is_dir():
            raise FileNotFoundError(f"--{name} {folder}: no such folder")
    for name in ("num_classes", "num_queries", "count"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")


def parts_of(args: argparse.Namespace) -> list[Part]:
    """Return the files of each part of the dataset."""
    if not args.coco_path:
        return [Part("dataset", args.images, args.annotations)]
    parts, root, maps = [], args.coco_path, args.coco_panoptic_path
    for name in ("train", "val"):
        instances = root / "annotations" / f"instances_{name}2017.json"
        if maps:
            annotations = maps / "annotations" / f"panoptic_{name}2017.json"
            beside = instances if instances.is_file() else None
            parts.append(Part(name, root / f"{name}2017", annotations, maps / f"panoptic_{name}2017", beside))
        else:
            parts.append(Part(name, root / f"{name}2017", instances))
    return parts


def main(argv: list[str] | None = None) -> int:
    """Check, print and draw; return 1 if training would not start or would stop."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    if "large_images" in args.allow:
        allow_large_images()
    options = Options(
        args.num_classes, args.num_queries, args.decode, not args.boxes_only, "outside_paths" in args.allow
    )
    reports = []
    for part in parts_of(args):
        reports.append(inspect_part(part, options))
        if options.num_classes is None and reports[0].index:
            options = replace(options, num_classes=reports[0].index.num_classes)
    if len(reports) == 2:
        compare_parts(*reports)
    for report in reports:
        show(report)
    sheet = draw_sheet(reports, args.count) if args.output else None
    if sheet:
        sheet.save(args.output)
        print(f"\nwritten: {printable(args.output)}")
    if reports[0].index is not None:
        memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        print("\nadvice", *advise(reports[0].index, args.num_queries, memory), sep="\n  ")
    fatal = any(report.fatal for report in reports)
    print("\ntraining would fail: see FATAL above" if fatal else "\ntraining would start")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
