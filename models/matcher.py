"""Bipartite matching of predictions and objects: the assignment of least total cost, one prediction to an object."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou

Indices = list[tuple[Tensor, Tensor]]  # for each image, matched predictions and the object of each


class HungarianMatcher(nn.Module):
    """Bipartite matching of predictions and objects, image by image (paper, section 3.1).

    The cost of matching prediction i with object j is

        cost_class * -p_i(class_j) + cost_bbox * |b_i - b_j|_1 + cost_giou * -GIoU(b_i, b_j).

    The first term is the probability, not its logarithm, so that it has the range of the other two. If there are more
    objects than queries, some stay unmatched. The loss trains unmatched predictions as "no object".
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1):
        super().__init__()
        if not (cost_class or cost_bbox or cost_giou):
            raise ValueError("all three matching costs are 0: any assignment would be as good as any other")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Indices:
        """Match one layer's outputs: `pred_logits` [B, Q, K+1], `pred_boxes` [B, Q, 4] (cxcywh in 0..1).

        Each target has `labels` [T] and `boxes` [T, 4]. Returns, for each image, two int64 CPU tensors of length
        min(Q, T): the indices of the matched predictions, ascending, and the index of the object of each.
        """
        return self.match_layers([outputs], targets)[0]

    @torch.no_grad()
    def match_layers(self, layers: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> list[Indices]:
        """Match the outputs of several decoder layers at once: one copy of all costs to the CPU."""
        sizes = [len(target["labels"]) for target in targets]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()
        if max(sizes, default=0) == 0:
            costs = np.zeros((*logits.shape[:3], 0))
        else:
            with torch.autocast(logits.device.type, enabled=False):
                costs = self._cost(logits, boxes, targets).cpu().numpy()
        return [
            [_assign(image_cost[:, :size]) for image_cost, size in zip(layer, sizes, strict=True)] for layer in costs
        ]

    def _cost(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Cost of every prediction for every object of its image: [L, B, Q, T], images padded to the most objects."""
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, T]
        # An image without objects may have boxes of shape [0].
        objects = pad_sequence([target["boxes"].float().reshape(-1, 4) for target in targets], batch_first=True)
        layers, _, queries, _ = logits.shape
        probability = logits.softmax(-1).gather(3, labels[None, :, None].expand(layers, -1, queries, -1))
        distance = torch.cdist(boxes, objects[None].expand(layers, -1, -1, -1), p=1)
        giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(objects))
        return self.cost_bbox * distance - self.cost_class * probability - self.cost_giou * giou


def _assign(cost: np.ndarray) -> tuple[Tensor, Tensor]:
    """Solve one image's assignment [Q, T].

    The solver refuses costs that are not finite, so they are replaced by large ones. The loss of such predictions is
    not finite either, and the training loop reports it by name.
    """
    rows, columns = linear_sum_assignment(np.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6))
    return torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)


def build_matcher(args) -> HungarianMatcher:
    """Build the matcher with the flags' weights of the cost."""
    return HungarianMatcher(cost_class=args.set_cost_class, cost_bbox=args.set_cost_bbox, cost_giou=args.set_cost_giou)
