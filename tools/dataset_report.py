"""A report on one part of a dataset: statistics and problems."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.coco_checks import bad_masks, check_classes, some, suspicious_images
from datasets.coco_index import CocoIndex, read_coco_index
from datasets.coco_panoptic import check_instances
from datasets.files import check_against_folder, leads_outside
from datasets.images import read_image
from datasets.masks import check_colours, check_segment_ids, read_segment_ids
from datasets.panoptic_index import PanopticIndex, read_panoptic_index
from tools.draw import class_name

ROTATION = 0x0112  # EXIF's tag for the orientation of the camera
UNKNOWN_SIZE = 10**6  # in place of an unknown image side, so that no box reaches outside
IN_TRAINING = {  # what training does with the problems that hotcoco finds
    "degenerate_bbox": "training drops them",
    "bbox_out_of_bounds": "training clamps them, and drops those wholly outside",
    "near_duplicate": "two queries must then learn one object",
}


@dataclass
class Part:
    """The files of one part of a dataset; with `maps`, the annotations are a panoptic file."""

    name: str
    images: Path
    annotations: Path
    maps: Path | None = None
    instances: Path | None = None  # of a panoptic part, for AP


@dataclass
class Options:
    """How a part is checked: as for training, with --masks or without, and whether all images are decoded."""

    num_classes: int | None = None
    num_queries: int = 100
    decode: bool = True
    masks: bool = True
    outside: bool = False


@dataclass
class Report:
    """Statistics and problems of one part of a dataset."""

    part: str
    images: Path
    fatal: list[str] = field(default_factory=list)  # training would not start, or would stop
    warnings: list[str] = field(default_factory=list)
    table: list[tuple[str, str]] = field(default_factory=list)
    suspects: dict[int, str] = field(default_factory=dict)  # position of an image: why it is suspicious
    bad_boxes: set[int] = field(default_factory=set)  # positions of annotations
    index: CocoIndex | None = None
    outside: bool = False  # files outside the folder may be read

    def may_read(self, name: str) -> bool:
        """Return whether a file of the annotations may be opened."""
        return self.outside or not leads_outside(name)

    def warn(self, problem: str, examples: Iterable, images: Iterable[int] = ()) -> None:
        """Add a problem, if there are examples of it; `images` are drawn on the sheet."""
        examples = list(examples)
        if examples:
            self.warnings.append(f"{len(examples)} {problem}: {some(examples)}")
            for i in images:
                self.suspects.setdefault(int(i), problem.split(" (")[0])


def inspect_part(part: Part, options: Options) -> Report:
    """Check an image folder with its annotation file."""
    report = Report(part.name, part.images, outside=options.outside)
    try:
        if part.maps:
            report.index = index = read_panoptic_index(part.annotations)
        else:
            report.index = index = read_coco_index(part.annotations, with_segmentations=options.masks)
    except (ValueError, FileNotFoundError) as error:
        report.fatal.append(str(error))
        return report
    classes = index.num_classes if options.num_classes is None else options.num_classes
    _try(report, lambda: check_against_folder(index.path, index.file_names, part.images, "images", options.outside))
    _try(report, lambda: check_classes(index, classes))
    if part.maps:
        _check_panoptic(report, part, options)
    elif options.masks:
        _check_masks(report, index)
    sizes = _check_files(report, index) if options.decode and part.images.is_dir() else index.sizes
    _check_images(report, index, options.num_queries)
    _check_annotations(report, index, sizes, classes)
    return report


def _try(report: Report, check: Callable[[], object]) -> None:
    try:
        check()
    except (ValueError, OSError) as error:
        report.fatal.append(str(error))


def _check_masks(report: Report, index: CocoIndex) -> None:
    """Check the segmentations of instances, if there are any."""
    missing = index.segmentations.empty()
    if missing.all():
        report.table.append(("segmentations", "none: only boxes can be trained"))
        return
    if missing.any():
        report.warn("annotations without a segmentation (--masks would not start)", index.owners[missing])
    elif (index.sizes <= 0).any():
        report.warn("images without height and width (--masks would not start)", index.image_ids)
    bad = bad_masks(index)
    if bad:
        what = "segmentations cannot be drawn, --masks would not start (--boxes_only ignores them)"
        report.fatal.append(f"{len(bad)} {what}: {some(bad)}")


def _check_panoptic(report: Report, part: Part, options: Options) -> None:
    """Check the maps of a panoptic part (their pixels only when decoding), and the instances beside it."""
    index: PanopticIndex = report.index  # ty: ignore[invalid-assignment]  (read as one before)
    names = index.map_names
    _try(report, lambda: check_against_folder(index.path, names, part.maps, "panoptic maps", options.outside))
    if part.instances:
        _try(report, lambda: check_instances(part.instances, index, options.masks))
    if not (options.decode and part.maps.is_dir()):
        return

    def look(i: int) -> str:
        path = part.maps / str(names[i])
        if not report.may_read(str(names[i])):
            return ""  # reported already
        try:
            ids = read_segment_ids(path)
            if list(ids.shape) != index.sizes[i].tolist():
                return f"{path}: {list(ids.shape)} (height, width), not {index.sizes[i].tolist()}"
            check_segment_ids(str(path), np.unique(ids).tolist(), index.segment_ids[index.annotations_of(i)].tolist())
            check_colours([path])
        except FileNotFoundError:
            return ""  # reported already
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    broken = [error for error in _for_each(look, len(names), "maps") if error]
    if broken:
        report.fatal.append(f"{len(broken)} panoptic maps cannot be used: {some(broken)}")


def _for_each(look: Callable[[int], object], count: int, what: str) -> list:
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(look, range(count)), what, count, disable=None))


def _check_files(report: Report, index: CocoIndex) -> np.ndarray:
    """Decode every image; return true sizes [N, 2] (height, width), or the annotated ones where that fails."""

    def look(i: int) -> tuple[int, int, str, bool]:
        path = report.images / str(index.file_names[i])
        if not (report.may_read(str(index.file_names[i])) and path.is_file()):
            return 0, 0, "", False  # reported already
        try:
            height, width = read_image(path).shape[-2:]
            with Image.open(path) as image:
                return height, width, "", image.getexif().get(ROTATION, 1) != 1
        except (ValueError, OSError) as error:
            return 0, 0, str(error), False

    rows = _for_each(look, len(index.image_ids), "images")
    broken = [error for *_, error, _ in rows if error]
    if broken:
        report.fatal.append(f"{len(broken)} images cannot be decoded, training would stop there: {some(broken)}")
    sizes = np.array([row[:2] for row in rows])
    differ = ((sizes != index.sizes) & (sizes > 0) & (index.sizes > 0)).any(1).nonzero()[0]
    examples = [f"{index.file_names[i]} is {sizes[i].tolist()}, not {index.sizes[i].tolist()}" for i in differ]
    if examples:
        report.fatal.append(
            f"{len(examples)} images of another (height, width) than listed, training would stop there: "
            f"{some(examples)}"
        )
        report.suspects |= {int(i): "another size than listed" for i in differ}
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
    for what, examples in suspicious_images(index):
        report.warn(what, examples)


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
        report.warnings.append(f"{text}: {some(examples)}")

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
        text = f"{len(holes)}, harmless, each costs a row of the class head: {some(holes)}"
        report.table.append(("unused ids", text))
    for row in sorted(per_category, key=lambda row: row["id"]):
        report.table.append((f"  {row['id']} {row['name']}", f"{row['ann_count']} in {row['img_count']} images"))
