"""A loss on the encoder's output, in training only: each feature cell predicts the object that it lies in.

The object queries read the encoder's output, the memory, and say where the objects are. At the start the memory has no
positions in it: DETR adds them to queries and keys of the attention, not to values. The gradient that should put them
there comes through queries that look anywhere. On few images, the queries can go on predicting the same boxes for
every image for thousands of steps. Here the network's own heads read every cell directly: a cell near the centre of an
object must give the object's class and box, every other cell "no object". Detectors with more than one stage train
their encoder in this way (Zhu et al., "Deformable DETR", ICLR 2021, arXiv 2010.04159, section 4.2), and Co-DETR adds
dense heads (Zong et al., ICCV 2023, arXiv 2211.12860). The network and its parameters stay as they are.

Shapes: B images, h x w feature cells, N = h * w, K classes (index K is "no object"). Boxes are cxcywh in 0..1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.criterion import SetCriterion
from util.box_ops import box_cxcywh_to_xyxy, elementwise_giou
from util.dist import mean_over_processes

PREFIX = "enc_"  # of the names of these losses
IGNORED = -100  # cross_entropy's mark for positions without a target


def encoder_losses(criterion: SetCriterion, outputs: dict[str, Tensor], targets: list[dict]) -> dict[str, Tensor]:
    """Cross-entropy of all cells, averaged with class weights, and L1 and 1 - GIoU averaged over the cells of objects.

    `outputs` has `pred_logits` [B, N, K+1], `pred_boxes` [B, N, 4] and the `padding` [B, h, w] of the cells. The means
    are over all processes: what DistributedDataParallel averages is the sum of each divided by the mean of all.
    """
    logits, padding = outputs["pred_logits"].float(), outputs["padding"]
    labels, boxes = cell_targets(padding, targets, criterion.num_classes)
    found = (labels != criterion.num_classes) & (labels != IGNORED)
    predicted, boxes = outputs["pred_boxes"].float()[found], boxes[found]
    class_weights = criterion.empty_weight
    counts = torch.stack([class_weights[labels[labels != IGNORED]].sum(), found.sum().float()])
    weight, cells = mean_over_processes(counts, logits.device)
    class_loss = F.cross_entropy(logits.transpose(1, 2), labels, class_weights, ignore_index=IGNORED, reduction="sum")
    giou = elementwise_giou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(boxes))
    return {
        "loss_ce": class_loss / weight,
        "loss_bbox": (predicted - boxes).abs().sum() / cells.clamp(min=1),
        "loss_giou": (1 - giou).sum() / cells.clamp(min=1),
    }


@torch.no_grad()
def cell_targets(padding: Tensor, targets: list[dict], num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the class [B, N] and the box [B, N, 4] that each cell must predict; padding is IGNORED.

    A cell belongs to an object if the cell's centre lies in the middle half of the object's box, in width and height.
    The middle of a small object is at least one cell large, so that no object is without a cell. Where several objects
    claim a cell, it belongs to the one whose centre is nearest, in units of the object's size.
    """
    centres, cell_sizes = cell_grid(padding)
    labels = torch.full(centres.shape[:2], num_classes, device=padding.device)
    boxes = centres.new_zeros(*centres.shape[:2], 4)
    for i, target in enumerate(targets):
        if len(target["labels"]) == 0:
            continue
        objects = target["boxes"].float()
        reach = torch.maximum(objects[:, 2:] / 4, cell_sizes[i] / 2 * (1 + 1e-5))
        distance = ((centres[i] - objects[:, None, :2]).abs() / reach[:, None]).amax(-1)  # [objects, N]
        nearest, owner = distance.min(0)
        labels[i] = torch.where(nearest <= 1, target["labels"][owner], num_classes)
        boxes[i] = objects[owner]
    return labels.masked_fill(padding.flatten(1), IGNORED), boxes


def cell_grid(padding: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [B, N, 2] and sizes [B, 2] of cells with `padding` [B, h, w]: x and y in 0..1 of the unpadded image."""
    valid = (~padding).float()
    rows, columns = valid.cumsum(1), valid.cumsum(2)
    height, width = rows.amax((1, 2), keepdim=True).clamp(min=1), columns.amax((1, 2), keepdim=True).clamp(min=1)
    centres = torch.stack([(columns - 0.5) / width, (rows - 0.5) / height], dim=-1)
    return centres.flatten(1, 2), 1 / torch.cat([width, height], dim=2).flatten(1)
