"""Initial weights of the decoder: each object query looks at one place of the image and passes on what is there.

With random weights every query attends to the whole image, and training must first find a query for each place. With
`--query_init local` the queries begin as the positions of a grid. In the cross-attention of every decoder layer a query
attends to the cells around its point, prefers those that the class head does not call "no object", and copies them: the
value and output projections are identities. Keys and queries are sums of content and position. So that content does not
blur where a query looks, the features that hold the positions begin without content, in the memory and in the decoder.
What else a decoder layer adds, by self-attention and perceptron, begins at zero: the decoder's first predictions are
those that the heads read in the cells. This needs the loss of models/encoder_loss.py, which applies the heads to the
cells. Only initial values change; all of them train, and the network is the published one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.detr import DETR
from util.nested_tensor import NestedTensor

PEAK = 40.0  # score of a cell at the query's point; with C = 128, the weights spread over 0.05 of the image's side
OBJECTNESS = 2.0  # added to a cell's score, times its projection on the direction away from "no object"
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
    encoder, decoder = parts.transformer.encoder, parts.transformer.decoder
    if decoder.layers[0].normalize_before:
        before_attention = [encoder.norm] + [layer.norm2 for layer in decoder.layers]
    else:
        before_attention = [layer.norm2 for layer in encoder.layers[-1:]] + [layer.norm1 for layer in decoder.layers]
    for norm in before_attention:
        norm.weight[_position_features(decoder.layers[0].multihead_attn)] = 0
    for layer in decoder.layers:
        for last in (layer.self_attn.out_proj, layer.linear2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        _attend_by_position(layer.multihead_attn)
        _prefer_objects(layer.multihead_attn, no_object=detr.class_embed.weight[-1])
        _copy_values(layer.multihead_attn)


def _position_features(attention: Attention) -> list[int]:
    """Return the features in which `_attend_by_position` compares positions: the shortest waves in y and in x."""
    waves, half = attention.head_dim // 2, attention.embed_dim // 2
    return [*range(waves), *range(half, half + waves)]


def _attend_by_position(attention: Attention) -> None:
    """Give query and key of each head the same projection: the shortest waves of the positions in y and x."""
    width, heads = attention.embed_dim, attention.num_heads
    waves = attention.head_dim // 2
    scale = math.sqrt(PEAK * math.sqrt(attention.head_dim) / waves)  # sin^2 + cos^2 = 1 for each of `waves` pairs
    for projection in attention.in_proj_weight[: 2 * width].view(2 * heads, attention.head_dim, width):
        projection.mul_(CONTENT)
        projection[:waves, :waves] = scale * torch.eye(waves)
        projection[waves : 2 * waves, width // 2 : width // 2 + waves] = scale * torch.eye(waves)


def _prefer_objects(attention: Attention, no_object: Tensor) -> None:
    """Let the last feature of each head add to a cell's score how little the cell is like "no object"."""
    direction, heads = -no_object / no_object.norm(), attention.num_heads
    query, key, _ = attention.in_proj_weight.view(3, heads, attention.head_dim, -1)
    query[:, -1], key[:, -1] = 0, direction
    attention.in_proj_bias.view(3, heads, -1)[0, :, -1] = OBJECTNESS * math.sqrt(attention.head_dim)


def _copy_values(attention: Attention) -> None:
    nn.init.eye_(attention.in_proj_weight[2 * attention.embed_dim :])
    nn.init.eye_(attention.out_proj.weight)
