"""COCO's annotation file as a few arrays, checked.

pycocotools keeps every annotation as a dict: gigabytes for COCO's train2017, and touched, so copied, in every worker.
Arrays of numbers take a hundredth of that and are shared.
"""

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SHOWN = 5  # culprits named in an error


@dataclass
class CocoIndex:
    """Images sorted by id, and their annotations laid end to end, in the order of the file."""

    path: str
    image_ids: np.ndarray  # [N] int64
    file_names: np.ndarray  # [N] of str
    sizes: np.ndarray  # [N, 2] int32, (height, width) as the file says; 0 where it does not
    first: np.ndarray  # [N + 1]: annotations first[i] to first[i + 1] belong to image i
    boxes: np.ndarray  # [A, 4] float32, (x, y, width, height) in pixels
    labels: np.ndarray  # [A] int64, category ids
    area: np.ndarray  # [A] float32
    iscrowd: np.ndarray  # [A] int64
    categories: dict[int, str]
    segmentations: "JsonColumn | None" = None

    def annotations_of(self, i: int) -> slice:
        """Where the annotations of image i stand in the arrays."""
        return slice(int(self.first[i]), int(self.first[i + 1]))

    @property
    def num_classes(self) -> int:
        """The largest category id + 1: ids may have holes, and are used as they are."""
        return max(self.categories) + 1


class JsonColumn:
    """Values of any shape, one for each annotation, kept as JSON text in one array and parsed when asked for."""

    def __init__(self):
        self.text, self.ends = bytearray(), array("q", [0])

    def append(self, value) -> None:
        """Add the value of the next annotation."""
        self.text += json.dumps(value, separators=(",", ":")).encode()
        self.ends.append(len(self.text))

    def seal(self, order: np.ndarray) -> "JsonColumn":
        """Fix the order in which `self[k]` counts."""
        ends = np.asarray(self.ends)
        self.begin, self.end = ends[:-1][order], ends[1:][order]
        self.text = np.frombuffer(bytes(self.text), np.uint8)
        del self.ends
        return self

    def empty(self) -> np.ndarray:
        """Where the value is null, [] or {}."""
        return self.end - self.begin <= len("null")

    def __getitem__(self, k: int):
        return json.loads(self.text[self.begin[k] : self.end[k]].tobytes())


@dataclass
class _Rows:
    """What the parser meets, field by field: nothing else of the file is kept."""

    image_ids: array = field(default_factory=lambda: array("q"))
    file_names: list = field(default_factory=list)
    sizes: array = field(default_factory=lambda: array("i"))
    owners: array = field(default_factory=lambda: array("q"))
    boxes: array = field(default_factory=lambda: array("f"))
    labels: array = field(default_factory=lambda: array("q"))
    area: array = field(default_factory=lambda: array("f"))
    iscrowd: array = field(default_factory=lambda: array("b"))
    segmentations: JsonColumn | None = None
    malformed: list = field(default_factory=list)

    def take(self, record: dict):
        """Called by the JSON parser for every object: move what is ours into the columns, return the rest."""
        try:
            if "image_id" in record:
                self._annotation(record)
            elif "file_name" in record and "id" in record:
                self._image(record)
            else:
                return record
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self.malformed.append(f"{shortened(record)}: {error!r}")
        return None

    def _image(self, record: dict) -> None:
        name = str(record["file_name"])
        height, width = whole(record.get("height") or 0), whole(record.get("width") or 0)
        self.image_ids.append(whole(record["id"]))
        self.file_names.append(name)
        self.sizes.extend((height, width))

    def _annotation(self, record: dict) -> None:
        x, y, w, h = array("f", record["bbox"])
        owner, label = whole(record["image_id"]), whole(record["category_id"])
        area, crowd = record.get("area"), whole(record.get("iscrowd") or 0)
        area = w * h if area is None else area
        if self.segmentations is not None:
            self.segmentations.append(record.get("segmentation"))
        self.owners.append(owner)
        self.labels.append(label)
        self.boxes.extend((x, y, w, h))
        self.area.append(area)
        self.iscrowd.append(crowd)


def read_coco_index(path: str | Path, with_segmentations: bool = False) -> CocoIndex:
    """Read a COCO instances file.

    Missing `area` becomes width times height, missing `iscrowd` 0. Raises FileNotFoundError, or ValueError for a file
    that is not JSON, not COCO's, or holds records that cannot be used.
    """
    rows = _Rows(segmentations=JsonColumn() if with_segmentations else None)
    top = read_json(path, rows.take)
    missing = [
        name
        for name in ("images", "annotations", "categories")
        if not isinstance(top, dict) or not isinstance(top.get(name), list)
    ]
    if missing:
        raise ValueError(f"{path}: not a COCO instances file: no list named {', '.join(map(repr, missing))} at its top")
    report(path, [("records that cannot be read", rows.malformed), *left_over(top)])
    categories = {whole(c["id"]): str(c.get("name", c["id"])) for c in top["categories"]}

    images = np.argsort(np.asarray(rows.image_ids), kind="stable")
    image_ids = np.asarray(rows.image_ids)[images]
    owners = np.asarray(rows.owners)
    position = np.searchsorted(image_ids, owners)
    unknown = ~np.isin(owners, image_ids)
    order = np.argsort(position, kind="stable")
    index = CocoIndex(
        path=str(path),
        image_ids=image_ids,
        file_names=np.array(rows.file_names, dtype=str)[images],
        sizes=np.asarray(rows.sizes).reshape(-1, 2)[images],
        first=np.searchsorted(position[order], np.arange(len(image_ids) + 1)),
        boxes=np.asarray(rows.boxes).reshape(-1, 4)[order],
        labels=np.asarray(rows.labels)[order],
        area=np.asarray(rows.area)[order],
        iscrowd=np.asarray(rows.iscrowd)[order].astype(np.int64),
        categories=categories,
        segmentations=rows.segmentations and rows.segmentations.seal(order),
    )
    owner_of = owners[order]
    stray = ~np.isin(index.labels, list(categories))
    broken = ~np.isfinite(index.boxes).all(1)
    repeated = image_ids[1:][image_ids[1:] == image_ids[:-1]]
    report(
        path,
        [
            ("images with an id used before", repeated),
            ("annotations of images that are not listed", [f"image {i}" for i in owners[unknown]]),
            ("annotations of a category that is not listed", _culprits(owner_of, stray, index.labels, "category")),
            ("boxes that are not finite", _culprits(owner_of, broken, index.boxes, "box")),
            ("negative category ids", [c for c in categories if c < 0]),
            ("no images at all", [] if len(image_ids) else ["'images' is empty"]),
            ("no categories at all", [] if categories else ["'categories' is empty"]),
        ],
    )
    return index


def check_against_folder(
    index: CocoIndex, folder: str | Path, names: Iterable[str] | None = None, what: str = "images"
) -> None:
    """Raise ValueError if files of the index (its images by default) are not in the folder.

    If there is no folder, that is a FileNotFoundError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of {what} (annotations: {index.path})")
    there: dict[Path, set[str]] = {}  # one listing for each folder instead of a question for each file
    absent = []
    for name in index.file_names if names is None else names:
        path = folder / str(name)
        if path.parent not in there:
            there[path.parent] = {p.name for p in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in there[path.parent]:
            absent.append(str(name))
    report(index.path, [(f"{what} that are not in {folder}", absent)])


def check_sizes(index: CocoIndex) -> None:
    """Raise ValueError if the file does not say of every image how large it is."""
    report(index.path, [("images without height and width", index.image_ids[(index.sizes <= 0).any(1)])])


def check_masks(index: CocoIndex) -> None:
    """Raise ValueError if an annotation has no segmentation, or an image no size to draw it in."""
    check_sizes(index)
    owner_of = np.repeat(index.image_ids, np.diff(index.first))
    what = "annotations without a segmentation (without --masks they can be used)"
    report(index.path, [(what, _culprits(owner_of, index.segmentations.empty(), index.labels, "category"))])


def check_classes(index: CocoIndex, num_classes: int) -> None:
    """Raise ValueError if an annotation's class id does not fit a model of `num_classes` classes.

    Id K itself would train as "no object" without a word.
    """
    owner_of = np.repeat(index.image_ids, np.diff(index.first))
    beyond = index.labels >= num_classes
    needed = index.labels.max(initial=0) + 1
    what = f"annotations of classes outside 0..{num_classes - 1} (--num_classes must be at least {needed})"
    report(index.path, [(what, _culprits(owner_of, beyond, index.labels, "category"))])


def report(path: str | Path, problems: Iterable[tuple[str, Iterable]]) -> None:
    """Raise one ValueError that tells every kind of problem found, its count, and its first few culprits."""
    lines = []
    for what, culprits in problems:
        culprits = list(culprits)
        if culprits:
            more = ", ..." if len(culprits) > SHOWN else ""
            lines.append(f"  {len(culprits)} {what}: {', '.join(map(str, culprits[:SHOWN]))}{more}")
    if lines:
        raise ValueError("\n".join([f"{path} cannot be used:", *lines]))


def read_json(path: str | Path, object_hook=None):
    """Parse a JSON file; ValueError names a file that is not JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    try:
        return json.loads(text, object_hook=object_hook)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def _culprits(owners: np.ndarray, bad: np.ndarray, values: np.ndarray, name: str) -> list[str]:
    return [f"image {i} ({name} {v})" for i, v in zip(owners[bad], values[bad].tolist(), strict=True)]


def left_over(top: dict) -> list[tuple[str, list]]:
    """Tell, for `report`, of records that lack what makes them an image, an annotation or a category.

    What has it was taken by the parser, which leaves None in the lists.
    """
    odd = [shortened(record) for name in ("images", "annotations") for record in top[name] if record is not None]
    nameless = [shortened(c) for c in top["categories"] if not (isinstance(c, dict) and _is_whole(c.get("id")))]
    return [
        ("records without id, file_name or image_id", odd),
        ("categories without a whole number as id", nameless),
    ]


def whole(value) -> int:
    """Take an id or a count as int. ValueError for text: COCO's code would look for the number, in vain."""
    if not _is_whole(value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _is_whole(value) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def shortened(record) -> str:
    """Show the beginning of a record."""
    text = repr(record)
    return text if len(text) <= 120 else text[:117] + "..."
