"""Accuracy of classifications."""

import torch
from torch import Tensor


@torch.no_grad()
def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """Percentage of rows of `output` [N, K] whose k best classes include the one in `target` [N]; 0 when N is 0."""
    if not len(target):
        return [torch.zeros([], device=output.device) for _ in topk]
    best = output.topk(max(topk), dim=1).indices
    hits = best == target[:, None]
    return [100 * hits[:, :k].any(dim=1).float().mean() for k in topk]
