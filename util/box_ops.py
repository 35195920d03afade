"""Boxes: their two conventions, and how far two of them agree.

cxcywh: (centre x, centre y, width, height), the convention inside the model and the loss, in 0..1 of the image.
xyxy: (x0, y0, x1, y1), the convention of the datasets and of the read-out, in pixels.
"""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(x: Tensor) -> Tensor:
    """Corners of boxes [..., 4] given by centre and size."""
    centre, half = x[..., :2], x[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_xyxy_to_cxcywh(x: Tensor) -> Tensor:
    """Centre and size of boxes [..., 4] given by corners."""
    low, high = x[..., :2], x[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of xyxy boxes [..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def elementwise_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union area of xyxy boxes whose leading dimensions broadcast against each other."""
    sides = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])
    intersection = sides.clamp(min=0).prod(dim=-1)
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return intersection / union, union


def elementwise_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU (Rezatofighi et al. 2019): IoU minus the share of the smallest enclosing box that neither covers.

    Takes xyxy boxes whose leading dimensions broadcast; the result lies in -1..1. Nothing is checked, since a check
    would make a GPU wait: corners in the wrong order give a meaningless number.
    """
    iou, union = elementwise_iou(boxes1, boxes2)
    sides = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(boxes1[..., :2], boxes2[..., :2])
    enclosing = sides.clamp(min=0).prod(dim=-1)
    return iou - (enclosing - union) / enclosing


def box_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union of every pair: xyxy boxes [..., N, 4] and [..., M, 4] -> two [..., N, M]."""
    return elementwise_iou(boxes1[..., :, None, :], boxes2[..., None, :, :])


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of every pair: xyxy boxes [..., N, 4] and [..., M, 4] -> [..., N, M]."""
    return elementwise_giou(boxes1[..., :, None, :], boxes2[..., None, :, :])


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Tightest xyxy box around each mask [N, H, W] -> float [N, 4]; an empty mask gives zeros.

    Corners are the coordinates of the outermost pixels, so a mask of one pixel has a box of no area.
    """
    boxes = torch.zeros((masks.shape[0], 4), device=masks.device)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        if rows.numel():
            box.copy_(torch.stack([columns.min(), rows.min(), columns.max(), rows.max()]))
    return boxes
