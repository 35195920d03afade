"""Masks on top of DETR: the mask head, its losses, and the post-processing of instance masks (paper, section 4.4).

Shapes: B images, Q queries, N chosen queries (of any of the images), C hidden width, M attention heads, h x w cells of
the coarsest features, h4 x w4 of the finest (stride 4), H x W pixels. Masks are logits until post-processing.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.panoptic import PostProcessPanoptic
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.sizes import as_pairs

__all__ = [
    "DETRsegm",
    "MHAttentionMap",
    "MaskHeadSmallConv",
    "NestedTensor",
    "PostProcessPanoptic",
    "PostProcessSegm",
    "dice_loss",
    "interpolate",
    "nested_tensor_from_tensor_list",
    "sigmoid_focal_loss",
]

MASKS_AT_ONCE = 16  # full-size float masks that post-processing holds at a time


class DETRsegm(nn.Module):
    """A DETR, and a head that computes a mask for each of its queries.

    The backbone of `detr` must return the features of all four layers (`return_interm_layers`). With `freeze_detr` only
    the head trains: the detector's weights do not change, and it stays in evaluation mode.

    In training the loss needs only the masks of matched queries. With `matched_masks_only`, outputs in training mode
    have a function `masks_of` in place of `pred_masks`, and SetCriterion calls it: several times less memory.
    """

    def __init__(self, detr: nn.Module, freeze_detr: bool = False, matched_masks_only: bool = False):
        super().__init__()
        self.detr = detr.requires_grad_(False) if freeze_detr else detr
        self.frozen = freeze_detr
        self.matched_masks_only = matched_masks_only
        width, heads, channels = detr.transformer.d_model, detr.transformer.nhead, detr.backbone.num_channels
        self.bbox_attention = MHAttentionMap(width, width, heads)
        self.mask_head = MaskHeadSmallConv(width + heads, [channels // 2, channels // 4, channels // 8], width)

    def train(self, mode: bool = True) -> "DETRsegm":
        """Set training or evaluation mode; a frozen detector stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.detr.eval()
        return self

    def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
        """Detect objects and their masks: DETR's outputs and `pred_masks` [B, Q, h4, w4].

        In training mode, with `matched_masks_only`, `masks_of(image, query)` takes their place: for two index vectors
        [N] it returns those queries' masks [N, h4, w4]. Queries do not see each other in the head, so these are the
        values that computing all masks would give.
        """
        if isinstance(samples, (list, Tensor)):
            samples = nested_tensor_from_tensor_list(samples)
        features, src, hs, memory = self.detr.encode(samples)
        assert len(features) == 4, (
            "the mask head needs the features of four layers: Backbone(return_interm_layers=True)"
        )
        out = self.detr.predict(hs)
        padding = features[3].mask
        finer = [features[2].tensors, features[1].tensors, features[0].tensors]
        if not torch.jit.is_scripting():
            if self.training and self.matched_masks_only:
                out["masks_of"] = partial(self._masks_of, src, hs[-1], memory, padding, finer)
                return out
        maps = self.bbox_attention(hs[-1], memory, padding)
        masks = self.mask_head(src, maps, finer)[:, 0]
        out["pred_masks"] = masks.float().view(maps.shape[0], maps.shape[1], masks.shape[1], masks.shape[2])
        return out

    @torch.jit.unused
    def _masks_of(
        self,
        src: Tensor,
        hs: Tensor,
        memory: Tensor,
        padding: Tensor,
        finer: list[Tensor],
        image: Tensor,
        query: Tensor,
    ) -> Tensor:
        """Masks of the queries `query` [N] of the images `image` [N], in the precision that computed the features."""
        half = memory.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(memory.device.type, dtype=memory.dtype if half else None, enabled=half):
            maps = self.bbox_attention(hs, memory, padding)[image, query]
            return self.mask_head(src, maps, finer, image)[:, 0].float()


class MHAttentionMap(nn.Module):
    """The weights of a multi-head attention, without values: where in the image each query attends."""

    def __init__(self, query_dim: int, hidden_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim {hidden_dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.scale = (hidden_dim / num_heads) ** -0.5
        self.dropout = nn.Dropout(dropout)
        self.q_linear = nn.Linear(query_dim, hidden_dim, bias=bias)
        self.k_linear = nn.Linear(query_dim, hidden_dim, bias=bias)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [B, Q, C], image [B, C, h, w], padding [B, h, w] -> [B, Q, M, h, w], which sums to 1 over M, h, w."""
        keys = self.k_linear(k.flatten(2).transpose(1, 2)).unflatten(2, (self.num_heads, -1))
        queries = self.q_linear(q).unflatten(2, (self.num_heads, -1)) * self.scale
        scores = torch.einsum("bqmc,bnmc->bqmn", queries, keys)
        if mask is not None:
            scores = scores.masked_fill(mask.flatten(1)[:, None, None], float("-inf"))
        weights = scores.flatten(2).softmax(-1).view(q.shape[0], q.shape[1], self.num_heads, k.shape[2], k.shape[3])
        return self.dropout(weights)


class MaskHeadSmallConv(nn.Module):
    """Convolutions that refine attention maps while adding ever finer backbone features, as in a feature pyramid.

    `dim` is the width of the coarse features and the attention maps together, `fpn_dims` are the channels of the three
    finer features, coarse to fine, and `context_dim` the hidden width; the levels have 1/2, 1/4, 1/8 and 1/16 of it.
    """

    def __init__(self, dim: int, fpn_dims: Sequence[int], context_dim: int):
        super().__init__()
        if dim % 8 or context_dim % 128:
            raise ValueError(
                f"the mask head normalises channels in 8 groups: the hidden width must be a multiple of 128 and the "
                f"number of heads of 8, got a width of {context_dim} and {dim - context_dim} heads"
            )
        widths = [dim, dim, *(context_dim // share for share in (2, 4, 8, 16))]

        def level(i: int) -> tuple[nn.Conv2d, nn.GroupNorm]:
            return nn.Conv2d(widths[i - 1], widths[i], 3, padding=1), nn.GroupNorm(8, widths[i])

        # The order of registration is a contract: optimizers match their state to the parameters by position.
        self.lay1, self.gn1 = level(1)
        self.lay2, self.gn2 = level(2)
        self.lay3, self.gn3 = level(3)
        self.lay4, self.gn4 = level(4)
        self.lay5, self.gn5 = level(5)
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        self.adapter1, self.adapter2, self.adapter3 = (
            nn.Conv2d(channels, width, 1) for channels, width in zip(fpn_dims, widths[2:5], strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, bbox_mask: Tensor, fpns: list[Tensor], image: Tensor | None = None) -> Tensor:
        """Compute masks of the size of the finest features.

        Takes features `x` [B, C, h, w], three finer ones `fpns` [B, *, *, *], coarse to fine, and attention maps
        [B, Q, M, h, w]: all queries of each image; or [N, M, h, w]: queries chosen from the images `image` [N].
        Returns [B * Q, 1, h4, w4] or [N, 1, h4, w4].
        """
        if image is None:
            batch, queries = bbox_mask.shape[0], bbox_mask.shape[1]
            image = torch.arange(batch, device=x.device).unsqueeze(1).expand(batch, queries).flatten()
            bbox_mask = bbox_mask.flatten(0, 1)
        # The convolution of concatenated features and maps is the sum of a convolution of each. That of the features,
        # by far the larger one, is the same for all queries of an image.
        channels = x.shape[1]
        shared = F.conv2d(x, self.lay1.weight[:, :channels], self.lay1.bias, padding=1)
        x = F.conv2d(bbox_mask, self.lay1.weight[:, channels:], padding=1) + shared.index_select(0, image)
        x = self.gn1(x).relu_()
        x = self.gn2(self.lay2(x)).relu_()
        x = self.gn3(self.lay3(_merge(x, self.adapter1(fpns[0]), image))).relu_()
        x = self.gn4(self.lay4(_merge(x, self.adapter2(fpns[1]), image))).relu_()
        x = self.gn5(self.lay5(_merge(x, self.adapter3(fpns[2]), image))).relu_()
        return self.out_lay(x)


def _merge(x: Tensor, finer: Tensor, image: Tensor) -> Tensor:
    """Enlarge x [N, c, *, *] and add to each the features [B, c, *, *] of its image."""
    return F.interpolate(x, size=finer.shape[-2:], mode="nearest") + finer.index_select(0, image)


def _expand(tensor: Tensor, length: int) -> Tensor:
    """Repeat each image of [B, C, h, w] `length` times: [B * length, C, h, w]."""
    return tensor.repeat_interleave(length, dim=0)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: Tensor | float, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """Focal loss (Lin et al. 2017) of logits [N, P] for 0/1 targets [N, P]: mean over P, summed, over `num_boxes`.

    Positives weigh `alpha`, negatives 1 - alpha (a negative alpha: both 1); an element that is right with probability p
    is scaled by (1 - p)^gamma.
    """
    entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    probability = inputs.sigmoid()
    wrong = probability + targets - 2 * probability * targets  # 1 - p: the probability of the other answer
    loss = entropy * wrong**gamma
    if alpha >= 0:
        loss = loss * (1 - alpha + (2 * alpha - 1) * targets)
    return loss.mean(1).sum() / num_boxes


def dice_loss(inputs: Tensor, targets: Tensor, num_boxes: Tensor | float) -> Tensor:
    """1 - dice (Milletari et al. 2016) of logits [N, P] and 0/1 targets [N, P], summed over N, over `num_boxes`.

    One is added to numerator and denominator, so that an empty mask for an empty target has no loss.
    """
    probability = inputs.sigmoid()
    overlap = (probability * targets).sum(1)
    dice = (2 * overlap + 1) / (probability.sum(1) + targets.sum(1) + 1)
    return (1 - dice).sum() / num_boxes


class PostProcessSegm(nn.Module):
    """Turns the network's masks into a binary mask for each detection, at the original image size."""

    def __init__(self, threshold: float = 0.5):
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        results: list[dict],
        outputs: dict[str, Tensor],
        orig_target_sizes: Tensor | Sequence,
        max_target_sizes: Tensor | Sequence,
    ) -> list[dict[str, Tensor]]:
        """Add `masks`, uint8 [Q, 1, H, W] at the original size, to each image's results from PostProcess.

        Both sizes are (height, width), tensors [B, 2] or lists of pairs: of the original images, and of the images as
        they entered the model, the largest of which the batch was padded to.
        """
        if not len(results) == len(orig_target_sizes) == len(max_target_sizes) == len(outputs["pred_masks"]):
            raise ValueError(
                f"{len(results)} results, {len(orig_target_sizes)} original sizes and {len(max_target_sizes)} input "
                f"sizes for the masks of {len(outputs['pred_masks'])} images"
            )
        sizes, finals = as_pairs(max_target_sizes), as_pairs(orig_target_sizes)
        padded = (max(height for height, _ in sizes), max(width for _, width in sizes))
        results_with_masks = []
        for result, masks, inner, final in zip(results, outputs["pred_masks"], sizes, finals, strict=True):
            parts = [self._resize(part, padded, inner, final) for part in masks[:, None].split(MASKS_AT_ONCE)]
            results_with_masks.append({**result, "masks": torch.cat(parts)})
        return results_with_masks

    def _resize(self, masks: Tensor, padded: tuple, inner: tuple, final: tuple) -> Tensor:
        full = F.interpolate(masks, size=padded, mode="bilinear", align_corners=False).sigmoid() > self.threshold
        return F.interpolate(full[:, :, : inner[0], : inner[1]].byte(), size=final, mode="nearest")
