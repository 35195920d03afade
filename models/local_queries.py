"""Initial weights of the decoder: each object query looks at one place of the image and passes on what is there.

With random weights every query attends to the whole image, and training must first find a query for each place. With
`--query_init local` the queries begin as the positions of a grid. The cross-attention of every decoder layer compares
only positions, so that a query attends to the cells around its point, and it copies these cells: the value and output
projections are identities. Only initial values change; all of them train, and the network is the published one.
"""

import math
from typing import Any

import torch
from torch import nn

from models.attention import Attention
from models.detr import DETR
from util.nested_tensor import NestedTensor

PEAK = 10.0  # score of a cell at the query's own point; with a grid of C = 128, half of it at 0.1 of the image's side
CONTENT = 0.2  # share that is kept of the random weights, which compare content


@torch.no_grad()
def init_local_queries(detr: DETR) -> None:
    """Set the object queries to the positions of a grid, and the decoder's cross-attention to attend near them.

    The grid is as square as it can be; queries left over keep their random values.
    """
    parts: Any = detr  # nn.Module does not tell the types of its parts
    queries = detr.query_embed.weight
    rows = math.isqrt(len(queries))
    columns = len(queries) // rows
    # Every second cell of a map of twice the grid's size has its position in the middle of a grid cell.
    cells = torch.zeros(1, 1, 2 * rows, 2 * columns, device=queries.device)
    positions = parts.backbone[1](NestedTensor(cells, torch.zeros_like(cells[0], dtype=torch.bool)))
    queries[: rows * columns] = positions[0, :, ::2, ::2].flatten(1).T
    for layer in parts.transformer.decoder.layers:
        _attend_by_position(layer.multihead_attn)
        _copy_values(layer.multihead_attn)


def _attend_by_position(attention: Attention) -> None:
    """Give query and key of each head the same projection: the shortest waves of the positions in y and x."""
    width, heads = attention.embed_dim, attention.num_heads
    waves = attention.head_dim // 2
    scale = math.sqrt(PEAK * math.sqrt(attention.head_dim) / waves)  # sin^2 + cos^2 = 1 for each of `waves` pairs
    for projection in attention.in_proj_weight[: 2 * width].view(2 * heads, attention.head_dim, width):
        projection.mul_(CONTENT)
        projection[:waves, :waves] = scale * torch.eye(waves)
        projection[waves : 2 * waves, width // 2 : width // 2 + waves] = scale * torch.eye(waves)


def _copy_values(attention: Attention) -> None:
    nn.init.eye_(attention.in_proj_weight[2 * attention.embed_dim :])
    nn.init.eye_(attention.out_proj.weight)
