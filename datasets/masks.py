"""Masks: COCO's polygons, run-length codes and panoptic maps, to pixels and back."""

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_api
from torch import Tensor

from datasets.images import decoding
from util.text import printable

ONE_CHANNEL = ("L", "I", "I;16")  # PIL's modes
LARGEST_COORDINATE = 100_000  # pixels; pycocotools' C code ends the process on much larger ones


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Return a segmentation as bool [H, W].

    It is a list of polygons [x0, y0, x1, y1, ...], whose union counts, or a run-length code: a dict of `size` (height,
    width) and `counts`, a list of numbers or COCO's compressed text. Raises ValueError for anything else.
    """
    if isinstance(segmentation, list):
        polygons = usable_polygons(segmentation)
        return mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, height, width))).astype(bool)
    runs = check_run_lengths(segmentation, height, width)
    values = np.arange(len(runs)) % 2 == 1  # runs alternate between 0 and 1 and go down the columns
    return np.repeat(values, runs).reshape(width, height).T


def usable_polygons(segmentation: list) -> list[list[float]]:
    """Return the polygons with three points or more; like pycocotools, ignore smaller ones beside them.

    Raises ValueError if there are none, or for coordinates that cannot be drawn.
    """
    polygons = []
    for polygon in segmentation:
        if not isinstance(polygon, list):
            raise ValueError("not a list of polygons [[x0, y0, x1, y1, ...], ...]")
        if len(polygon) % 2:
            raise ValueError("a polygon with an odd number of coordinates")
        if len(polygon) < 6:
            continue
        try:
            # The Euclidean norm of all coordinates is at least the largest of them: one pass for the usual polygon.
            usable = math.hypot(*polygon) < LARGEST_COORDINATE or _bounded(polygon)
        except TypeError:
            raise ValueError("a polygon coordinate that is not a number") from None
        except OverflowError:
            usable = False
        if not usable:
            raise ValueError(f"a polygon coordinate that is not finite or beyond {LARGEST_COORDINATE}")
        polygons.append(polygon)
    if not polygons:
        raise ValueError("neither polygons of at least three points nor a run-length code")
    return polygons


def _bounded(polygon: list) -> bool:
    # Comparisons alone may miss NaN.
    return max(map(abs, polygon)) < LARGEST_COORDINATE and math.isfinite(sum(polygon))


def check_run_lengths(code: dict, height: int, width: int) -> np.ndarray:
    """Return the run lengths of a code; ValueError if they are not those of an image of this size."""
    if not isinstance(code, dict) or not {"size", "counts"} <= code.keys():
        raise ValueError("neither polygons of at least three points nor a run-length code")
    size = code["size"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"a run-length code of size {size} for an image of {[height, width]}")
    counts = code["counts"]
    try:
        runs = _whole_numbers(counts) if isinstance(counts, list) else _uncompressed(counts)
    except (TypeError, ValueError, OverflowError, IndexError):
        raise ValueError("run lengths that are not whole numbers or not COCO's compressed text") from None
    # A single length is compared too: the sum of very large ones may overflow to the right total.
    if not len(runs) or runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise ValueError(f"run lengths of {runs.sum()} pixels for an image of {height * width}")
    return runs


def _whole_numbers(counts: list) -> np.ndarray:
    numbers = np.array(counts)
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise ValueError("not finite")
    runs = numbers.astype(np.int64) if numbers.dtype.kind in "iuf" else None
    if numbers.ndim != 1 or runs is None or (runs != numbers).any():
        raise ValueError("not a list of whole numbers")
    return runs


def _uncompressed(counts: str | bytes) -> np.ndarray:
    """Decode COCO's compressed run lengths.

    Each character holds five bits of a number, lowest first, and a flag that more follow. From the fourth on, numbers
    are differences to the one before the previous one.
    """
    codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    if not len(codes) or not last[-1] or codes.min() < 0 or codes.max() > 63:
        raise ValueError("not run-length text")
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    place = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    if place.max() > 30:
        raise ValueError("a run length of more than 32 bits")
    runs = np.add.reduceat((codes & 31) << place, starts)
    runs -= ((codes[ends] & 16) != 0) * (1 << (place[ends] + 5))  # the highest bit is the sign
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def decode_masks(segmentations: Iterable, height: int, width: int, where: str) -> Tensor:
    """Decode the masks of one image: bool [T, H, W].

    Raises ValueError for one that is broken; the text begins with `where` and names it.
    """
    masks = [np.zeros((0, height, width), bool)]
    for k, segmentation in enumerate(segmentations):
        try:
            masks.append(decode_mask(segmentation, height, width)[None])
        except ValueError as error:
            raise ValueError(
                f"{where}: segmentation {k} ({str(segmentation)[:60]}) is not a mask: {error}; repair or remove it"
            ) from error
    return torch.from_numpy(np.concatenate(masks))


def encode_masks(masks: Tensor) -> list[dict]:
    """Encode 0/1 masks [N, H, W] as COCO's compressed run-length codes, ready for JSON."""
    # pycocotools needs column-major memory, one mask after the other.
    codes = mask_api.encode(np.asfortranarray(masks.cpu().byte().permute(1, 2, 0).numpy()))
    return [{"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()} for code in codes]


def read_segment_ids(file: str | Path | BinaryIO) -> np.ndarray:
    """Read a panoptic map: int64 [H, W], 0 for no segment.

    It is a PNG whose colours are ids (R + 256 G + 256^2 B); where there is one channel, its value is the id. Raises
    FileNotFoundError, or ValueError naming a file that cannot be decoded.
    """
    with decoding(file, "panoptic map"), Image.open(file) as image:
        if image.mode in ONE_CHANNEL:
            return np.asarray(image).astype(np.int64)
        if image.mode not in ("RGB", "RGBA", "P"):
            raise ValueError(f"its pixels have mode {image.mode}: expected RGB")
        colours = np.asarray(image.convert("RGB"), dtype=np.int64)
    return colours @ np.array([1, 256, 256**2])


def check_colours(maps: Iterable[str | Path]) -> None:
    """Raise ValueError for a panoptic map of one channel: PQ, like COCO's own tools, takes ids from colours only."""
    for path in maps:
        with decoding(path, "panoptic map"), Image.open(path) as image:
            mode = image.mode
        if mode in ONE_CHANNEL:
            raise ValueError(
                f"{printable(path)}: a panoptic map of one channel (grey, mode {mode}). COCO's maps are RGB, with ids "
                "R + 256 G + 256^2 B: convert them (R, G and B are id % 256, id // 256 % 256 and id // 65536)"
            )


def check_segment_ids(where: str, painted: Collection[int], listed: Collection[int]) -> None:
    """Raise ValueError if the ids in a panoptic map (without 0) are not exactly those listed for it."""
    absent, stray = sorted(set(listed) - set(painted)), sorted(set(painted) - set(listed) - {0})
    if absent or stray:
        raise ValueError(
            f"{printable(where)}: the map does not match its segments_info: listed but without a pixel: "
            f"{absent[:5]}; painted but not listed: {stray[:5]}; JSON and PNG must come from the same annotation"
        )
