"""Checks of annotations when a dataset is built: errors are reported together, suspicious content is warned of."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.coco_index import CocoIndex
from datasets.json_file import SHOWN, report
from datasets.masks import check_run_lengths
from util.logger import logger
from util.text import printable

COUNTED = 100  # detections of an image that COCO's AP counts
SAMPLE = 16  # images whose size is compared with the listed one before training starts
SLACK = 1  # pixels that a box may extend beyond its image: coordinates are rounded, by annotation tools and in float32

FEW = 1000  # training images
FEW_FOR_RECIPE = {"small": 100}  # where it is another number


def check_sizes(index: CocoIndex) -> None:
    """Raise ValueError if the file does not list the size of every image."""
    report(index.path, [("images without height and width", index.image_ids[(index.sizes <= 0).any(1)])])


def check_classes(index: CocoIndex, num_classes: int) -> None:
    """Raise ValueError if an annotation's class id does not fit a model of `num_classes` classes.

    Class `num_classes` itself would be trained as "no object".
    """
    if num_classes < 1:
        raise ValueError(f"{num_classes} classes: at least 1")
    beyond = index.labels >= num_classes
    needed = index.labels.max(initial=0) + 1
    what = f"annotations of classes outside 0..{num_classes - 1} (--num_classes must be at least {needed})"
    examples = zip(index.owners[beyond], index.labels[beyond], strict=True)
    report(index.path, [(what, [f"image {i} (category {label})" for i, label in examples])])


def check_masks(index: CocoIndex) -> None:
    """Raise ValueError for annotations without a segmentation, or with one that cannot be drawn on its image."""
    check_sizes(index)
    missing = index.segmentations.empty()
    what = "annotations without a segmentation (without --masks they can be used)"
    examples = [f"image {i} (category {c})" for i, c in zip(index.owners[missing], index.labels[missing], strict=True)]
    report(index.path, [(what, examples), ("segmentations that cannot be drawn", bad_masks(index))])


def bad_masks(index: CocoIndex) -> list[str]:
    """Describe the segmentations that cannot be drawn; run lengths are checked where the image's size is listed."""
    codes, owners, unfit = index.segmentations, index.owners, []
    for k in (~codes.empty() & ~codes.is_list()).nonzero()[0]:
        height, width = index.sizes[index.row_of(owners[k])].tolist()
        try:
            if min(height, width) > 0:
                check_run_lengths(codes[k], height, width)
        except ValueError as error:
            unfit.append(f"image {owners[k]} ({error})")
    return [*index.bad_polygons, *unfit]


def check_sample(index: CocoIndex, folder: str | Path) -> None:
    """Open a few images, and raise ValueError if all of them have another size than listed.

    Boxes then belong to another version of the images (resized, rotated). A single one is found when it is read, or by
    tools/check_dataset.py.
    """
    rows = np.unique(np.linspace(0, len(index.image_ids) - 1, SAMPLE).astype(int))
    sizes = [(i, _size_on_disk(Path(folder) / str(index.file_names[i]))) for i in rows.tolist()]
    known = [(i, size) for i, size in sizes if size and index.sizes[i].min() > 0]
    differ = [
        f"{index.file_names[i]} is {list(size)}, not {index.sizes[i].tolist()}"
        for i, size in known
        if list(size) != index.sizes[i].tolist()
    ]
    if len(differ) == len(known):
        report(index.path, [("images, all that were opened, have another (height, width) than listed", differ)])


def _size_on_disk(path: Path) -> tuple[int, int] | None:
    """Read (height, width) from the head of an image file; None if that fails: reading the image reports it."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:
        return None


def trained_on(index: CocoIndex) -> np.ndarray:
    """Return a bool array: annotations that become objects, neither crowds nor without area inside the image."""
    corner = index.boxes[:, :2].clip(min=0)
    limits = np.where(index.sizes > 0, index.sizes, np.iinfo(np.int32).max)[:, ::-1].repeat(np.diff(index.first), 0)
    far_corner = np.minimum(index.boxes[:, :2] + index.boxes[:, 2:], limits)
    return (index.iscrowd == 0) & (far_corner > corner).all(1)


def suspicious_images(index: CocoIndex) -> Iterator[tuple[str, list]]:
    """Yield suspicious content of images and categories that does not stop training: descriptions with examples."""
    if not trained_on(index).any():
        why = "no annotation at all, or only crowds and empty boxes: there is nothing to train on or to find"
        yield why, [Path(index.path).name]
    image_of = np.repeat(np.arange(len(index.image_ids)), np.diff(index.first))
    objects = np.bincount(image_of[index.iscrowd == 0])
    crowded = [f"image {index.image_ids[i]} ({objects[i]})" for i in (objects > COUNTED).nonzero()[0]]
    yield f"images with more objects than the {COUNTED} detections of an image that AP counts", crowded
    yield "files listed for several images", _repeated(index.file_names.tolist())
    yield "names of several categories", _repeated(index.categories.values())


def suspicious_boxes(index: CocoIndex) -> Iterator[tuple[str, list]]:
    """Yield problems of boxes that training repairs: descriptions with examples."""
    owners, boxes = index.owners, index.boxes

    def examples(bad: np.ndarray) -> list[str]:
        return [f"image {i} {box}" for i, box in zip(owners[bad], boxes[bad].tolist(), strict=True)]

    flat = (index.iscrowd == 0) & (boxes[:, 2:] <= 0).any(1)
    yield "boxes without width or height (not trained on)", examples(flat)
    sizes = index.sizes[:, ::-1].repeat(np.diff(index.first), 0)
    beyond = (boxes[:, :2] < -SLACK) | (boxes[:, :2] + boxes[:, 2:] > sizes + SLACK)
    beyond = (beyond & (sizes > 0)).any(1) & ~flat
    yield "boxes that reach outside their image (cut there; are they x, y, width, height?)", examples(beyond)


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def warn_of(index: CocoIndex) -> None:
    """Log a warning for each kind of suspicious content."""
    for what, examples in (*suspicious_images(index), *suspicious_boxes(index)):
        if examples:
            logger.warning(f"{index.path}: {len(examples)} {what}: {some(examples)}")


def some(examples: Sequence) -> str:
    """Join the first examples, safe to print."""
    return ", ".join(map(printable, examples[:SHOWN])) + (", ..." if len(examples) > SHOWN else "")


def warn_of_few_images(count: int, recipe: str | None = None) -> None:
    """Log a warning if so many images are few for a training with this recipe, without a detector's weights."""
    few = FEW_FOR_RECIPE.get(recipe or "", FEW)
    if count < few:
        remedy = "" if recipe == "small" else ", or use --recipe small (docs/own-data.md)"
        logger.warning(
            f"{count} training images: without COCO weights, this recipe is meant for {few} or more. Start from COCO "
            f"weights with --finetune FILE_OR_URL{remedy}"
        )


def compare_categories(ours: Mapping[int, str], where: str, theirs: Mapping[int, str], elsewhere: str) -> list[str]:
    """Log a warning of category ids that have different names in two places, and of those that the first one lacks.

    Returns the differences. Metrics computed across the two places would be wrong.
    """
    differ = [
        f"{i} is {printable(ours[i])} in {where} and {printable(theirs[i])} in {elsewhere}"
        for i in sorted(ours.keys() & theirs.keys())
        if ours[i] != theirs[i]
    ]
    if differ:
        logger.warning(
            f"CATEGORIES MEAN DIFFERENT THINGS: {len(differ)} ids have different names: {some(differ)}. Unless these "
            "are two names of one thing, numbers for them are meaningless"
        )
    absent = [f"{i} ({theirs[i]})" for i in sorted(theirs.keys() - ours.keys())]
    if absent:
        logger.warning(f"{len(absent)} categories of {elsewhere} are not in {where}: {some(absent)}")
    return differ
