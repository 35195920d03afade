"""Image sizes, as callers give them."""

from collections.abc import Sequence

from torch import Tensor


def as_pairs(sizes: Tensor | Sequence) -> list[tuple[int, int]]:
    """Return (height, width) of each image as integers, from a tensor [B, 2] or a list of pairs or tensors [2]."""
    if isinstance(sizes, Tensor):
        sizes = sizes.tolist()  # at once, which copies from a GPU only once
    rows = [size.tolist() if isinstance(size, Tensor) else size for size in sizes]
    return [(int(height), int(width)) for height, width in rows]
