"""COCO's panoptic file as a few arrays, checked: a CocoIndex with segments for annotations."""

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.coco_index import CocoIndex, left_over, read_json, report, shortened, whole


@dataclass
class PanopticIndex(CocoIndex):
    """A CocoIndex whose annotations are segments; each image has a map of their ids, a PNG."""

    segment_ids: np.ndarray | None = None  # [A] int64
    map_names: np.ndarray | None = None  # [N] of str
    things: tuple[int, ...] = ()  # category ids, ascending


@dataclass
class _Rows:
    """What the parser meets, innermost first: the segments of an image come just before the image's record."""

    image_ids: array = field(default_factory=lambda: array("q"))
    file_names: list = field(default_factory=list)
    sizes: array = field(default_factory=lambda: array("i"))
    owners: array = field(default_factory=lambda: array("q"))  # of each map
    counts: array = field(default_factory=lambda: array("q"))  # segments in each map
    map_names: list = field(default_factory=list)
    segments: array = field(default_factory=lambda: array("q"))  # id, category, iscrowd, area, of each segment
    boxes: array = field(default_factory=lambda: array("f"))
    malformed: list = field(default_factory=list)

    def take(self, record: dict):
        """Called by the JSON parser for every object: move what is ours into the columns, return the rest."""
        try:
            if "segments_info" in record:
                owner, name, count = whole(record["image_id"]), str(record["file_name"]), len(record["segments_info"])
                self.owners.append(owner)
                self.map_names.append(name)
                self.counts.append(count)
            elif "category_id" in record:
                x, y, w, h = array("f", record["bbox"])
                area = round(record.get("area", w * h))
                self.segments.extend(
                    (whole(record["id"]), whole(record["category_id"]), whole(record.get("iscrowd") or 0), area)
                )
                self.boxes.extend((x, y, w, h))
            elif "file_name" in record and "id" in record:
                name, height, width = str(record["file_name"]), whole(record["height"]), whole(record["width"])
                self.image_ids.append(whole(record["id"]))
                self.file_names.append(name)
                self.sizes.extend((height, width))
            else:
                return record
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            self.malformed.append(f"{shortened(record)}: {error!r}")
        return None


def read_panoptic_index(path: str | Path) -> PanopticIndex:
    """Read a COCO panoptic file. Raises FileNotFoundError, or ValueError for one that cannot be used."""
    rows = _Rows()
    top = read_json(path, rows.take)
    missing = [
        name
        for name in ("images", "annotations", "categories")
        if not isinstance(top, dict) or not isinstance(top.get(name), list)
    ]
    if missing:
        raise ValueError(f"{path}: not a COCO panoptic file: no list named {', '.join(map(repr, missing))} at its top")
    report(path, [("records that cannot be read", rows.malformed), *left_over(top)])
    categories = {whole(c["id"]): c for c in top["categories"]}
    image_ids, owners, counts = np.asarray(rows.image_ids), np.asarray(rows.owners), np.asarray(rows.counts)
    segments, boxes = np.asarray(rows.segments).reshape(-1, 4), np.asarray(rows.boxes).reshape(-1, 4)
    images, order = np.argsort(image_ids, kind="stable"), np.argsort(owners, kind="stable")
    image_ids = image_ids[images]
    _check(path, image_ids, owners[order], np.repeat(owners, counts), segments, boxes, categories)

    # Segments stand in the order of the maps in the file; lay them out in that of the image ids.
    start = np.cumsum(counts) - counts
    where = np.concatenate([np.arange(start[k], start[k] + counts[k]) for k in order])
    return PanopticIndex(
        path=str(path),
        image_ids=image_ids,
        file_names=np.array(rows.file_names, dtype=str)[images],
        sizes=np.asarray(rows.sizes).reshape(-1, 2)[images],
        first=np.concatenate([[0], np.cumsum(counts[order])]),
        boxes=boxes[where],
        labels=segments[where, 1],
        area=segments[where, 3].astype(np.float32),
        iscrowd=segments[where, 2],
        categories={i: str(c.get("name", i)) for i, c in categories.items()},
        segment_ids=segments[where, 0],
        map_names=np.array(rows.map_names, dtype=str)[order],
        things=tuple(sorted(i for i, c in categories.items() if c.get("isthing"))),
    )


def _check(
    path: str | Path,
    image_ids: np.ndarray,
    owners: np.ndarray,
    owner_of: np.ndarray,
    segments: np.ndarray,
    boxes: np.ndarray,
    categories: dict[int, dict],
) -> None:
    """Raise one ValueError for all that is wrong: with images and maps (ids ascending), with segments of `owner_of`."""
    ids, labels = segments[:, 0], segments[:, 1]
    keys, times = np.unique(np.stack([owner_of, ids]), axis=1, return_counts=True)

    def culprits(bad: np.ndarray) -> list[str]:
        triples = zip(owner_of[bad], ids[bad], labels[bad], strict=True)
        return [f"image {i} (segment {segment}, category {label})" for i, segment, label in triples]

    report(
        path,
        [
            ("images with an id used before", image_ids[1:][image_ids[1:] == image_ids[:-1]]),
            ("images with more than one map", owners[1:][owners[1:] == owners[:-1]]),
            ("images without a map", np.setdiff1d(image_ids, owners)),
            ("maps of images that are not listed", np.setdiff1d(owners, image_ids)),
            ("segments that share an id within an image", [f"image {i} (segment {s})" for i, s in keys.T[times > 1]]),
            ("segments with an id below 1 (0 is void)", culprits(ids < 1)),
            ("segments of a category that is not listed", culprits(~np.isin(labels, list(categories)))),
            ("segments whose box is not finite", culprits(~np.isfinite(boxes).all(1))),
            ("negative category ids", [c for c in categories if c < 0]),
            ("no images at all", [] if len(image_ids) else ["'images' is empty"]),
            ("no categories at all", [] if categories else ["'categories' is empty"]),
        ],
    )
