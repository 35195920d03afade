"""Which prediction answers which object: the assignment of least total cost, one prediction to an object."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou

Indices = list[tuple[Tensor, Tensor]]


class HungarianMatcher(nn.Module):
    """Bipartite matching of predictions and objects, image by image (paper, section 3.1).

    The cost of answering object j with prediction i is

        cost_class * -p_i(class_j) + cost_bbox * |b_i - b_j|_1 + cost_giou * -GIoU(b_i, b_j).

    The probability enters itself, not its logarithm: that keeps it in the range of the other two. Objects beyond the
    number of queries stay unmatched; so do the predictions that are left over, which the loss teaches "no object".
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
        min(Q, T): the indices of the matched predictions, ascending, and of the object each of them answers.
        """
        return self.match_layers(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)[0]

    @torch.no_grad()
    def match_layers(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> list[Indices]:
        """Match L layers at once: logits [L, B, Q, K+1], boxes [L, B, Q, 4] -> L lists as `forward` returns.

        The costs of all layers and images cross to the CPU in one copy.
        """
        sizes = [len(target["labels"]) for target in targets]
        costs = (
            self._cost(logits.float(), boxes.float(), targets)
            if max(sizes, default=0)
            else np.zeros((*logits.shape[:3], 0))
        )
        return [
            [_assign(image_cost[:, :size]) for image_cost, size in zip(layer, sizes, strict=True)] for layer in costs
        ]

    def _cost(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> np.ndarray:
        """Cost of every prediction for every object of its image: [L, B, Q, T], images padded to the most objects."""
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, T]
        given = [target["boxes"].float().reshape(-1, 4) for target in targets]  # where none are, maybe without a shape
        objects = pad_sequence(given, batch_first=True)  # [B, T, 4]
        layers, _, queries, _ = logits.shape
        probability = logits.softmax(-1).gather(3, labels[None, :, None].expand(layers, -1, queries, -1))
        distance = torch.cdist(boxes, objects[None].expand(layers, -1, -1, -1), p=1)
        giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(objects))
        cost = self.cost_bbox * distance - self.cost_class * probability - self.cost_giou * giou
        return cost.cpu().numpy()


def _assign(cost: np.ndarray) -> tuple[Tensor, Tensor]:
    """Solve one image's assignment [Q, T].

    A diverged model has costs that are not finite, which the solver would refuse in words that help nobody. They
    become merely bad here: the loss that follows is not finite either, and the training loop reports that by name.
    """
    rows, columns = linear_sum_assignment(np.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6))
    return torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)
