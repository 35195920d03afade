"""Panoptic post-processing: one segment, a thing or stuff, for every pixel (paper, section 4.4)."""

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from util.sizes import as_pairs

SMALLEST_SEGMENT = 5  # pixels at the final size; smaller segments are removed


class PostProcessPanoptic(nn.Module):
    """Turns the network's outputs into a panoptic map: every pixel belongs to one segment, a thing or stuff.

    `is_thing_map` maps a class id to whether it is a thing; ids that are not in it are stuff. Queries whose best class
    is "no object", or has a probability of `threshold` or less, are left out.
    """

    def __init__(self, is_thing_map: dict[int, bool], threshold: float = 0.85):
        super().__init__()
        self.threshold = threshold
        self.is_thing_map = is_thing_map

    @torch.no_grad()
    def forward(
        self,
        outputs: dict[str, Tensor],
        processed_sizes: Sequence,
        target_sizes: Sequence | None = None,
        *,
        padded_size: tuple[int, int] | None = None,
        first_id: int = 0,
    ) -> list[dict]:
        """Give each image a `png_string` (the segment ids as COCO's RGB encoding) and its `segments_info`.

        Sizes are (height, width) for each image, tensors or tuples: `processed_sizes` of the model's input without
        padding, `target_sizes` of the map (default: the same). `padded_size` is the size of the padded batch; an image
        fills its upper left corner. Without it, masks are taken to cover the image only. Segment ids start at
        `first_id`: in COCO's format, 0 means no segment. If no query is left, the map is all zeros.
        """
        target_sizes = processed_sizes if target_sizes is None else target_sizes
        if not len(processed_sizes) == len(target_sizes) == len(outputs["pred_logits"]):
            raise ValueError(
                f"{len(processed_sizes)} input sizes and {len(target_sizes)} target sizes for the outputs of "
                f"{len(outputs['pred_logits'])} images"
            )
        maps = []
        sizes = zip(as_pairs(processed_sizes), as_pairs(target_sizes), strict=True)
        for logits, masks, (inner, final) in zip(outputs["pred_logits"], outputs["pred_masks"], sizes, strict=True):
            height, width = inner
            scores, labels = logits.softmax(-1).max(-1)
            keep = (labels != logits.shape[-1] - 1) & (scores > self.threshold)
            size = (height, width) if padded_size is None else padded_size
            masks = F.interpolate(masks[keep][:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
            ids, classes = self._segments(masks[:, :height, :width], labels[keep].tolist(), final)
            maps.append(self._encode(ids, classes, first_id))
        return maps

    def _segments(self, masks: Tensor, classes: list[int], size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
        """Masks [N, h, w] and their classes -> the segment index of each pixel [H, W], and the classes of the segments.

        Queries of the same stuff class are merged into one segment, that of the first of them.
        """
        first_of: dict[int, int] = {}
        owner_of = np.array([k if self._is_thing(c) else first_of.setdefault(c, k) for k, c in enumerate(classes)])
        while classes:
            # Softmax before argmax: where two queries have equal probabilities, the first one gets the pixel.
            best = masks.flatten(1).T.softmax(-1).argmax(-1).view(masks.shape[1:])
            owner = Image.fromarray(owner_of.astype(np.int32)[best.cpu().numpy()])
            owner = np.asarray(owner.resize(size[::-1], Image.Resampling.NEAREST))
            large = np.bincount(owner.ravel(), minlength=len(classes)) >= SMALLEST_SEGMENT
            if large.all():
                return owner, classes
            # Drop small segments, and queries that were merged into another; then assign their pixels to the others.
            masks, classes = masks[torch.from_numpy(large).to(masks.device)], [classes[k] for k in large.nonzero()[0]]
            owner_of = np.arange(len(classes))
        return np.zeros(size, np.int32), []

    def _encode(self, ids: np.ndarray, classes: list[int], first_id: int) -> dict:
        areas = np.bincount(ids.ravel(), minlength=len(classes)).tolist()
        segments = [
            {"id": k + first_id, "isthing": self._is_thing(c), "category_id": c, "area": areas[k]}
            for k, c in enumerate(classes)
        ]
        ids = ids + first_id if classes else ids
        file = io.BytesIO()
        Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(file, format="PNG")
        return {"png_string": file.getvalue(), "segments_info": segments}

    def _is_thing(self, label: int) -> bool:
        return bool(self.is_thing_map.get(label, False))
