"""Check a dataset before training: print statistics and problems, and draw a sheet of suspicious images.

python tools/check_dataset.py --coco_path /data/mine                                       # COCO's layout
python tools/check_dataset.py --images photos --annotations labels.json --output sheet.png

Exit status: 0, training would start; 1, it would not, or would stop on the way; 2, wrong use of this tool.
"""

import argparse
import filecmp
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.coco_index import CocoIndex, check_against_folder, check_classes, read_coco_index
from datasets.images import read_image
from tools.cli import exit_status, printable
from tools.draw import class_colour, class_name, contact_sheet, draw_boxes, fit, titled, to_pil

EXAMPLES = 5  # named for each problem
RED = (255, 0, 0)
ROTATION = 0x0112  # EXIF's tag for the orientation of the camera
UNKNOWN_SIZE = 10**6  # in place of an unknown image side, so that no box reaches outside
IN_TRAINING = {  # what training does about problems that hotcoco finds
    "degenerate_bbox": "training drops them",
    "bbox_out_of_bounds": "training clamps them, and drops those wholly outside",
    "near_duplicate": "two queries must then learn one object",
}


@dataclass
class Report:
    """What is known of one part of a dataset, and its problems."""

    part: str
    images: Path
    fatal: list[str] = field(default_factory=list)  # training would not start, or would stop
    warnings: list[str] = field(default_factory=list)
    table: list[tuple[str, str]] = field(default_factory=list)
    suspects: dict[int, str] = field(default_factory=dict)  # position of an image: why it is suspicious
    bad_boxes: set[int] = field(default_factory=set)  # positions of annotations
    index: CocoIndex | None = None

    def warn(self, problem: str, examples: Iterable, images: Iterable[int] = ()) -> None:
        """Add a problem, if there are examples of it; `images` are drawn on the sheet."""
        examples = list(examples)
        if examples:
            self.warnings.append(f"{len(examples)} {problem}: {_some(examples)}")
            for i in images:
                self.suspects.setdefault(int(i), problem.split(" (")[0])


def _some(examples: Sequence) -> str:
    return ", ".join(map(str, examples[:EXAMPLES])) + (", ..." if len(examples) > EXAMPLES else "")


def inspect_part(
    part: str, images: Path, annotations: Path, num_classes: int | None, num_queries: int, decode: bool
) -> Report:
    """Check an image folder with its annotation file."""
    report = Report(part, images)
    try:
        report.index = index = read_coco_index(annotations)
    except (ValueError, FileNotFoundError) as error:
        report.fatal.append(str(error))
        return report
    classes = num_classes or index.num_classes
    for check in (lambda: check_against_folder(index, images), lambda: check_classes(index, classes)):
        try:
            check()
        except (ValueError, FileNotFoundError) as error:
            report.fatal.append(str(error))
    sizes = _check_files(report, index) if decode and images.is_dir() else index.sizes
    _check_images(report, index, num_queries)
    _check_annotations(report, index, sizes, classes)
    return report


def _check_files(report: Report, index: CocoIndex) -> np.ndarray:
    """Decode every image; return true sizes [N, 2] (height, width), or the annotated ones where that fails."""

    def look(i: int) -> tuple[int, int, str, bool]:
        path = report.images / str(index.file_names[i])
        if not path.is_file():
            return 0, 0, "", False  # reported already
        try:
            height, width = read_image(path).shape[-2:]
            with Image.open(path) as image:
                return height, width, "", image.getexif().get(ROTATION, 1) != 1
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            return 0, 0, str(error) if str(path) in str(error) else f"{path}: {error}", False

    with ThreadPoolExecutor() as pool:
        results = pool.map(look, range(len(index.image_ids)))
        rows = list(tqdm(results, "decoding", len(index.image_ids), disable=None))
    broken = [error for *_, error, _ in rows if error]
    if broken:
        report.fatal.append(f"{len(broken)} images cannot be decoded, training would stop there: {_some(broken)}")
    sizes = np.array([row[:2] for row in rows])
    differ = ((sizes != index.sizes) & (sizes > 0) & (index.sizes > 0)).any(1).nonzero()[0]
    examples = [f"{index.file_names[i]} is {sizes[i].tolist()}, not {index.sizes[i].tolist()}" for i in differ]
    report.warn("images of another (height, width) than annotated", examples, differ)
    rotated = np.array([row[3] for row in rows]).nonzero()[0]
    names = index.file_names[rotated].tolist()
    report.warn("images with a rotation tag, which training ignores (boxes refer to stored pixels)", names, rotated)
    return np.where(sizes > 0, sizes, index.sizes)


def _check_images(report: Report, index: CocoIndex, num_queries: int) -> None:
    """Count the objects of each image."""
    objects = np.diff(index.first)
    report.table.append(("images", f"{len(objects)}, with {len(index.labels)} annotations"))
    report.table.append(("objects in an image", f"{objects.mean():.1f} on average, {objects.max()} at most"))
    report.table.append(("images without objects", f"{(objects == 0).sum()} (they train as background)"))
    report.table.append(("crowds", f"{index.iscrowd.sum()} (not trained on; evaluation ignores detections in them)"))
    crowded = (objects > num_queries).nonzero()[0]
    examples = [f"image {index.image_ids[i]} ({objects[i]})" for i in crowded]
    report.warn(f"images with more objects than the {num_queries} queries (--num_queries)", examples, crowded)
    if (objects == 0).mean() > 0.5:
        report.warnings.append("more than half of the images have no objects: are annotations missing?")
    report.warn("files listed more than once", _repeated(index.file_names.tolist()))
    report.warn("names used for several categories", _repeated(index.categories.values()))


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _check_annotations(report: Report, index: CocoIndex, sizes: np.ndarray, num_classes: int) -> None:
    """Add hotcoco's statistics and the problems it finds in boxes and categories."""
    try:
        from hotcoco import COCO
    except ImportError:
        raise ValueError("this tool needs hotcoco: pip install hotcoco") from None
    image_of = np.repeat(np.arange(len(index.image_ids)), np.diff(index.first))
    # One pixel of slack at each border: float32 rounds, and so do annotation tools.
    sides = (np.where(sizes > 0, sizes, UNKNOWN_SIZE) + 2).tolist()
    boxes = index.boxes + np.array([1, 1, 0, 0])
    images = [{"id": i, "file_name": "", "height": h, "width": w} for i, (h, w) in enumerate(sides)]
    categories = [{"id": i, "name": name} for i, name in index.categories.items()]
    ids = np.arange(1, len(image_of) + 1)
    dataset = COCO.from_arrays(
        images, categories, image_of, index.labels, boxes, ids=ids, area=index.area, iscrowd=index.iscrowd
    )
    health = dataset.healthcheck()
    for problem in (*health["errors"], *health["warnings"]):
        code, affected = problem["code"], problem["affected_ids"]
        text = f"{problem['message'].rstrip('.')}"
        text += f" ({IN_TRAINING[code]})" if code in IN_TRAINING else ""
        if "category" in code:
            examples = [class_name(index.categories, i) for i in affected]
        else:
            where = np.array(affected) - 1
            boxes = np.round(index.boxes[where].astype(float), 1).tolist()
            examples = [f"image {index.image_ids[image_of[k]]} {box}" for k, box in zip(where, boxes, strict=True)]
            report.bad_boxes.update(where.tolist())
            for i in image_of[where]:
                report.suspects.setdefault(int(i), code.replace("_", " "))
        report.warnings.append(f"{text}: {_some(examples)}")

    _add_statistics(report, index, sizes, num_classes, dataset.stats()["per_category"])


def _add_statistics(
    report: Report, index: CocoIndex, sizes: np.ndarray, num_classes: int, per_category: list[dict]
) -> None:
    if (sizes > 0).all():
        for name, side in zip(("height", "width"), sizes.T, strict=True):
            report.table.append((f"image {name}", f"{side.min()} to {side.max()}, median {np.median(side):.0f}"))
    area = index.boxes[:, 2] * index.boxes[:, 3]
    small, large = (area < 32**2).sum(), (area >= 96**2).sum()
    medium = len(area) - small - large
    report.table.append(
        ("object sizes", f"{small} small (box below 32 x 32), {medium} medium, {large} large (from 96 x 96)")
    )
    known = sorted(index.categories)
    holes = sorted(set(range(1, known[-1] + 1)) - set(known))
    text = f"{len(known)}, from {known[0]} to {known[-1]}: the model has {num_classes} classes"
    report.table.append(("category ids", text))
    if holes:
        text = f"{len(holes)}, harmless, each costs a row of the class head: {_some(holes)}"
        report.table.append(("unused ids", text))
    for row in sorted(per_category, key=lambda row: row["id"]):
        report.table.append((f"  {row['id']} {row['name']}", f"{row['ann_count']} in {row['img_count']} images"))


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
    pairs = [(train.images / name, val.images / name) for name in shared]
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
                pictures.append(_draw(report, report.index, i, why))
            except (OSError, ValueError):
                continue  # reported already
    return contact_sheet(pictures, 4) if pictures else None


def _draw(report: Report, index: CocoIndex, i: int, why: str) -> Image.Image:
    """Draw one image with its objects; boxes with a problem are red and dashed."""
    where = index.annotations_of(i)
    picture, factor = fit(to_pil(read_image(report.images / str(index.file_names[i]))), 420)
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
    add("--coco_path", type=Path, help="folder with train2017/, val2017/ and annotations/")
    add("--images", type=Path, help="folder of images, for another layout")
    add("--annotations", type=Path, help="their COCO instances file")
    add("--num_classes", type=int, help="as for training; default: the largest id of the training part + 1")
    add("--num_queries", type=int, default=100, help="as for training (default 100)")
    add("--output", help="picture sheet to write")
    add("--count", type=int, default=24, help="images on it (default 24)")
    add("--no_decode", action="store_true", help="do not open the images (quick, but broken ones are not found)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check, print and draw; return 1 if training would not start or would stop."""
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
        compare_parts(*reports)
    for report in reports:
        show(report)
    sheet = draw_sheet(reports, args.count) if args.output else None
    if sheet:
        sheet.save(args.output)
        print(f"\nwritten: {printable(args.output)}")
    fatal = any(report.fatal for report in reports)
    print("\ntraining would not get through: see FATAL above" if fatal else "\ntraining would start")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
