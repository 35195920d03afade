"""A ResNet that returns feature maps with their padding masks and positions."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

from util.logger import logger
from util.nested_tensor import NestedTensor

__all__ = ["Backbone", "BackboneBase", "FrozenBatchNorm2d", "Joiner", "load_backbone_weights"]

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Body(nn.ModuleDict):
    """A ResNet up to layer4 under torchvision's own names, returning the outputs of some of its layers."""

    def __init__(self, resnet: nn.Module, return_layers: dict[str, str]):
        super().__init__({name: module for name, module in resnet.named_children() if name not in ("avgpool", "fc")})
        self.return_layers = return_layers

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        for name, module in self.items():
            if torch.jit.is_scripting():
                x = module(x)
            elif name == "conv1":
                x = _conv_norm((module, self["bn1"]), x)
            elif name != "bn1":
                x = _run(module, x)
            if name in self.return_layers:
                features[self.return_layers[name]] = x
        return features


def _conv_norm(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """A convolution and its norm; a frozen norm is an affine, and is folded into the convolution's own.

    That spares a pass over the feature map, the larger of the two by far, and trains the same weights.
    """
    if [type(part) for part in parts] != [nn.Conv2d, FrozenBatchNorm2d] or parts[0].bias is not None or _heard(*parts):
        for part in parts:
            x = part(x)
        return x
    conv, norm = parts
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias.to(weight.dtype), conv.stride, conv.padding, conv.dilation, conv.groups)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    """Run a part of a ResNet as torchvision does, but for the folded norms.

    A part that is not plainly torchvision's (a block, an activation of your own), or has a hook on it, runs itself.
    """
    if type(module) is nn.Sequential and not _heard(module):
        for part in module:
            x = _run(part, x)
        return x
    if type(module) not in (BasicBlock, Bottleneck) or type(module.relu) is not nn.ReLU or _heard(module, module.relu):
        return module(x)
    if module.downsample is None:
        shortcut = x
    else:
        shortcut = module.downsample(x) if _heard(module.downsample) else _conv_norm(module.downsample, x)
    x = F.relu(_conv_norm((module.conv1, module.bn1), x), inplace=True)
    x = _conv_norm((module.conv2, module.bn2), x)
    if type(module) is Bottleneck:
        x = _conv_norm((module.conv3, module.bn3), F.relu(x, inplace=True))
    return F.relu(x.add_(shortcut), inplace=True)


def _heard(*modules: nn.Module) -> bool:
    """Whether a hook listens to one of them."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


class BackboneBase(nn.Module):
    """Wraps a torchvision-style ResNet: normalises raw pixels, returns features with masks of their size.

    Of `backbone`, layer2 to layer4 train when `train_backbone` is true; the stem and layer1 never do. The features are
    layer4's, `num_channels` at stride 32 (16 if dilated), or those of all four layers with `return_interm_layers`.
    """

    def __init__(self, backbone: nn.Module, train_backbone: bool, num_channels: int, return_interm_layers: bool):
        super().__init__()
        for name, parameter in backbone.named_parameters():
            if not (train_backbone and name.startswith(("layer2", "layer3", "layer4"))):
                parameter.requires_grad_(False)
        if return_interm_layers:
            return_layers = {f"layer{i + 1}": str(i) for i in range(4)}
        else:
            return_layers = {"layer4": "0"}
        # Convolutions run faster with channels last; the values and the state dict do not change.
        self.body = _Body(backbone, return_layers).to(memory_format=torch.channels_last)
        self.num_channels = num_channels
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    def forward(self, tensor_list: NestedTensor) -> dict[str, NestedTensor]:
        """Images [B, 3, H, W], raw (uint8) or already normalised (floating) -> name: features [B, C, h, w], masks."""
        mask = tensor_list.mask
        assert mask is not None, "the backbone needs the padding mask of its images"
        images = tensor_list.tensors
        if images.dtype == torch.uint8:
            images = ((images.float() / 255 - self.pixel_mean) / self.pixel_std).masked_fill(mask[:, None], 0.0)
            images = images.to(self.pixel_mean.dtype)  # the model's, which may be half
        features = self.body(images.contiguous(memory_format=torch.channels_last))
        out: dict[str, NestedTensor] = {}
        for name, feature in features.items():
            small = F.interpolate(mask[:, None].float(), size=feature.shape[-2:], mode="nearest")
            out[name] = NestedTensor(feature, small[:, 0] > 0.5)
        return out


class Backbone(BackboneBase):
    """A ResNet by name (resnet18, 34, 50 or 101).

    `dilation` keeps layer4 at stride 16 ("DC5"; only 50 and 101 can). `weights` is "imagenet" (torchvision's V1),
    "none" (random) or the path of a state dict in torchvision's names. `norm` is "frozen" (statistics and affine of
    the loaded weights, never trained) or "batch": live batch norm, and every layer trains, for a start from nothing.
    """

    def __init__(
        self,
        name: str,
        train_backbone: bool,
        return_interm_layers: bool,
        dilation: bool,
        weights: str = "imagenet",
        norm: str = "frozen",
    ):
        if name not in BACKBONES:
            raise ValueError(f"no backbone {name!r}: choose one of {', '.join(BACKBONES)}")
        if dilation and name in ("resnet18", "resnet34"):
            raise ValueError(
                f"{name} cannot be dilated (its blocks have no dilation): use resnet50 or resnet101 for DC5"
            )
        if norm not in ("frozen", "batch"):
            raise ValueError(f"no backbone norm {norm!r}: choose frozen or batch")
        try:
            resnet = getattr(torchvision.models, name)(
                replace_stride_with_dilation=[False, False, dilation],
                weights="IMAGENET1K_V1" if weights == "imagenet" else None,
                norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d,
            )
        except OSError as error:
            raise OSError(
                f"ImageNet weights of {name} could not be downloaded ({error}); "
                "give --backbone_weights the path of a local copy, or none"
            ) from error
        if weights not in ("imagenet", "none"):
            load_backbone_weights(resnet, weights)
        num_channels = 512 if name in ("resnet18", "resnet34") else 2048
        super().__init__(resnet, train_backbone, num_channels, return_interm_layers)
        if norm == "batch" and train_backbone:
            self.body.requires_grad_(True)


def load_backbone_weights(resnet: nn.Module, path: str) -> None:
    """Load the entries of a state dict file that fit `resnet` by name and shape, and log those that do not.

    A norm whose convolution is missing from the file is left as it was made: its statistics belong to the weights that
    are not there. Raises FileNotFoundError, or ValueError if nothing fits.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"backbone weights {path!r}: no such file; give a path, 'imagenet' or 'none'")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    own = resnet.state_dict()
    fits = {name: value for name, value in loaded.items() if name in own and own[name].shape == value.shape}
    for name in list(fits):
        convolution = name.rsplit(".", 1)[0].replace("bn", "conv") + ".weight"
        if "bn" in name and convolution not in fits:
            del fits[name]
    missing = [name for name in own if name not in fits and not name.startswith("fc.")]
    if len(missing) == sum(not name.startswith("fc.") for name in own):
        raise ValueError(f"backbone weights {path!r}: no entry fits this ResNet by name and shape")
    resnet.load_state_dict(fits, strict=False)
    logger.info(
        f"backbone weights {path}: {len(fits)} entries loaded"
        + (f"; left as initialised: {', '.join(missing)}" if missing else "")
    )


class Joiner(nn.Sequential):
    """The backbone and the position encoding of its features, as one module."""

    def __init__(self, backbone: nn.Module, position_embedding: nn.Module):
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, tensor_list: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        """Images -> the feature maps, finest first, and their position encodings [B, C, h, w]."""
        features: list[NestedTensor] = []
        positions: list[Tensor] = []
        for _, feature in self[0](tensor_list).items():
            features.append(feature)
            positions.append(self[1](feature).to(feature.tensors.dtype))
        return features, positions
