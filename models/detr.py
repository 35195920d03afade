"""The DETR network and its box post-processing.

Shapes: B images, Q queries, C hidden width, K classes (the extra last one is "no object"), L decoder layers, H x W
pixels. Boxes are cxcywh in 0..1 of the unpadded image in the network's outputs, and x0 y0 x1 y1 in pixels after
PostProcess.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.backbone import build_backbone
from models.criterion import SetCriterion
from models.matcher import build_matcher
from models.segmentation import DETRsegm, PostProcessPanoptic, PostProcessSegm, dice_loss, sigmoid_focal_loss
from models.transformer import build_transformer
from util import box_ops
from util.dist import get_world_size, is_dist_avail_and_initialized
from util.metrics import accuracy
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.sizes import as_pairs

# Code written against DETR imports all of these from here.
__all__ = [
    "DETR",
    "DETRsegm",
    "MLP",
    "NestedTensor",
    "PostProcess",
    "PostProcessPanoptic",
    "PostProcessSegm",
    "SetCriterion",
    "accuracy",
    "box_ops",
    "build",
    "build_backbone",
    "build_matcher",
    "build_transformer",
    "dice_loss",
    "get_world_size",
    "interpolate",
    "is_dist_avail_and_initialized",
    "nested_tensor_from_tensor_list",
    "sigmoid_focal_loss",
]


class DETR(nn.Module):
    """Backbone, transformer, and two heads on each of `num_queries` decoder outputs (paper, section 3.2).

    `num_queries` is the most objects the model can find in one image. With `aux_loss`, the outputs of the earlier
    decoder layers are returned as well, for the loss to train. `num_classes` is K, the largest class id + 1.
    """

    def __init__(
        self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int, aux_loss: bool = False
    ):
        super().__init__()
        width = transformer.d_model
        # The order of registration is a contract: optimizers, also those in published checkpoints, match their saved
        # state to the parameters by position.
        self.transformer = transformer
        self.class_embed = nn.Linear(width, num_classes + 1)
        self.bbox_embed = MLP(width, width, 4, 3)
        self.query_embed = nn.Embedding(num_queries, width)
        self.input_proj = nn.Conv2d(backbone.num_channels, width, kernel_size=1)
        self.backbone = backbone
        self.num_queries, self.aux_loss = num_queries, aux_loss

    def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
        """Detect objects.

        `samples` is a NestedTensor, a list of images [3, h, w] or a batch [B, 3, H, W]: raw uint8 RGB, or floating and
        already normalised. Returns `pred_logits` [B, Q, K+1], `pred_boxes` [B, Q, 4] and, with `aux_loss`,
        `aux_outputs`: a list of the same two for each earlier decoder layer, the first layer first.
        """
        if isinstance(samples, (list, Tensor)):
            samples = nested_tensor_from_tensor_list(samples)
        _, _, hs, _ = self.encode(samples)
        return self.predict(hs)

    def encode(self, samples: NestedTensor) -> tuple[list[NestedTensor], Tensor, Tensor, Tensor]:
        """Run everything but the heads.

        Returns the backbone's features, finest first; the coarsest projected to width C, [B, C, h, w]; the decoder's
        outputs [L, B, Q, C]; and the encoder's memory [B, C, h, w].
        """
        features, positions = self.backbone(samples)
        src, mask = features[-1].decompose()
        assert mask is not None, "the backbone returned features without their mask"
        src = self.input_proj(src)
        hs, memory = self.transformer(src, mask, self.query_embed.weight, positions[-1])
        return features, src, hs, memory

    def predict(self, hs: Tensor) -> dict[str, Tensor]:  # and aux_outputs, which TorchScript cannot type
        """Turn decoder outputs [L, B, Q, C] into the dict that `forward` returns."""
        logits, boxes = self._heads(hs)
        out = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if not torch.jit.is_scripting():
            if self.aux_loss:
                out["aux_outputs"] = self._set_aux_loss(logits, boxes)
        return out  # ty: ignore[invalid-explicit-return]

    @torch.jit.unused
    def _set_aux_loss(self, outputs_class: Tensor, outputs_coord: Tensor) -> list[dict[str, Tensor]]:
        """List the outputs of the earlier decoder layers: from [L, B, Q, K+1] and [L, B, Q, 4], L - 1 dicts."""
        earlier = zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        return [{"pred_logits": logits, "pred_boxes": boxes} for logits, boxes in earlier]

    def _heads(self, hs: Tensor) -> tuple[Tensor, Tensor]:
        """Classes and boxes of decoder outputs [L, B, Q, C], in float32: half precision would round boxes to pixels."""
        if torch.jit.is_scripting():
            return self.class_embed(hs), self.bbox_embed(hs).sigmoid()
        with torch.autocast(hs.device.type, enabled=False):
            hs = hs.to(self.query_embed.weight.dtype)
            return self.class_embed(hs), self.bbox_embed(hs).sigmoid()


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_dim] -> [..., output_dim]."""
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == 0 else layer(x.relu())
        return x


class PostProcess(nn.Module):
    """Turns the network's outputs into scores, labels and boxes in pixels."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor | Sequence) -> list[dict[str, Tensor]]:
        """Give each query its best class other than "no object", and its box in pixels.

        `target_sizes`, a tensor [B, 2] or a list of pairs, holds (height, width): the original sizes for COCO's AP, the
        sizes of the model's input, without padding, for drawing on it. Returns for each image `scores` [Q], `labels`
        [Q], `boxes` [Q, 4] (x0, y0, x1, y1).
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        if not isinstance(target_sizes, Tensor):
            target_sizes = torch.tensor(as_pairs(target_sizes))
        if target_sizes.shape != (len(logits), 2):
            raise ValueError(
                f"expected a (height, width) for each of {len(logits)} images, got {list(target_sizes.shape)}"
            )
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        height, width = target_sizes.to(boxes.device).unbind(1)
        scale = torch.stack([width, height, width, height], dim=1)
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))  # half precision cannot hold pixel positions
        boxes = box_ops.box_cxcywh_to_xyxy(boxes) * scale[:, None]
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)]


def build(args) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Build model, criterion and post-processors: `models.build_model` under the reference's import path."""
    from models import build_model  # imported here, since it imports this module

    return build_model(args)
