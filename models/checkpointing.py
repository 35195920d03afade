"""Gradient checkpointing (`--checkpoint_activations`): less memory in training for more time.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174: the inner results of a block are
not kept for the backward pass, which computes them again.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from models.resnet import BasicBlock, Bottleneck
from models.transformer import TransformerEncoderLayer

BLOCKS = (BasicBlock, Bottleneck, TransformerEncoderLayer)  # where images are large, nearly all memory is theirs


def checkpoint_activations(model: nn.Module) -> None:
    """Make the blocks of the backbone and the encoder forget their inner results; outputs and gradients stay equal."""
    for module in model.modules():
        if isinstance(module, BLOCKS) and any(p.requires_grad for p in module.parameters()):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
