"""Attention weights of a forward pass, for each layer and head: where queries and feature cells attend in the image.

with record_attention(model) as maps:
    model([image])
maps["decoder"][-1]  # the last layer's cross-attention [B, heads, Q, h, w]
maps["encoder"][-1]  # the last layer's self-attention [B, heads, h * w, h, w]

Shapes: B images, Q queries, h x w feature cells.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Attention, MaybeTensor, attention_weights
from models.detr import DETR


@contextmanager
def record_attention(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """Record the attention weights of the last forward pass inside a `with` block.

    `model` is a DETR or a module around one: DETRsegm, DistributedDataParallel. The block gets a dict with two lists,
    an entry for each of `layers` (numbers, also negative ones; default: all): `decoder`, the attention from queries to
    cells [B, heads, Q, h, w], and `encoder`, that from cells, row by row, to cells [B, heads, h * w, h, w].

    Weights are softmax outputs in float32, also under autocast: they sum to 1 over h x w, and are 0 on padding. They
    are detached, and taken before dropout. The model's outputs stay the same; a compiled model runs uncompiled inside
    the block. An encoder layer takes 4 * B * heads * (h * w)^2 bytes: 23 MB at 800 x 1088 pixels and stride 32, 16
    times that at stride 16. With denoising queries, those follow the object queries.

    Raises ValueError if the model has no DETR with this project's attention in it, if it is being recorded already, or
    if `layers` names a layer that it lacks.
    """
    detr: Any = _find_detr(model)
    encoder, decoder = detr.transformer.encoder.layers, detr.transformer.decoder.layers
    modules = {
        "encoder": _choose([layer.self_attn for layer in encoder], layers),
        "decoder": _choose([layer.multihead_attn for layer in decoder], layers),
    }
    maps: dict[str, list[Tensor]] = {name: [] for name in modules}
    grid: list[int] = []

    def start(_module, _inputs, features: Tensor) -> None:
        grid[:] = features.shape[-2:]
        for entries in maps.values():
            entries.clear()

    def keep(entries: list[Tensor], q: Tensor, k: Tensor, mask: MaybeTensor) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            entries.append(attention_weights(q.to(dtype), k.to(dtype), mask).unflatten(-1, grid))

    hook = detr.input_proj.register_forward_hook(start)
    try:
        for name, attentions in modules.items():
            for attention in attentions:
                attention.record = partial(keep, maps[name])
        with torch.compiler.set_stance("force_eager"):
            yield maps
    finally:
        hook.remove()
        for attention in modules["encoder"] + modules["decoder"]:
            attention.record = None


def _find_detr(model: nn.Module) -> DETR:
    found = [module for module in model.modules() if isinstance(module, DETR)]
    if len(found) != 1:
        raise ValueError(
            f"attention is recorded of a model with one DETR in it, and {type(model).__name__} has {len(found)}: "
            "give the network itself, not a scripted or exported one"
        )
    return found[0]


def _choose(attentions: list, layers: Sequence[int] | None) -> list[Attention]:
    count = len(attentions)
    numbers = range(count) if layers is None else layers
    if missing := [i for i in numbers if not -count <= i < count]:
        raise ValueError(f"layers {missing}: the encoder or the decoder has layers 0 to {count - 1}, or -{count} to -1")
    chosen = [attentions[i] for i in sorted({i % count for i in numbers})]
    for attention in chosen:
        if not isinstance(attention, Attention):
            raise ValueError(f"attention is recorded of models.attention.Attention, not of {type(attention).__name__}")
        if attention.record is not None:
            raise ValueError("this model's attention is being recorded already: leave the other `with` block first")
    return chosen
