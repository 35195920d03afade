"""Masks in every spelling of COCO's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from datasets.masks import (
    check_colours,
    check_segment_ids,
    decode_mask,
    decode_masks,
    encode_masks,
    read_segment_ids,
    usable_polygons,
)

DRAWN = np.zeros((6, 8), bool)
DRAWN[1:4, 2:7] = True


def test_polygons_and_runs_compressed_or_not_are_the_same_mask():
    compressed = mask_api.encode(np.asfortranarray(DRAWN.astype(np.uint8)))
    columns, counts = DRAWN.T.ravel(), [0]  # runs go down the columns and begin with zeros
    for k, value in enumerate(columns):
        if k and value != columns[k - 1]:
            counts.append(0)
        counts[-1] += 1
    spellings = [
        [[2, 1, 7, 1, 7, 4, 2, 4]],
        [[2, 1, 5, 1, 5, 4, 2, 4], [4, 1, 7, 1, 7, 4, 4, 4]],  # two parts, overlapping
        {"size": [6, 8], "counts": counts},
        compressed,
        {"size": [6, 8], "counts": compressed["counts"].decode()},
    ]
    for spelling in spellings:
        assert np.array_equal(decode_mask(spelling, 6, 8), DRAWN), spelling


@pytest.mark.parametrize("broken, words", [
    ([], "neither"), ([[1, 2, 3, 4]], "at least three points"), (None, "neither"), ({"counts": [48]}, "neither"),
    ({"size": [8, 6], "counts": [48]}, r"\[8, 6\] for an image of \[6, 8\]"),
    ({"size": [6, 8], "counts": [40]}, "40 pixels for an image of 48"),
    ({"size": [6, 8], "counts": "11"}, "2 pixels for an image of 48"),
    ({"size": [6, 8], "counts": "abc"}, "compressed text"), ({"size": [6, 8], "counts": ""}, "compressed text"),
    ({"size": [6, 8], "counts": [-8, 56]}, "48 pixels"), ({"size": [6, 8], "counts": [24.5, "x"]}, "not whole numbers"),
    ({"size": [6, 8], "counts": [24.5, 23.5]}, "not whole numbers"), ({"size": [6, 8], "counts": [[24, 24]]}, "whole"),
    ({"size": [6, 8], "counts": [2**62, 2**62, 2**62, 2**62 + 48]}, "pixels for an image of 48"),
    ({"size": 48, "counts": [48]}, "of size 48"), ({"size": None, "counts": [48]}, "of size None"),
    ({"size": [6, 8], "counts": []}, "0 pixels"), ({"size": [6, 8], "counts": 48}, "not whole numbers"),
    ({"size": [6, 8], "counts": [float("nan")]}, "not whole numbers"),
    ([[1, 1, 10**400, 1, 9, 9]], "not finite"), ([[1, 1, 9, 1, 9, True, "9", 9]], "not a number"),
])  # fmt: skip
def test_broken_masks_are_named(broken, words):
    with pytest.raises(ValueError, match=f"a.json: image 7: segmentation 1 .*{words}"):
        decode_masks([[[2, 1, 7, 1, 7, 4, 2, 4]], broken], 6, 8, "a.json: image 7")


def test_encoded_masks_decode_to_the_same_pixels():
    masks = torch.zeros(4, 6, 8, dtype=torch.bool)
    masks[0, 1:4, 2:7] = masks[1, 2:6, :5] = masks[2, 5, 7] = True  # the last is empty
    codes = encode_masks(masks)
    assert all(isinstance(code["counts"], str) for code in codes)
    assert torch.equal(decode_masks(codes, 6, 8, ""), masks)
    assert encode_masks(masks[:0]) == [] and decode_masks([], 6, 8, "").shape == (0, 6, 8)


def test_a_map_is_read_by_its_colours(tmp_path):
    ids = np.array([[0, 1, 255], [256, 65536, 65536 * 3 + 256 * 2 + 1]])
    file = io.BytesIO()
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(file, "PNG")
    assert np.array_equal(read_segment_ids(io.BytesIO(file.getvalue())), ids)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png.*not a readable panoptic map"):
        read_segment_ids(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="b.png"):
        read_segment_ids(tmp_path / "b.png")


def test_ids_are_compared_both_ways():
    check_segment_ids("x.png", [0, 3, 5], [5, 3])
    with pytest.raises(ValueError, match=r"x.png.*without a pixel: \[7\].*not listed: \[5\]"):
        check_segment_ids("x.png", [0, 3, 5], [3, 7])


def test_compressed_runs_are_decoded_like_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0.001, 0.02, 0.5, 0.99):
        mask = (rng.random((190, 210)) < density).astype(np.uint8)
        code = mask_api.encode(np.asfortranarray(mask))
        assert np.array_equal(decode_mask(code, 190, 210), mask)
    for mask in (np.zeros((500, 700), np.uint8), np.ones((500, 700), np.uint8)):
        assert np.array_equal(decode_mask(mask_api.encode(np.asfortranarray(mask)), 500, 700), mask)


@pytest.mark.parametrize("dtype, factor", [(np.uint8, 1), (np.uint16, 300)])
def test_a_map_of_one_channel_holds_the_ids(tmp_path, dtype, factor):
    ids = np.array([[1, 1, 2], [2, 0, 7]]) * factor
    Image.fromarray(ids.astype(dtype)).save(tmp_path / "grey.png")
    assert np.array_equal(read_segment_ids(tmp_path / "grey.png"), ids)


@pytest.mark.parametrize("mode", ["LA", "CMYK", "F", "1"])
def test_a_map_of_other_pixels_is_refused(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=f"a.tiff: not a readable panoptic map .*mode {mode}"):
        read_segment_ids(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_map_of_colours_is_allowed_and_grey_is_named(tmp_path, mode):
    Image.new("RGB", (4, 3), (7, 1, 0)).convert(mode).save(tmp_path / "a.png")
    check_colours([tmp_path / "a.png"])
    assert (read_segment_ids(tmp_path / "a.png") == 263).all() or mode == "P"
    Image.new("L", (4, 3)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match="grey.png: a panoptic map of one channel .grey, mode L.*RGB"):
        check_colours([tmp_path / "a.png", tmp_path / "grey.png"])


def test_polygons_of_many_points_are_bounded_by_each_coordinate():
    long = [5000.0] * 2000  # as one vector longer than the largest coordinate
    assert usable_polygons([long]) == [long]
    for bad in (float("nan"), -1e5, 1e5, float("inf")):
        with pytest.raises(ValueError, match="not finite or beyond 100000"):
            usable_polygons([[*long, bad, 1.0]])
