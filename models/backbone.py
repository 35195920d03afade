"""A ResNet that returns feature maps with their padding masks and positions."""

from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.position_encoding import build_position_encoding
from models.resnet import FrozenBatchNorm2d, build_resnet
from models.timm_backbone import PREFIX, TimmBackbone
from util.checkpoint import load_checkpoint, not_finite
from util.dist import is_main_process
from util.flags import NEW_FLAGS, with_defaults
from util.logger import logger
from util.nested_tensor import NestedTensor

__all__ = [
    "Backbone",
    "BackboneBase",
    "FrozenBatchNorm2d",
    "Joiner",
    "NestedTensor",
    "build_backbone",
    "build_position_encoding",
    "is_main_process",
    "load_backbone_weights",
]

PRETRAINED = {"imagenet": "IMAGENET1K_V1", "imagenet_v2": "IMAGENET1K_V2"}  # torchvision's names of weights
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Without AVX-512 the backward pass of convolutions on a CPU is slower with channels last; everywhere else it is faster.
CONTIGUOUS_TRAINING = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


class _Body(nn.ModuleDict):
    """A ResNet up to layer4 under torchvision's own names, returning the outputs of some of its layers."""

    folded_stem: Final[bool]  # TorchScript compiles only the branch that is taken

    def __init__(self, resnet: nn.Module, return_layers: dict[str, str]):
        super().__init__({name: module for name, module in resnet.named_children() if name not in ("avgpool", "fc")})
        self.return_layers = return_layers
        self.folded_stem = isinstance(getattr(resnet, "bn1", None), FrozenBatchNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        if self.folded_stem:
            x = self.conv1._conv_forward(x, *self.bn1.fold(self.conv1.weight))
        for name, module in self.items():
            if not (self.folded_stem and (name == "conv1" or name == "bn1")):
                x = module(x)
            if name in self.return_layers:
                features[self.return_layers[name]] = x
        return features


class BackboneBase(nn.Module):
    """Wraps a torchvision-style ResNet: returns features with padding masks of their size.

    layer2 to layer4 of `backbone` train if `train_backbone` is true; the stem and layer1 never train. The features are
    those of layer4 (`num_channels` channels, stride 32, or 16 if dilated), or with `return_interm_layers` those of all
    four layers.
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
        self.body = _Body(backbone, return_layers)
        self.num_channels = num_channels
        self.contiguous_training = CONTIGUOUS_TRAINING

    def forward(self, tensor_list: NestedTensor) -> dict[str, NestedTensor]:
        """Normalised images [B, 3, H, W] -> {name: features [B, C, h, w] with their mask}."""
        mask = tensor_list.mask
        assert mask is not None, "the backbone needs the padding mask of its images"
        images = tensor_list.tensors
        plain = self.training and self.contiguous_training and images.device.type == "cpu"
        images = images.contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)
        out: dict[str, NestedTensor] = {}
        for name, feature in self.body(images).items():
            small = F.interpolate(mask[:, None].float(), size=feature.shape[-2:], mode="nearest")
            out[name] = NestedTensor(feature, small[:, 0] > 0.5)
        return out


class Backbone(BackboneBase):
    """A torchvision ResNet by name (resnet18 ... resnet152, resnext50_32x4d, wide_resnet50_2 ...).

    `dilation` keeps layer4 at stride 16 ("DC5"; not for resnet18 and 34). `weights` is "imagenet" (torchvision's V1),
    "imagenet_v2", "none" (random) or the path of a state dict in torchvision's names. `norm` is "frozen" (statistics
    and affine of the loaded weights, never trained) or "batch": batch norm that trains, and every layer trains, for
    training from scratch.
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
        if norm not in ("frozen", "batch"):
            raise ValueError(f"no backbone norm {norm!r}: choose frozen or batch")
        try:
            resnet = build_resnet(name, dilation, PRETRAINED.get(weights), frozen=norm == "frozen")
        except OSError as error:
            raise OSError(
                f"ImageNet weights of {name} could not be downloaded ({error}); "
                "give the path of a local copy as backbone weights, or none"
            ) from error
        if weights not in (*PRETRAINED, "none"):
            load_backbone_weights(resnet, weights)
        super().__init__(resnet, train_backbone, resnet.fc.in_features, return_interm_layers)
        if norm == "batch" and train_backbone:
            self.body.requires_grad_(True)


def load_backbone_weights(resnet: nn.Module, path: str) -> None:
    """Load the entries of a state dict file that fit `resnet` by name and shape, and log those that do not.

    A norm whose convolution is missing from the file keeps its initial values: its statistics belong to the missing
    weights. Raises FileNotFoundError, or ValueError if nothing fits or values are not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"backbone weights {path!r}: no such file; give a path, imagenet, imagenet_v2 or none")
    loaded = load_checkpoint(path)["model"]
    if broken := not_finite(loaded):
        raise ValueError(
            f"backbone weights {path!r}: {len(broken)} entries hold NaN or infinite values: {broken[0]}..."
        )
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
    logger.info(f"backbone weights {path}: {len(fits)} entries loaded")
    if missing:
        logger.info(f"backbone entries that keep their initial values: {', '.join(missing)}")


class Joiner(nn.Sequential):
    """A backbone and the position encoding of its features, as one module.

    The backbone is any module with `num_channels` that maps a NestedTensor of normalised images to
    {name: NestedTensor of features}, finest first.
    """

    def __init__(self, backbone: nn.Module, position_embedding: nn.Module):
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    def forward(self, tensor_list: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        """Images [B, 3, H, W], uint8 or normalised -> the feature maps, finest first, and positions [B, C, h, w]."""
        features: list[NestedTensor] = []
        positions: list[Tensor] = []
        for _, feature in self[0](self._normalize(tensor_list)).items():
            features.append(feature)
            positions.append(self[1](feature).to(feature.tensors.dtype))
        return features, positions

    def _normalize(self, samples: NestedTensor) -> NestedTensor:
        """Normalise uint8 RGB with ImageNet's mean and deviation and zero the padding; floating images stay."""
        images, mask = samples.decompose()
        if images.dtype != torch.uint8:
            return samples
        images = (images.float() / 255 - self.pixel_mean) / self.pixel_std
        if mask is not None:
            images = images.masked_fill(mask[:, None], 0.0)
        return NestedTensor(images.to(self.pixel_mean.dtype), mask)  # the model's type, which may be half precision


def build_timm_backbone(flags) -> TimmBackbone:
    """Build a backbone of timm. Raises ValueError for flags that need a ResNet of torchvision."""
    if flags.masks or flags.dilation or flags.backbone_weights not in ("imagenet", "none"):
        raise ValueError(f"--backbone {flags.backbone}: --masks, --dilation and a file of weights need a ResNet")
    pretrained, frozen = flags.backbone_weights == "imagenet", flags.backbone_norm == "frozen"
    return TimmBackbone(flags.backbone.removeprefix(PREFIX), flags.lr_backbone > 0, pretrained, frozen)


def build_backbone(args) -> Joiner:
    """Build backbone and position encoding from the flags. Raises OSError if ImageNet weights cannot be downloaded.

    If `args` has no `backbone_weights`, the caller was written for DETR and usually loads a whole checkpoint next: it
    gets random weights and a warning instead of the OSError.
    """
    flags = with_defaults(args, NEW_FLAGS)
    position_embedding = build_position_encoding(args)
    sizes = (flags.backbone, flags.lr_backbone > 0, flags.masks, flags.dilation)
    if flags.backbone.startswith(PREFIX):
        return Joiner(build_timm_backbone(flags), position_embedding)
    try:
        backbone = Backbone(*sizes, weights=flags.backbone_weights, norm=flags.backbone_norm)
    except OSError as error:
        if hasattr(args, "backbone_weights"):
            raise
        logger.warning(f"{error}; the backbone is random until a checkpoint is loaded into the model")
        backbone = Backbone(*sizes, weights="none", norm=flags.backbone_norm)
    return Joiner(backbone, position_embedding)
