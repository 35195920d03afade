"""The set loss: match predictions to objects, then compare what was matched, at every decoder layer.

Shapes: L decoder layers (the last one first), B images, Q queries, K classes (index K is "no object"), N matched pairs
in the whole batch (the same number at each layer). Boxes are cxcywh in 0..1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.matcher import HungarianMatcher
from models.segmentation import dice_loss, sigmoid_focal_loss
from util.box_ops import box_cxcywh_to_xyxy, elementwise_giou
from util.dist import mean_over_processes


@dataclass
class Matched:
    """Predictions of L layers and the objects they answer, as the losses want them."""

    logits: Tensor  # [L, B, Q, K+1]
    boxes: Tensor  # [L, B, Q, 4]
    layer: Tensor  # [L, 1], the first index of a matched prediction
    image: Tensor  # [L, N], the second
    query: Tensor  # [L, N], the third
    labels: Tensor  # [L, N], class of the object answered
    target_boxes: Tensor  # [L, N, 4], box of the object answered
    sizes: list[int]  # objects in each image
    num_boxes: Tensor | float  # objects per process, at least 1: what sums over pairs are divided by
    masks: Tensor | None = None  # [N, h, w], logits of the last layer's matched masks, if there are masks
    target_masks: Tensor | None = None  # [N, H, W] bool, masks of the objects they answer, padded

    def of_pairs(self, predictions: Tensor) -> Tensor:
        """Pick the matched ones of predictions [L, B, Q, ...] -> [L, N, ...]."""
        return predictions[self.layer, self.image, self.query]


class SetCriterion(nn.Module):
    """DETR's loss (paper, section 3.1): cross-entropy, L1 and generalized IoU over the best assignment of each layer.

    `losses` names the methods to run, out of LOSSES; each takes a Matched and returns named values, one for every
    layer. The weights of `weight_dict` are not applied here: training sums `losses[name] * weight_dict[name]` over the
    names it holds. `eos_coef` is the weight of "no object" in the cross-entropy, where most slots are empty.

    `matcher` is a HungarianMatcher, or anything that is called as one; it finds the same number of pairs at each layer.
    """

    LOSSES = {"labels": "loss_labels", "cardinality": "loss_cardinality", "boxes": "loss_boxes", "masks": "loss_masks"}

    def __init__(
        self, num_classes: int, matcher: nn.Module, weight_dict: dict[str, float], eos_coef: float, losses: list[str]
    ):
        super().__init__()
        unknown = sorted(set(losses) - set(self.LOSSES))
        if unknown:
            raise ValueError(f"unknown losses {unknown}: choose from {sorted(self.LOSSES)}")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = losses
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        """Compare outputs with targets.

        `outputs` has `pred_logits` [B, Q, K+1], `pred_boxes` [B, Q, 4] and, for the earlier decoder layers, a list
        `aux_outputs` of the same; each target has `labels` [T] and `boxes` [T, 4]. Returns scalars: `loss_ce`,
        `loss_bbox`, `loss_giou` for the last layer and, with a suffix `_0`, `_1`..., for the earlier ones; and, to look
        at rather than to train, `class_error` and `cardinality_error`. Computes in float32 whatever the model ran in.
        The loss "masks" needs `pred_masks` [B, Q, h, w] or `masks_of` in the outputs (see models/segmentation.py) and
        `masks` [T, H, W] in the targets; it adds `loss_mask` and `loss_dice`, of the last layer only.
        """
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            matched = self._match(outputs, targets)
            losses = {}
            for loss in self.losses:
                for name, by_layer in getattr(self, self.LOSSES[loss])(matched).items():
                    for i, value in enumerate(by_layer.unbind()):
                        losses[f"{name}_{i - 1}" if i else name] = value
        return losses

    def _match(self, outputs: dict, targets: list[dict]) -> Matched:
        layers = [outputs, *outputs.get("aux_outputs", ())]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()
        if getattr(type(self.matcher), "forward", None) is HungarianMatcher.forward:
            indices = self.matcher.match_layers(logits, boxes, targets)
        else:  # a matcher of your own, layer by layer
            heads = [{name: layer[name] for name in ("pred_logits", "pred_boxes")} for layer in layers]
            indices = [[tuple(map(torch.as_tensor, pair)) for pair in self.matcher(head, targets)] for head in heads]
        sizes = [len(target["labels"]) for target in targets]
        # At evaluation processes may hold different numbers of batches, and must not wait for each other.
        num_boxes = mean_over_processes(sum(sizes), logits.device) if self.training else sum(sizes)
        first = [sum(sizes[:i]) for i in range(len(sizes))]  # of each image's objects, when all are laid end to end
        pairs = torch.stack(  # built on the CPU, sent in one copy: (image, query, object) of every pair of every layer
            [
                torch.stack(
                    [
                        torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(layer)]),
                        torch.cat([queries for queries, _ in layer]),
                        torch.cat([objects + start for start, (_, objects) in zip(first, layer, strict=True)]),
                    ]
                )
                for layer in indices
            ],
            dim=1,
        )
        image, query, answered = pairs.to(logits.device, non_blocking=True)
        return Matched(
            logits=logits,
            boxes=boxes,
            layer=torch.arange(len(layers), device=logits.device)[:, None],
            image=image,
            query=query,
            labels=torch.cat([target["labels"] for target in targets])[answered],
            target_boxes=torch.cat([target["boxes"].reshape(-1, 4) for target in targets]).float()[answered],
            sizes=sizes,
            num_boxes=_at_least_one(num_boxes),
            masks=self._masks(outputs, image[0], query[0]),
            target_masks=self._target_masks(targets, answered[0]),
        )

    def _masks(self, outputs: dict, image: Tensor, query: Tensor) -> Tensor | None:
        """Masks of chosen queries: in training the model draws just these, in evaluation it has drawn all."""
        if "masks" not in self.losses:
            return None
        if "masks_of" in outputs:
            return outputs["masks_of"](image, query)
        return outputs["pred_masks"][image, query].float()

    def _target_masks(self, targets: list[dict], answered: Tensor) -> Tensor | None:
        if "masks" not in self.losses:
            return None
        if not all("masks" in target for target in targets):
            raise ValueError("the loss 'masks' needs an entry 'masks' [T, H, W] in every target: --masks gives it")
        height, width = (max(target["masks"].shape[side] for target in targets) for side in (1, 2))
        return torch.cat(
            [
                F.pad(t["masks"].bool(), (0, width - t["masks"].shape[2], 0, height - t["masks"].shape[1]))
                for t in targets
            ]
        )[answered]

    def loss_labels(self, matched: Matched) -> dict[str, Tensor]:
        """Cross-entropy over all slots, an unmatched one having class K; the mean weighted by class.

        `class_error` is the share of matched slots of the last layer whose best class is wrong, in percent.
        """
        logits = matched.logits
        wanted = torch.full(logits.shape[:3], self.num_classes, dtype=torch.int64, device=logits.device)
        wanted[matched.layer, matched.image, matched.query] = matched.labels
        entropy = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), self.empty_weight, reduction="none")
        weight = self.empty_weight[wanted].flatten(1).sum(1)
        wrong = logits[matched.layer[:1], matched.image[:1], matched.query[:1]].argmax(-1) != matched.labels[:1]
        class_error = 100 * wrong.float().mean(1) if wrong.numel() else logits.new_full((1,), 100.0)
        return {"loss_ce": entropy.view(len(logits), -1).sum(1) / weight, "class_error": class_error}

    @torch.no_grad()
    def loss_cardinality(self, matched: Matched) -> dict[str, Tensor]:
        """Absolute error of the number of slots that are not "no object", averaged over images. Not trained."""
        sizes = torch.tensor(matched.sizes, dtype=torch.float32).to(matched.logits.device, non_blocking=True)
        counted = (matched.logits.argmax(-1) != self.num_classes).sum(-1)
        return {"cardinality_error": (counted - sizes).abs().mean(1)}

    def loss_boxes(self, matched: Matched) -> dict[str, Tensor]:
        """L1 distance and 1 - GIoU of matched boxes, summed over pairs and divided by the number of objects."""
        boxes = matched.of_pairs(matched.boxes)
        giou = elementwise_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(matched.target_boxes))
        return {
            "loss_bbox": (boxes - matched.target_boxes).abs().sum((1, 2)) / matched.num_boxes,
            "loss_giou": (1 - giou).sum(1) / matched.num_boxes,
        }

    def loss_masks(self, matched: Matched) -> dict[str, Tensor]:
        """Focal and dice loss of the last layer's matched masks, enlarged to the size the images were padded to."""
        wanted = matched.target_masks.flatten(1).float()
        size = matched.target_masks.shape[-2:]
        masks = F.interpolate(matched.masks[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
        return {
            "loss_mask": sigmoid_focal_loss(masks, wanted, matched.num_boxes)[None],
            "loss_dice": dice_loss(masks, wanted, matched.num_boxes)[None],
        }


def weights_for_layers(weights: dict[str, float], layers: int) -> dict[str, float]:
    """Repeat the weights of the last layer's losses for the earlier ones of `layers` decoder layers."""
    suffixes = [""] + [f"_{i}" for i in range(layers - 1)]
    return {f"{name}{suffix}": weight for suffix in suffixes for name, weight in weights.items()}


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
