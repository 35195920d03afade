"""The fork's model: a head for quality, a matcher, a criterion with one more loss, and a post-processor."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from models.backbone import build_backbone
from models.detr import DETR, MLP, PostProcess, SetCriterion
from models.transformer import build_transformer
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou
from util.misc import NestedTensor, nested_tensor_from_tensor_list


class QualityDETR(DETR):
    """DETR with a third head."""

    def __init__(self, backbone, transformer, num_classes, num_queries, aux_loss=False):
        super().__init__(backbone, transformer, num_classes, num_queries, aux_loss=aux_loss)
        self.quality_embed = MLP(transformer.d_model, transformer.d_model, 1, 2)

    def forward(self, samples):
        if not isinstance(samples, NestedTensor):
            samples = nested_tensor_from_tensor_list(samples)
        features, pos = self.backbone(samples)
        src, mask = features[-1].decompose()
        hs = self.transformer(self.input_proj(src), mask, self.query_embed.weight, pos[-1])[0]
        classes, boxes, quality = self.class_embed(hs), self.bbox_embed(hs).sigmoid(), self.quality_embed(hs).sigmoid()
        out = {"pred_logits": classes[-1], "pred_boxes": boxes[-1], "pred_quality": quality[-1]}
        if self.aux_loss:
            out["aux_outputs"] = self._set_aux_loss(classes, boxes)
            for layer, q in zip(out["aux_outputs"], quality[:-1], strict=True):
                layer["pred_quality"] = q
        return out


class CenterMatcher(nn.Module):
    """Match by GIoU and quality."""

    @torch.no_grad()
    def forward(self, outputs, targets):
        indices = []
        for i, target in enumerate(targets):
            giou = generalized_box_iou(
                box_cxcywh_to_xyxy(outputs["pred_boxes"][i]), box_cxcywh_to_xyxy(target["boxes"])
            )
            cost = -giou + (outputs["pred_quality"][i] - target["quality"][None]).abs()
            indices.append([torch.as_tensor(x, dtype=torch.int64) for x in linear_sum_assignment(cost.cpu())])
        return indices


class QualityCriterion(SetCriterion):
    """DETR's losses and one for quality."""

    def loss_quality(self, outputs, targets, indices, num_boxes):
        idx = self._get_src_permutation_idx(indices)
        wanted = torch.cat([t["quality"][j] for t, (_, j) in zip(targets, indices, strict=True)])
        return {"loss_quality": F.l1_loss(outputs["pred_quality"][idx][:, 0], wanted, reduction="sum") / num_boxes}

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
        if loss == "quality":
            return self.loss_quality(outputs, targets, indices, num_boxes)
        return super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)


class QualityPostProcess(PostProcess):
    """Scores weighted by quality."""

    @torch.no_grad()
    def forward(self, outputs, target_sizes):
        results = super().forward(outputs, target_sizes)
        for result, quality in zip(results, outputs["pred_quality"], strict=True):
            result["scores"] = result["scores"] * quality[:, 0]
        return results


def build(args):
    """Build model, criterion and post-processors."""
    model = QualityDETR(build_backbone(args), build_transformer(args), 4, args.num_queries, aux_loss=args.aux_loss)
    weight_dict = {"loss_ce": 1, "loss_bbox": args.bbox_loss_coef, "loss_giou": 2, "loss_quality": 1}
    for i in range(args.dec_layers - 1):
        weight_dict.update({f"{name}_{i}": weight for name, weight in list(weight_dict.items())[:4]})
    losses = ["labels", "boxes", "cardinality", "quality"]
    criterion = QualityCriterion(4, CenterMatcher(), weight_dict, args.eos_coef, losses)
    return model, criterion.to(args.device), {"bbox": QualityPostProcess()}
