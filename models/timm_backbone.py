"""Backbones of the package timm: `--backbone timm/convnext_tiny` and others that give feature maps."""

import torch.nn.functional as F
from torch import Tensor, nn

from util.nested_tensor import NestedTensor

PREFIX = "timm/"
# Vision transformers are built for one size of image; these arguments make them take any.
ANY_SIZE = {"vit": {"dynamic_img_size": True, "dynamic_img_pad": True}, "swin": {"strict_img_size": False}}


class TimmBackbone(nn.Module):
    """The coarsest feature map of a timm model, with its padding mask.

    All parameters train if `train_backbone` is true. With `frozen_norms`, batch norms keep the statistics and the
    affine parameters that were loaded. Raises ValueError if timm is not installed or has no such model.
    """

    def __init__(self, name: str, train_backbone: bool, pretrained: bool, frozen_norms: bool = True):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ValueError(f"--backbone {PREFIX}{name} needs the package timm: pip install timm") from None
        options = next((options for family, options in ANY_SIZE.items() if name.startswith(family)), {})
        try:
            body = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
        except RuntimeError as error:
            raise ValueError(f"--backbone {PREFIX}{name}: {error}; timm.list_models() has the names") from None
        self.body = timm.layers.freeze_batch_norm_2d(body) if frozen_norms else body
        self.body.requires_grad_(train_backbone)
        self.num_channels = body.feature_info.channels()[-1]

    def forward(self, tensor_list: NestedTensor) -> dict[str, NestedTensor]:
        """Normalised images [B, 3, H, W] -> {"0": features [B, C, h, w] with their mask}."""
        feature: Tensor = self.body(tensor_list.tensors)[-1]
        if feature.shape[1] != self.num_channels:  # Swin's maps are [B, h, w, C]
            feature = feature.permute(0, 3, 1, 2)
        mask = tensor_list.mask
        assert mask is not None, "the backbone needs the padding mask of its images"
        small = F.interpolate(mask[:, None].float(), size=feature.shape[-2:], mode="nearest")
        return {"0": NestedTensor(feature, small[:, 0] > 0.5)}
