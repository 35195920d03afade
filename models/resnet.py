"""torchvision's ResNets by name, with frozen batch norm folded into the convolutions.

A frozen batch norm is an affine map of each channel. Folding it into the convolution before it saves a pass over the
feature map. Parameters, buffers and their names stay torchvision's.

The folded blocks, and the stem in models/backbone.py, do not call their convolutions and norms as modules: register
hooks on a block or a layer, not on a convolution.
"""

from typing import Optional

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


class FrozenBatchNorm2d(torchvision.ops.misc.FrozenBatchNorm2d):
    """Batch norm whose statistics and affine parameters are buffers that never change (eps 1e-5)."""

    def __init__(self, n: int, eps: float = 1e-5):
        super().__init__(n, eps)

    @torch.jit.export
    def fold(self, weight: Tensor) -> tuple[Tensor, Optional[Tensor]]:  # noqa: UP045  (TorchScript cannot read `|`)
        """Return weight and bias of the convolution that equals one with `weight` and no bias, then this norm."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return weight * scale.reshape(-1, 1, 1, 1), bias.to(weight.dtype)


# conv._conv_forward(x, weight, bias) is nn.Conv2d.forward with another weight and bias. It is spelled out below because
# TorchScript cannot pass modules to a helper function.


class FoldedBasicBlock(BasicBlock):
    """torchvision's BasicBlock (ResNet-18 and 34) with its frozen norms folded."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        identity = x
        if self.downsample is not None:
            conv, bn = self.downsample[0], self.downsample[1]
            identity = conv._conv_forward(x, *bn.fold(conv.weight))
        out = self.relu(self.conv1._conv_forward(x, *self.bn1.fold(self.conv1.weight)))
        out = self.conv2._conv_forward(out, *self.bn2.fold(self.conv2.weight))
        return self.relu(out.add_(identity))


class FoldedBottleneck(Bottleneck):
    """torchvision's Bottleneck (ResNet-50 and deeper, ResNeXt, wide ResNet) with its frozen norms folded."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        identity = x
        if self.downsample is not None:
            conv, bn = self.downsample[0], self.downsample[1]
            identity = conv._conv_forward(x, *bn.fold(conv.weight))
        out = self.relu(self.conv1._conv_forward(x, *self.bn1.fold(self.conv1.weight)))
        out = self.relu(self.conv2._conv_forward(out, *self.bn2.fold(self.conv2.weight)))
        out = self.conv3._conv_forward(out, *self.bn3.fold(self.conv3.weight))
        return self.relu(out.add_(identity))


BLOCKS = {BasicBlock: FoldedBasicBlock, Bottleneck: FoldedBottleneck}


def resnet_names() -> list[str]:
    """List torchvision's ResNets: resnet18 to resnet152, ResNeXt and wide ResNet."""
    return torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"], module=torchvision.models)


def build_resnet(name: str, dilation: bool = False, pretrained: str | None = None, frozen: bool = True) -> ResNet:
    """Build torchvision's ResNet `name`, with the weights that torchvision calls `pretrained`, or random ones.

    `dilation` replaces the stride of layer4 by dilation (DC5). `frozen` norms are folded; otherwise they are
    nn.BatchNorm2d, which trains. Raises ValueError for an unknown name or blocks that cannot be dilated, OSError if the
    weights cannot be downloaded.
    """
    if name not in resnet_names():
        raise ValueError(f"no backbone {name!r}: choose one of {', '.join(resnet_names())}")
    with torch.device("meta"):  # only its structure is needed
        plain = torchvision.models.get_model(name)
    block = type(plain.layer1[0])
    if dilation and block is BasicBlock:
        raise ValueError(f"{name} cannot be dilated (its blocks have no dilation): use resnet50 or deeper for DC5")
    resnet = ResNet(
        BLOCKS[block] if frozen else block,
        [len(layer) for layer in (plain.layer1, plain.layer2, plain.layer3, plain.layer4)],
        groups=plain.groups,
        width_per_group=plain.base_width,
        replace_stride_with_dilation=[False, False, dilation],
        norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d,
    )
    if pretrained:
        weights = {weights.name: weights for weights in torchvision.models.get_model_weights(name)}.get(pretrained)
        if weights is None:
            raise ValueError(f"torchvision has no {pretrained} weights of {name}")
        resnet.load_state_dict(weights.get_state_dict(progress=True, check_hash=True))
    return resnet
