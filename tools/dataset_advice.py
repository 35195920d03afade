"""Advice about flags for a dataset, from its statistics."""

import math

import numpy as np

from datasets.coco_checks import FEW
from datasets.coco_index import CocoIndex

ENOUGH = 10_000  # images, from which on ImageNet's backbone is enough to start from
SMALL_BOX = 16  # pixels of the model's input: half a cell of a stride of 32
PUBLISHED = (800, 1333)
# The published recipe has 2 images of the published size on a GPU of 16 GB.
BYTES_PER_PIXEL = 16e9 / (2 * PUBLISHED[0] * PUBLISHED[1])


def advise(index: CocoIndex, num_queries: int, memory: float | None = None) -> list[str]:
    """Return sentences about the training part; `memory` is that of the GPU, in bytes, if there is one."""
    lines = [_about_images(len(index.image_ids))]
    most = int(np.diff(index.first).max(initial=0))
    enough = 10 * math.ceil(1.5 * most / 10)
    if enough <= num_queries:
        lines.append(f"at most {most} objects in an image: --num_queries {num_queries} is enough")
        if enough < num_queries / 2:
            lines.append(
                f"without COCO weights, which come with 100 queries, --num_queries {max(enough, 10)} is enough too"
            )
    else:
        lines.append(f"up to {most} objects in an image: give --num_queries {enough} or more")
    height, width = (int(side) for side in np.median(index.sizes, axis=0)) if len(index.sizes) else (0, 0)
    if min(height, width) > 0:
        lines += _about_sizes(index, height, width, memory)
    return lines


def _about_images(count: int) -> str:
    if count >= ENOUGH:
        return f"{count} images: enough to train from ImageNet's backbone"
    if count >= FEW:
        return f"{count} images: start from COCO weights (--finetune FILE_OR_URL)"
    return f"{count} images are few: start from COCO weights (--finetune FILE_OR_URL); without them, use --recipe small"


def _about_sizes(index: CocoIndex, height: int, width: int, memory: float | None) -> list[str]:
    """Advise on the image size, which decides what small objects look like and how many images fit into memory."""
    lines, (short, long) = [], sorted((height, width))
    scale = min(PUBLISHED[0] / short, PUBLISHED[1] / long)
    if scale > 1.2:
        lines.append(
            f"images of {height} x {width}: --min_size 800 enlarges them {scale:.1f} times, which helps small objects; "
            f"--min_size {short} --max_size {long} has {scale**2:.1f} times fewer pixels, for a first trial"
        )
    sides = np.sqrt(np.prod(index.boxes[:, 2:], axis=1))
    if len(sides) and (tiny := (sides * scale < SMALL_BOX).mean()) > 0.1:
        lines.append(
            f"{tiny:.0%} of the objects are below {SMALL_BOX} pixels at --min_size 800, half a cell of the features: "
            "--dilation (DC5) or a larger --min_size helps"
        )
    if memory:
        pixels = short * long * scale**2
        fits = max(int(memory / (BYTES_PER_PIXEL * pixels)), 1)
        lines.append(f"--batch_size {fits} should fit into the GPU's {memory / 1e9:.0f} GB (an estimate for ResNet-50)")
    return lines
