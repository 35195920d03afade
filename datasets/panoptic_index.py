"""COCO's panoptic file as a few arrays, checked: a CocoIndex whose annotations are segments."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.coco_index import CocoIndex, Rows, bad_numbers, read_lists, text
from datasets.json_file import report, shortened, whole

LARGEST_ID = 256**3 - 1


@dataclass
class PanopticIndex(CocoIndex):
    """A CocoIndex of segments; each image has a panoptic map, a PNG of segment ids."""

    segment_ids: np.ndarray | None = None  # [A] int64
    map_names: np.ndarray | None = None  # [N] of str
    things: tuple[int, ...] = ()  # category ids, ascending


@dataclass
class _PanopticRows(Rows):
    """Columns of a panoptic file: `owners` and the other columns of Rows have a row for each segment."""

    map_owners: array = field(default_factory=lambda: array("q"))  # image id of each map
    map_names: list = field(default_factory=list)
    segment_ids: array = field(default_factory=lambda: array("q"))

    def map(self, record: dict) -> None:
        """Add a record of `annotations`: a map and its segments."""
        try:
            owner, name, segments = whole(record["image_id"]), text(record["file_name"]), record["segments_info"]
            ids = array("q", [whole(segment["id"]) for segment in segments])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self.malformed.append(f"{shortened(record)}: {error!r}")
            return
        before = len(self.malformed)
        for segment in segments:
            self.annotation({**segment, "image_id": owner})
        if len(self.malformed) == before:  # otherwise the file is refused anyway
            self.map_owners.append(owner)
            self.map_names.append(name)
            self.segment_ids.extend(ids)


def read_panoptic_index(path: str | Path) -> PanopticIndex:
    """Read a COCO panoptic file. Raises FileNotFoundError, or ValueError for a file that cannot be used."""
    rows = _PanopticRows()
    read_lists(path, rows, rows.map, "panoptic", ("images", "annotations", "categories"))
    images, owners = rows.sorted_images(), np.asarray(rows.owners)
    segment_ids, labels = np.asarray(rows.segment_ids), np.asarray(rows.labels)
    map_owners = np.asarray(rows.map_owners)
    maps, order = np.argsort(map_owners, kind="stable"), np.argsort(owners, kind="stable")
    boxes, area, iscrowd = np.asarray(rows.boxes).reshape(-1, 4), np.asarray(rows.area), np.asarray(rows.iscrowd)
    report(path, [
        *_map_problems(images["image_ids"], map_owners[maps]),
        *_segment_problems(owners, segment_ids, labels, rows.categories),
        *bad_numbers(owners, boxes, area, iscrowd),
        ("categories whose isthing is not 0 or 1", [c for c in rows.categories if c.get("isthing") not in (0, 1)]),
    ])  # fmt: skip
    return PanopticIndex(
        path=str(path),
        **images,
        first=np.searchsorted(owners[order], np.append(images["image_ids"], np.iinfo(np.int64).max)),
        boxes=boxes[order],
        labels=labels[order],
        area=area[order],
        iscrowd=iscrowd[order].astype(np.int64),
        categories={whole(c["id"]): str(c.get("name", c["id"])) for c in rows.categories},
        segment_ids=segment_ids[order],
        map_names=np.array(rows.map_names, dtype=str)[maps],
        things=tuple(sorted(whole(c["id"]) for c in rows.categories if c["isthing"])),
    )


def _map_problems(image_ids: np.ndarray, map_owners: np.ndarray) -> list[tuple[str, Iterable]]:
    return [
        ("images with more than one map", map_owners[1:][map_owners[1:] == map_owners[:-1]]),
        ("images without a map", np.setdiff1d(image_ids, map_owners)),
        ("maps of images that are not listed", np.setdiff1d(map_owners, image_ids)),
    ]


def _segment_problems(
    owners: np.ndarray, ids: np.ndarray, labels: np.ndarray, categories: list[dict]
) -> list[tuple[str, Iterable]]:
    keys, times = np.unique(np.stack([owners, ids]), axis=1, return_counts=True)

    def examples(bad: np.ndarray) -> list[str]:
        triples = zip(owners[bad], ids[bad], labels[bad], strict=True)
        return [f"image {i} (segment {segment}, category {label})" for i, segment, label in triples]

    return [
        ("segments that share an id within an image", [f"image {i} (segment {s})" for i, s in keys.T[times > 1]]),
        ("segments with an id below 1 (0 is void)", examples(ids < 1)),
        (
            f"segments with an id above {LARGEST_ID} (the largest that a colour can encode)",
            examples(ids > LARGEST_ID),
        ),
        ("segments of a category that is not listed", examples(~np.isin(labels, [c["id"] for c in categories]))),
    ]
