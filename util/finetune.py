"""Initialise a model from another model's weights, as far as they fit."""

import torch
from torch import Tensor, nn

from util.checkpoint import not_finite

SHOWN = 4  # names listed of entries that do not fit


@torch.no_grad()
def finetune(model: nn.Module, given: dict[str, Tensor], name: str) -> list[str]:
    """Copy the entries of a state dict that fit into `model`; return log lines about what was and was not copied.

    A class head with another number of classes stays as initialised. If the numbers of queries differ, as many as both
    have are copied, and any others stay as initialised. A mask model takes the weights of a box model, and the reverse.
    `name` is the file of the weights, for messages. Raises ValueError if the backbone differs, or if weights are not
    finite.
    """
    if broken := not_finite(given):
        raise ValueError(f"{name}: {len(broken)} entries hold NaN or infinite values, {broken[0]} among them")
    own = model.state_dict()
    given = _renamed(given, own)
    wrong = [key for key in own if _is_backbone(key) and (key not in given or given[key].shape != own[key].shape)]
    if wrong:
        raise ValueError(
            f"{name} was trained with another backbone ({len(wrong)} entries do not fit, {_some(wrong)}): "
            "give the --backbone it was trained with"
        )
    kept, lines, others = [], [], []
    for key, mine in own.items():
        theirs = given.get(key)
        if theirs is None:
            others.append(key)
        elif theirs.shape == mine.shape:
            mine.copy_(theirs)
            kept.append(key)
        elif key.endswith("query_embed.weight") and theirs.shape[1:] == mine.shape[1:]:
            lines.append(_copy_queries(mine, theirs))
        elif key.endswith("class_embed.weight"):
            lines.append(f"class head re-initialised: {len(theirs) - 1} classes there, {len(mine) - 1} here")
        elif not key.endswith("class_embed.bias"):
            others.append(key)
    unused = [key for key in given if key not in own and "num_batches_tracked" not in key]
    if others:
        lines.append(f"re-initialised (absent there, or of another size): {len(others)} entries, {_some(others)}")
    if unused:
        lines.append(f"not used (absent here): {len(unused)} entries, {_some(unused)}")
    return [f"fine-tuning from {name}: {len(kept)} of {len(own)} entries copied", *lines]


def _copy_queries(mine: Tensor, theirs: Tensor) -> str:
    count = min(len(mine), len(theirs))
    mine[:count] = theirs[:count]
    if count == len(mine):
        return f"queries: the first {count} of {len(theirs)}"
    return f"queries: {count} copied, {len(mine) - count} re-initialised"


def _renamed(given: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add or remove the prefix `detr.`, which the names of a mask model have and those of a box model do not."""
    ours, theirs = (any(key.startswith("detr.") for key in entries) for entries in (own, given))
    if ours and not theirs:
        return {f"detr.{key}": value for key, value in given.items()}
    if theirs and not ours:
        return {key.removeprefix("detr."): value for key, value in given.items()}
    return given


def _is_backbone(key: str) -> bool:
    # Only a trained batch norm counts its batches; the networks are the same.
    return key.removeprefix("detr.").startswith("backbone.0.body.") and not key.endswith("num_batches_tracked")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
