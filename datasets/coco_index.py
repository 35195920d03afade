"""COCO's annotation file as a few arrays, checked.

pycocotools keeps every annotation as a dict: 2.5 GB for COCO's train2017, copied into every worker process. Arrays take
a hundredth of that and are shared.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.json_file import JsonColumn, is_whole, read_json, read_records, report, shortened, whole
from datasets.masks import usable_polygons

__all__ = ["CocoIndex", "read_coco_index", "read_json"]
LARGEST_CATEGORY_ID = 99_999  # the model has one output per id up to the largest, used or not


@dataclass
class CocoIndex:
    """Images sorted by id, with their annotations in consecutive rows, in the order of the file."""

    path: str
    image_ids: np.ndarray  # [N] int64
    file_names: np.ndarray  # [N] of str
    sizes: np.ndarray  # [N, 2] int32, (height, width) as listed in the file; 0 where missing
    first: np.ndarray  # [N + 1]: annotations first[i] to first[i + 1] belong to image i
    boxes: np.ndarray  # [A, 4] float32, (x, y, width, height) in pixels
    labels: np.ndarray  # [A] int64, category ids
    area: np.ndarray  # [A] float32
    iscrowd: np.ndarray  # [A] int64
    categories: dict[int, str]
    segmentations: JsonColumn | None = None
    bad_polygons: list[str] = field(default_factory=list)  # descriptions of those that cannot be drawn

    def annotations_of(self, i: int) -> slice:
        """Return the rows of the annotations of image number i."""
        return slice(int(self.first[i]), int(self.first[i + 1]))

    def annotations(self, i: int) -> list[dict]:
        """Return the annotations of image number i as records with COCO's names."""
        where = self.annotations_of(i)
        columns = (self.boxes[where], self.labels[where], self.area[where], self.iscrowd[where])
        records = [
            {"bbox": box, "category_id": label, "area": area, "iscrowd": crowd}
            for box, label, area, crowd in zip(*(column.tolist() for column in columns), strict=True)
        ]
        if self.segmentations is not None:
            for k, record in enumerate(records, start=where.start):
                record["segmentation"] = self.segmentations[k]
        return records

    def row_of(self, image_id: int) -> int:
        """Return the number of an image in the arrays; KeyError for an id that is not listed."""
        row = int(np.searchsorted(self.image_ids, image_id))
        if row == len(self.image_ids) or self.image_ids[row] != image_id:
            raise KeyError(f"{self.path}: no image with id {image_id}")
        return row

    @property
    def owners(self) -> np.ndarray:
        """Image id of every annotation, [A]."""
        return np.repeat(self.image_ids, np.diff(self.first))

    @property
    def num_classes(self) -> int:
        """The largest category id + 1: ids are used as they are and may have holes."""
        return max(self.categories) + 1


@dataclass
class Rows:
    """Columns that are filled while the file is parsed; `images` and `categories` are the same in all COCO files."""

    image_ids: array = field(default_factory=lambda: array("q"))
    file_names: list = field(default_factory=list)
    sizes: array = field(default_factory=lambda: array("i"))
    categories: list = field(default_factory=list)
    owners: array = field(default_factory=lambda: array("q"))  # image id of each annotation
    boxes: array = field(default_factory=lambda: array("f"))
    labels: array = field(default_factory=lambda: array("q"))
    area: array = field(default_factory=lambda: array("f"))
    iscrowd: array = field(default_factory=lambda: array("b"))
    segmentations: JsonColumn | None = None
    malformed: list = field(default_factory=list)
    bad_polygons: list = field(default_factory=list)

    # Columns may differ in length after a record that cannot be read: the file is refused then.

    def image(self, record: dict) -> None:
        """Add a record of `images`."""
        try:
            self.image_ids.append(whole(record["id"]))
            self.file_names.append(text(record["file_name"]))
            self.sizes.append(whole(record.get("height") or 0))
            self.sizes.append(whole(record.get("width") or 0))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self.malformed.append(f"{shortened(record)}: {error!r}")

    def annotation(self, record: dict) -> None:
        """Add a record of an instances file's `annotations`."""
        try:
            x, y, w, h = record["bbox"]
            self.boxes.extend((x, y, w, h))
            self.owners.append(whole(record["image_id"]))
            self.labels.append(whole(record["category_id"]))
            self.iscrowd.append(whole(record.get("iscrowd") or 0))
            area = record.get("area")
            self.area.append(max(w, 0) * max(h, 0) if area is None else area)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self.malformed.append(f"{shortened(record)}: {error!r}")
            return
        if self.segmentations is not None:
            self._segmentation(record.get("segmentation"), self.owners[-1])

    def _segmentation(self, value, owner: int) -> None:
        try:
            if isinstance(value, list) and value:
                usable_polygons(value)
        except ValueError as error:
            self.bad_polygons.append(f"image {owner} ({shortened(value)[:60]}: {error})")
        self.segmentations.append(value)

    def sorted_images(self) -> dict[str, np.ndarray]:
        """Return the images' columns in the order of their ids, by the names that CocoIndex gives them."""
        ids = np.asarray(self.image_ids)
        order = np.argsort(ids, kind="stable")
        return {
            "image_ids": ids[order],
            "file_names": np.array(self.file_names, dtype=str)[order],
            "sizes": np.asarray(self.sizes).reshape(-1, 2)[order],
        }

    def problems(self) -> list[tuple[str, Iterable]]:
        """List what is wrong with images and categories, for `report`."""
        ids = np.sort(np.asarray(self.image_ids))
        odd = [c for c in self.categories if not (isinstance(c, dict) and is_whole(c.get("id")))]
        times = Counter(c["id"] for c in self.categories if c not in odd)
        return [
            ("records that cannot be read", self.malformed),
            ("images with an id used before", ids[1:][ids[1:] == ids[:-1]]),
            ("no images at all", [] if len(ids) else ["'images' is empty"]),
            ("no categories at all", [] if self.categories else ["'categories' is empty"]),
            ("categories without a whole number as id", map(shortened, odd)),
            ("category ids listed more than once", [i for i, n in times.items() if n > 1]),
            ("negative category ids", [i for i in times if i < 0]),
            (
                f"category ids above {LARGEST_CATEGORY_ID} (renumber the categories from 1: the model has an output "
                "for every id up to the largest)",
                [i for i in times if i > LARGEST_CATEGORY_ID],
            ),
        ]


def read_lists(path: str | Path, rows: Rows, annotation, kind: str, required: tuple[str, ...]) -> None:
    """Fill `rows` from the top-level lists of a COCO file; `annotation` reads a record of its `annotations`.

    Raises FileNotFoundError, or ValueError for a file that is not JSON, not COCO's, or has unusable images or
    categories.
    """
    readers = {"images": rows.image, "annotations": annotation, "categories": rows.categories.append}
    found = read_records(path, readers)
    missing = [name for name in required if name not in found]
    if missing:
        raise ValueError(f"{path}: not a COCO {kind} file: no list named {', '.join(map(repr, missing))} at the top")
    report(path, rows.problems())


def read_coco_index(path: str | Path, with_segmentations: bool = False) -> CocoIndex:
    """Read a COCO instances file, or one without `annotations` (COCO's test sets).

    Only the top-level lists `images`, `annotations` and `categories` are read. Missing `area` becomes width times
    height, missing `iscrowd` 0. Raises FileNotFoundError, or ValueError for a file that is not JSON, not COCO's, or
    holds records that cannot be used.
    """
    rows = Rows(segmentations=JsonColumn() if with_segmentations else None)
    read_lists(path, rows, rows.annotation, "instances", ("images", "categories"))
    images, owners = rows.sorted_images(), np.asarray(rows.owners)
    image_ids = images["image_ids"]
    position = np.searchsorted(image_ids, owners)
    order = np.argsort(position, kind="stable")
    index = CocoIndex(
        path=str(path),
        **images,
        first=np.searchsorted(position[order], np.arange(len(image_ids) + 1)),
        boxes=np.asarray(rows.boxes).reshape(-1, 4)[order],
        labels=np.asarray(rows.labels)[order],
        area=np.asarray(rows.area)[order],
        iscrowd=np.asarray(rows.iscrowd)[order].astype(np.int64),
        categories={whole(c["id"]): str(c.get("name", c["id"])) for c in rows.categories},
        segmentations=rows.segmentations and rows.segmentations.seal(order),
        bad_polygons=rows.bad_polygons,
    )
    report(path, _annotation_problems(index, owners[order]))
    return index


def _annotation_problems(index: CocoIndex, owners: np.ndarray) -> list[tuple[str, Iterable]]:
    """List what is wrong with annotations; `owners` are their image ids, listed or not."""
    stray = ~np.isin(index.labels, list(index.categories))
    return [
        (
            "annotations of images that are not listed",
            [f"image {i}" for i in owners[~np.isin(owners, index.image_ids)]],
        ),
        (
            "annotations of a category that is not listed",
            [f"image {i} (category {c})" for i, c in zip(owners[stray], index.labels[stray].tolist(), strict=True)],
        ),
        *bad_numbers(owners, index.boxes, index.area, index.iscrowd),
    ]


def bad_numbers(
    owners: np.ndarray, boxes: np.ndarray, area: np.ndarray, iscrowd: np.ndarray
) -> list[tuple[str, Iterable]]:
    """List what is wrong with the numbers of annotations or segments; `owners` are their image ids."""

    def examples(bad: np.ndarray, values: np.ndarray, name: str) -> list[str]:
        return [f"image {i} ({name} {v})" for i, v in zip(owners[bad], values[bad].tolist(), strict=True)]

    broken = ~np.isfinite(boxes).all(1)
    return [
        ("boxes that are not finite", examples(broken, boxes, "box")),
        (
            "areas that are negative or not finite (remove `area`: width times height is used then)",
            examples(~broken & ~(np.isfinite(area) & (area >= 0)), area, "area"),
        ),
        ("values of iscrowd other than 0 and 1", examples(~np.isin(iscrowd, (0, 1)), iscrowd, "iscrowd")),
    ]


def text(name) -> str:
    """Return a file name; TypeError for a value that is no text."""
    if not isinstance(name, str):
        raise TypeError(f"file_name {name!r} is not text")
    return name
