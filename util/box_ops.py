"""Boxes: conversions, areas, IoU and generalized IoU.

cxcywh: (centre x, centre y, width, height) in 0..1 of the image, used inside the model and the loss.
xyxy: (x0, y0, x1, y1) in pixels, used by datasets and post-processing.
"""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(x: Tensor) -> Tensor:
    """Convert boxes [..., 4] from centre and size to corners."""
    centre, half = x[..., :2], x[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_xyxy_to_cxcywh(x: Tensor) -> Tensor:
    """Convert boxes [..., 4] from corners to centre and size."""
    low, high = x[..., :2], x[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Return the areas [...] of xyxy boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def elementwise_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and union area of xyxy boxes whose leading dimensions broadcast against each other."""
    sides = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])
    intersection = sides.clamp(min=0).prod(dim=-1)
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return intersection / union, union


def elementwise_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the generalized IoU (Rezatofighi et al. 2019) of xyxy boxes whose leading dimensions broadcast.

    It is the IoU minus the share of the smallest enclosing box that neither box covers, in -1..1. Boxes are not
    checked, since a check would make the CPU wait for the GPU: corners in the wrong order give a meaningless number.
    """
    iou, union = elementwise_iou(boxes1, boxes2)
    sides = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(boxes1[..., :2], boxes2[..., :2])
    enclosing = sides.clamp(min=0).prod(dim=-1)
    return iou - (enclosing - union) / enclosing


def box_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and union area, both [..., N, M], of every pair of xyxy boxes [..., N, 4] and [..., M, 4]."""
    return elementwise_iou(boxes1[..., :, None, :], boxes2[..., None, :, :])


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the generalized IoU [..., N, M] of every pair of xyxy boxes [..., N, 4] and [..., M, 4]."""
    return elementwise_giou(boxes1[..., :, None, :], boxes2[..., None, :, :])


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Return the tightest xyxy box, float [N, 4], around each mask [N, H, W]; zeros for an empty mask.

    Corners are the coordinates of the outermost pixels: the box of a single pixel has no area.
    """
    boxes = torch.zeros((masks.shape[0], 4), device=masks.device)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        if rows.numel():
            box.copy_(torch.stack([columns.min(), rows.min(), columns.max(), rows.max()]))
    return boxes
