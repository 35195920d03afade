"""The set loss: match predictions to objects, then compare the matched pairs, at every decoder layer.

Shapes: B images, Q queries, K classes (index K is "no object"), N matched pairs in the batch, T objects in an image.
Boxes are cxcywh in 0..1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.matcher import HungarianMatcher, Indices
from models.segmentation import dice_loss, sigmoid_focal_loss
from util.box_ops import box_cxcywh_to_xyxy, elementwise_giou
from util.dist import get_world_size, mean_over_processes
from util.metrics import accuracy

LAST_LAYER_ONLY = ("masks",)  # losses that are not computed for the earlier decoder layers


class SetCriterion(nn.Module):
    """DETR's loss (paper, section 3.1): cross-entropy, L1 and generalized IoU over the best assignment of each layer.

    `losses` names the losses to compute: "xyz" is the method `loss_xyz(outputs, targets, indices, num_boxes)`, which
    gets one decoder layer's outputs and returns {name: scalar}. The weights of `weight_dict` are not applied here:
    training sums `losses[name] * weight_dict[name]` over the names in `weight_dict`. `eos_coef` is the weight of "no
    object" in the cross-entropy; it is small because most queries match no object.

    `matcher` takes (one layer's outputs, targets) and returns for each image two index vectors: predictions, objects.
    """

    def __init__(
        self, num_classes: int, matcher: nn.Module, weight_dict: dict[str, float], eos_coef: float, losses: list[str]
    ):
        super().__init__()
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
        `loss_bbox`, `loss_giou` for the last layer and, with a suffix `_0`, `_1`..., for the earlier ones; and, for the
        log only, `class_error` and `cardinality_error`. Computes in float32 whatever precision the model ran in.
        The loss "masks" needs `pred_masks` [B, Q, h, w] or `masks_of` in the outputs (see DETRsegm.forward) and `masks`
        [T, H, W] in the targets; it adds `loss_mask` and `loss_dice`, of the last layer only.
        """
        device = outputs["pred_logits"].device
        last = {name: value for name, value in outputs.items() if name != "aux_outputs"}
        layers = [_in_float32(layer) for layer in (last, *outputs.get("aux_outputs", ()))]
        num_boxes = self.count_objects(targets, device)
        losses: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            indices = _to_device(self._match(layers, targets), device)
            if "masks" in self.losses and "masks_of" in outputs:
                layers[0]["pred_masks"] = self._matched_masks(outputs, indices[0])
            for i, (layer, pairs) in enumerate(zip(layers, indices, strict=True)):
                for loss in self.losses:
                    if i == 0:
                        losses.update(self.get_loss(loss, layer, targets, pairs, num_boxes))
                    elif loss not in LAST_LAYER_ONLY:
                        options = {"log": False} if loss == "labels" else {}
                        values = self.get_loss(loss, layer, targets, pairs, num_boxes, **options)
                        losses.update({f"{name}_{i - 1}": value for name, value in values.items()})
        return losses

    def get_loss(
        self, loss: str, outputs: dict, targets: list[dict], indices: Indices, num_boxes: Tensor | float, **kwargs
    ) -> dict[str, Tensor]:
        """Compute the loss named `loss` for one layer: the result of the method `loss_{loss}`."""
        method = getattr(self, f"loss_{loss}", None)
        if method is None:
            known = sorted(name.removeprefix("loss_") for name in dir(self) if name.startswith("loss_"))
            raise ValueError(f"no loss {loss!r}: choose from {', '.join(known)}")
        return method(outputs, targets, indices, num_boxes, **kwargs)

    def loss_labels(
        self, outputs: dict, targets: list[dict], indices: Indices, num_boxes: Tensor | float, log: bool = True
    ) -> dict[str, Tensor]:
        """Cross-entropy over all queries, averaged with class weights; the target of an unmatched query is class K.

        With `log`, `class_error` is the share of matched queries whose best class is wrong, in percent.
        """
        logits = outputs["pred_logits"]
        matched = self._get_src_permutation_idx(indices)
        labels = torch.cat([target["labels"][objects] for target, (_, objects) in zip(targets, indices, strict=True)])
        target_classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        target_classes[matched] = labels
        losses = {"loss_ce": F.cross_entropy(logits.transpose(1, 2), target_classes, self.empty_weight)}
        if log:
            losses["class_error"] = 100 - accuracy(logits[matched].detach(), labels)[0]
        return losses

    @torch.no_grad()
    def loss_cardinality(
        self, outputs: dict, targets: list[dict], indices: Indices, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """Absolute error of the number of queries that are not "no object", averaged over images. Not trained."""
        logits = outputs["pred_logits"]
        sizes = torch.tensor([float(len(target["labels"])) for target in targets])
        predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        return {"cardinality_error": F.l1_loss(predicted.float(), sizes.to(logits.device, non_blocking=True))}

    def loss_boxes(
        self, outputs: dict, targets: list[dict], indices: Indices, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """L1 distance and 1 - GIoU of matched boxes, summed over pairs and divided by the number of objects."""
        boxes = outputs["pred_boxes"][self._get_src_permutation_idx(indices)]
        # An image without objects may have boxes of shape [0].
        target_boxes = torch.cat(
            [t["boxes"].reshape(-1, 4)[objects] for t, (_, objects) in zip(targets, indices, strict=True)]
        )
        giou = elementwise_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        return {"loss_bbox": (boxes - target_boxes).abs().sum() / num_boxes, "loss_giou": (1 - giou).sum() / num_boxes}

    def loss_masks(
        self, outputs: dict, targets: list[dict], indices: Indices, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """Focal and dice loss of matched masks, upsampled to the size the images were padded to."""
        masks = outputs["pred_masks"][self._get_src_permutation_idx(indices)]
        target_masks = _padded_masks(targets)[self._get_tgt_permutation_idx(indices)]
        masks = F.interpolate(masks[:, None], size=target_masks.shape[-2:], mode="bilinear", align_corners=False)
        masks, target_masks = masks.flatten(1), target_masks.flatten(1).float()
        return {
            "loss_mask": sigmoid_focal_loss(masks, target_masks, num_boxes),
            "loss_dice": dice_loss(masks, target_masks, num_boxes),
        }

    def _get_src_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Image and query of every matched pair, two vectors [N] that index predictions [B, Q, ...]."""
        images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)])
        return images, torch.cat([queries for queries, _ in indices])

    def _get_tgt_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Image and object of every matched pair, two vectors [N] that index targets padded to [B, T, ...]."""
        images = torch.cat([torch.full_like(objects, i) for i, (_, objects) in enumerate(indices)])
        return images, torch.cat([objects for _, objects in indices])

    def _match(self, layers: list[dict], targets: list[dict]) -> list[Indices]:
        """Match each layer: HungarianMatcher's own matching takes all layers at once, any other one layer at a time."""
        forward = getattr(self.matcher, "forward", None)
        if getattr(forward, "__func__", None) is HungarianMatcher.forward:
            return self.matcher.match_layers(layers, targets)
        return [self.matcher(layer, targets) for layer in layers]

    def _matched_masks(self, outputs: dict, indices: Indices) -> Tensor:
        """Compute the masks of the matched queries; return them as `pred_masks` [B, Q, h, w], zero for the others."""
        matched = self._get_src_permutation_idx(indices)
        masks = outputs["masks_of"](*matched).float()
        all_masks = masks.new_zeros(*outputs["pred_logits"].shape[:2], *masks.shape[-2:])
        return all_masks.index_put(matched, masks)

    def count_objects(self, targets: list[dict], device: torch.device) -> Tensor | float:
        """Count the objects (at least 1), in training averaged over processes: the divisor of sums over matched pairs.

        In evaluation, processes may have different numbers of batches and must not wait for each other.
        """
        count = float(sum(len(target["labels"]) for target in targets))
        if not self.training or get_world_size() == 1:
            return max(count, 1.0)
        return mean_over_processes(count, device).clamp(min=1)


def loss_weights(weights: dict[str, dict[str, float]], layers: int) -> dict[str, float]:
    """Return the weights of all losses by name, for `layers` decoder layers.

    `weights` maps the losses of SetCriterion to the weights of what they return, for example
    {"labels": {"loss_ce": 1}}. The earlier layers have the suffixes _0, _1, ...
    """
    weight_dict = {name: weight for values in weights.values() for name, weight in values.items()}
    for i in range(layers - 1):
        for loss, values in weights.items():
            if loss not in LAST_LAYER_ONLY:
                weight_dict |= {f"{name}_{i}": weight for name, weight in values.items()}
    return weight_dict


def _in_float32(layer: dict) -> dict:
    """Copy one layer's outputs with half-precision tensors as float32."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in layer.items()
    }


def _to_device(indices: list[Indices], device: torch.device) -> list[Indices]:
    """Copy the index vectors of all layers to a device at once, so that later indexing does not wait for a copy."""
    vectors = [torch.as_tensor(vector, dtype=torch.int64) for layer in indices for pair in layer for vector in pair]
    moved = torch.cat(vectors).to(device, non_blocking=True).split([len(vector) for vector in vectors])
    pairs = list(zip(moved[::2], moved[1::2], strict=True))
    images = len(indices[0])
    return [pairs[first : first + images] for first in range(0, len(pairs), images)]


def _padded_masks(targets: list[dict]) -> Tensor:
    """Masks of all targets padded to one size, bool [B, T, H, W]. ValueError if a target has none."""
    if not all("masks" in target for target in targets):
        raise ValueError("the loss 'masks' needs an entry 'masks' [T, H, W] in every target")
    shapes = [target["masks"].shape for target in targets]
    most, height, width = (max(shape[side] for shape in shapes) for side in range(3))
    padded = targets[0]["masks"].new_zeros(len(targets), most, height, width, dtype=torch.bool)
    for target, place in zip(targets, padded, strict=True):
        masks = target["masks"].bool()
        place[: masks.shape[0], : masks.shape[1], : masks.shape[2]] = masks
    return padded
