"""What is in a COCO-format dataset, and what of it would stop training or hurt it."""

import filecmp
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.coco_index import CocoIndex, check_against_folder, check_classes, read_coco_index
from datasets.images import read_image

SHOWN = 5  # culprits named for each finding
TINY = 4.0  # pixels: boxes with a shorter side are named
ROTATED = 0x0112  # EXIF's tag for how the camera was held


@dataclass
class Report:
    """What was found in one part of a dataset."""

    part: str
    fatal: list[str] = field(default_factory=list)  # training would not start, or would stop
    warnings: list[str] = field(default_factory=list)
    table: list[tuple[str, str]] = field(default_factory=list)
    suspects: dict[int, str] = field(default_factory=dict)  # position of an image -> why it is worth a look
    bad_boxes: np.ndarray | None = None  # of the annotations, for the sheet
    index: CocoIndex | None = None

    def warn(self, what: str, culprits: Iterable, images: Iterable[int] = (), why: str = "") -> None:
        """Note a finding, unless there are no culprits; its images come on the sheet, with the reason `why`."""
        culprits = list(culprits)
        if culprits:
            self.warnings.append(f"{len(culprits)} {what}: {_some(culprits)}")
            for i in images:
                self.suspects.setdefault(int(i), why or what.split(" (")[0])


def _some(culprits: list) -> str:
    return ", ".join(map(str, culprits[:SHOWN])) + (", ..." if len(culprits) > SHOWN else "")


def inspect_part(
    part: str, images: Path, annotations: Path, num_classes: int | None, num_queries: int, decode: bool
) -> Report:
    """Check an image folder with its annotation file; return the Report."""
    report = Report(part)
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
    sizes = _inspect_files(report, images) if decode and images.is_dir() else index.sizes
    _inspect_boxes(report, sizes)
    _inspect_images(report, num_queries)
    _inspect_categories(report, classes)
    return report


def _inspect_files(report: Report, images: Path) -> np.ndarray:
    """Decode every image that is there; return true sizes [N, 2] (height, width), 0 where it cannot be read."""
    index = report.index

    def look(i: int) -> tuple[int, int, str, bool]:
        path = images / str(index.file_names[i])
        if not path.is_file():
            return 0, 0, "", False
        try:
            height, width = read_image(path).shape[-2:]
            with Image.open(path) as image:
                return height, width, "", image.getexif().get(ROTATED, 1) != 1
        except (ValueError, OSError) as error:
            return 0, 0, str(error), False

    with ThreadPoolExecutor() as pool:
        steps = tqdm(pool.map(look, range(len(index.image_ids))), "decoding", len(index.image_ids), disable=None)
        looked = list(steps)
    broken = [error for *_, error, _ in looked if error]
    if broken:
        report.fatal.append(f"{len(broken)} images cannot be decoded, training would stop there: {_some(broken)}")
    sizes = np.array([row[:2] for row in looked])
    differ = ((sizes != index.sizes) & (sizes > 0) & (index.sizes > 0)).any(1).nonzero()[0]
    named = [f"{index.file_names[i]} is {sizes[i].tolist()}, not {index.sizes[i].tolist()}" for i in differ]
    report.warn("images whose (height, width) is not the annotated one", named, differ, "another size than annotated")
    turned = np.array([row[3] for row in looked]).nonzero()[0]
    report.warn("images with a rotation tag, which is ignored (boxes refer to stored pixels)",
                index.file_names[turned].tolist(), turned)  # fmt: skip
    return np.where(sizes > 0, sizes, index.sizes)


def _inspect_boxes(report: Report, sizes: np.ndarray) -> None:
    """Look for boxes that training clamps, drops or can hardly learn; tell the sizes of all."""
    index = report.index
    image_of = np.repeat(np.arange(len(index.image_ids)), np.diff(index.first))
    x, y, w, h = index.boxes.T
    height, width = sizes[image_of].T
    known = height > 0
    flat = (w <= 0) | (h <= 0)
    away = known & ~flat & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    # One pixel of slack: rounding in annotation tools is no harm.
    outside = known & ~flat & ~away & ((x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1))
    tiny = ~flat & ~away & (np.minimum(w, h) < TINY)
    rows = np.concatenate([index.boxes, index.labels[:, None], image_of[:, None]], 1)
    _, first = np.unique(rows, axis=0, return_index=True)
    twice = np.ones(len(rows), bool)
    twice[first] = False
    report.bad_boxes = flat | away | outside | twice
    for what, bad in (
        ("boxes without area (dropped)", flat),
        ("boxes wholly outside their image (dropped)", away),
        ("boxes that reach outside their image (clamped)", outside),
        (f"boxes with a side below {TINY:g} pixels (hard to learn)", tiny),
        ("objects annotated twice (same image, class and box)", twice),
    ):
        boxes = np.round(index.boxes[bad].astype(float), 1).tolist()
        named = [f"image {index.image_ids[i]} {box}" for i, box in zip(image_of[bad], boxes, strict=True)]
        report.warn(what, named, () if bad is tiny else np.unique(image_of[bad]))
    if len(w):
        area = w * h
        small, large = (area < 32**2).sum(), (area >= 96**2).sum()
        report.table.append(
            (
                "object sizes",
                f"{small} small (box below 32 x 32), {len(w) - small - large} medium, {large} large (from 96 x 96)",
            )
        )
        sides = np.percentile(np.sqrt(area.clip(min=0)), (5, 50, 95))
        report.table.append(
            ("object side (root of area)", "5 % {:.0f}, median {:.0f}, 95 % {:.0f} pixels".format(*sides))
        )
    report.table.insert(
        0, ("image sizes", _spread(sizes.max(1), "longer side") + "; " + _spread(sizes.min(1), "shorter"))
    )


def _spread(values: np.ndarray, name: str) -> str:
    return f"{name} {values.min()} to {values.max()}, median {np.median(values):.0f}"


def _inspect_images(report: Report, num_queries: int) -> None:
    """Count the objects of each image."""
    index = report.index
    objects = np.diff(index.first)
    report.table.insert(0, ("images", f"{len(objects)}, with {len(index.labels)} annotations"))
    report.table.append(("objects in an image", f"{objects.mean():.1f} on average, {objects.max()} at most"))
    empty, crowds = (objects == 0).nonzero()[0], int(index.iscrowd.sum())
    report.table.append(("images without objects", f"{len(empty)} (they train as background)"))
    report.table.append(("crowds", f"{crowds} (left out of training; evaluation ignores what falls on them)"))
    many = (objects > num_queries).nonzero()[0]
    named = [f"image {index.image_ids[i]} ({objects[i]})" for i in many]
    report.warn(
        f"images with more objects than the {num_queries} queries (--num_queries)",
        named,
        many,
        "more objects than queries",
    )
    if len(empty) > len(objects) / 2:
        report.warnings.append("more than half of the images have no objects: are annotations missing?")
    names = Counter(index.file_names.tolist())
    report.warn("files listed more than once", [name for name, count in names.items() if count > 1])


def _inspect_categories(report: Report, num_classes: int) -> None:
    """Count the objects of each class; tell holes in the ids, classes without objects, names used twice."""
    index = report.index
    ids = sorted(index.categories)
    image_of = np.repeat(np.arange(len(index.image_ids)), np.diff(index.first))
    holes = sorted(set(range(1, ids[-1] + 1)) - set(ids))
    report.table.append(
        ("category ids", f"{len(ids)}, from {ids[0]} to {ids[-1]}: the model has {num_classes} classes")
    )
    if holes:
        report.table.append(
            ("holes in the ids", f"{len(holes)}, harmless, each costs a row of the class head: {_some(holes)}")
        )
    for i in ids:
        mine = index.labels == i
        report.table.append(
            (f"  {i} {index.categories[i]}", f"{mine.sum()} in {len(np.unique(image_of[mine]))} images")
        )
    report.warn("categories without a single object", [index.categories[i] for i in ids if i not in index.labels])
    names = Counter(index.categories.values())
    report.warn("names used for several categories", [name for name, count in names.items() if count > 1])


def compare_parts(train: Report, val: Report, train_images: Path, val_images: Path) -> None:
    """Note on `val` where the two parts do not belong together."""
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
    pairs = [(train_images / name, val_images / name) for name in shared]
    same = [b.name for a, b in pairs if a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)]
    val.warn("images that are in both parts (trained on, then judged on)", same)
