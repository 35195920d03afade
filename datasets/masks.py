"""Masks in COCO's spellings, polygons, run-length codes and maps of segment ids, become pixels."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_api
from torch import Tensor


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Return a segmentation as bool [H, W].

    It is a list of polygons [x0, y0, x1, y1, ...], whose union counts, or a run-length code: a dict of `size` (height,
    width) and `counts`, a list of numbers or COCO's compressed text. Raises ValueError for anything else.
    """
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        return _decode_runs(segmentation, height, width)
    polygons = segmentation if isinstance(segmentation, list) else []
    if not polygons or not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
        raise ValueError("neither polygons of at least three points nor a run-length code")
    return mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, height, width))).astype(bool)


def _decode_runs(code: dict, height: int, width: int) -> np.ndarray:
    if list(code["size"]) != [height, width]:
        raise ValueError(f"a run-length code of size {list(code['size'])} for an image of {[height, width]}")
    counts = code["counts"]
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise ValueError(f"runs of {sum(counts)} pixels for an image of {height * width}")
        code = mask_api.frPyObjects(code, height, width)
    return mask_api.decode(code).astype(bool)


def decode_masks(segmentations: Iterable, height: int, width: int, where: str) -> Tensor:
    """Decode the masks of one image: bool [T, H, W]. Raises ValueError that says where and which one is broken."""
    masks = [np.zeros((0, height, width), bool)]
    for k, segmentation in enumerate(segmentations):
        try:
            masks.append(decode_mask(segmentation, height, width)[None])
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{where}: segmentation {k} ({str(segmentation)[:60]}) is not a mask: {error}; mend or remove it"
            ) from error
    return torch.from_numpy(np.concatenate(masks))


def encode_masks(masks: Tensor) -> list[dict]:
    """Turn 0/1 masks [N, H, W] into COCO's compressed run-length codes, ready for JSON."""
    # pycocotools reads columns first, one mask after the other.
    codes = mask_api.encode(np.asfortranarray(masks.cpu().byte().permute(1, 2, 0).numpy()))
    return [{"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()} for code in codes]


def read_segment_ids(file: str | Path | BinaryIO) -> np.ndarray:
    """Read a panoptic map, a PNG whose colour is an id (R + 256 G + 256^2 B): int64 [H, W], 0 for no segment.

    Raises FileNotFoundError, or ValueError naming a file that cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            colours = np.asarray(image.convert("RGB"), dtype=np.int64)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such panoptic map") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file}: not a readable panoptic map ({error})") from error
    return colours @ np.array([1, 256, 256**2])


def check_segment_ids(where: str, painted: Collection[int], listed: Collection[int]) -> None:
    """Raise ValueError if the ids in a panoptic map (0 aside) are not just those listed for it."""
    absent, stray = sorted(set(listed) - set(painted)), sorted(set(painted) - set(listed) - {0})
    if absent or stray:
        raise ValueError(
            f"{where}: the map does not go with its segments_info: listed but without a pixel: {absent[:5]}; "
            f"painted but not listed: {stray[:5]}; the JSON and the PNG must come from the same annotation"
        )
