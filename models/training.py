"""DETR in training with extra outputs, and their losses; what is saved, evaluated and used is the network inside.

Shapes: B images, Q object queries, D denoising queries, N feature cells, C hidden width, L decoder layers.
"""

import torch
from torch import Tensor, nn

from models import denoising, encoder_loss
from models.criterion import SetCriterion
from models.denoising import DenoisingQueries
from models.detr import DETR
from util.flags import NEW_FLAGS, with_defaults
from util.nested_tensor import NestedTensor

EXTRA_LOSSES = ("loss_ce", "loss_bbox", "loss_giou")


class TrainingDETR(nn.Module):
    """A DETR with denoising queries beside its object queries, or predictions of the encoder's cells, or both."""

    def __init__(self, detr: DETR, queries: DenoisingQueries | None = None, encoder_loss: bool = False):
        super().__init__()
        self.detr, self.queries, self.encoder_loss = detr, queries, encoder_loss

    def forward(self, samples: NestedTensor, targets: list[dict[str, Tensor]]) -> dict:
        """Detect objects as DETR does.

        Returns DETR's outputs and, in the same form, `denoising`: the outputs of the denoising queries [B, D, ...], and
        `encoder`: those of the encoder's cells [B, N, ...], with their `padding` [B, h, w].
        """
        detr = self.detr
        features, positions = detr.backbone(samples)
        src, mask = features[-1].decompose()
        cells, pos = detr.input_proj(src).flatten(2).transpose(1, 2), positions[-1].flatten(2).transpose(1, 2)
        padding = mask.flatten(1)
        memory = detr.transformer.encoder(cells, src_key_padding_mask=padding, pos=pos)

        queries = detr.query_embed.weight.unsqueeze(0).expand(len(memory), -1, -1)
        objects, tgt_mask = queries.shape[1], None
        if self.queries:
            noised = self.queries(targets).to(queries.dtype)
            tgt_mask = self.queries.attention_mask(objects, noised.shape[1], noised.device)
            queries = torch.cat([queries, noised], dim=1)
        hs = detr.transformer.decode(memory, padding, pos, queries, tgt_mask)
        outputs: dict = detr.predict(hs[:, :, :objects])
        if self.queries:
            outputs["denoising"] = detr.predict(hs[:, :, objects:])
        if self.encoder_loss:
            outputs["encoder"] = detr.predict(detr.transformer.decoder.norm(memory).unsqueeze(0)) | {"padding": mask}
        return outputs


class TrainingCriterion(nn.Module):
    """DETR's loss, and the losses of TrainingDETR's extra outputs under names that begin with `dn_` and `enc_`.

    `groups` is the number of groups of denoising queries; `encoder_loss_coef` multiplies the losses of the encoder.
    """

    def __init__(self, criterion: SetCriterion, groups: int = 0, encoder_loss_coef: float = 0.0):
        super().__init__()
        self.criterion, self.groups = criterion, groups
        self.weight_dict = dict(criterion.weight_dict)
        for name, weight in criterion.weight_dict.items():
            if groups and name.startswith(EXTRA_LOSSES):
                self.weight_dict[denoising.PREFIX + name] = weight
            if encoder_loss_coef and name in EXTRA_LOSSES:
                self.weight_dict[encoder_loss.PREFIX + name] = encoder_loss_coef * weight

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        """Compute all losses; the network's own outputs, as in evaluation, give DETR's only."""
        losses = self.criterion(outputs, targets)
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            if "denoising" in outputs:
                extra = denoising.denoising_losses(self.criterion, outputs["denoising"], targets, self.groups)
                losses |= {denoising.PREFIX + name: value for name, value in extra.items()}
            if "encoder" in outputs:
                extra = encoder_loss.encoder_losses(self.criterion, outputs["encoder"], targets)
                losses |= {encoder_loss.PREFIX + name: value for name, value in extra.items()}
        return losses


def build_training(
    args, model: nn.Module, criterion: SetCriterion
) -> tuple[nn.Module, nn.Module, DenoisingQueries | None]:
    """Add the extra outputs that the flags ask for to the model, and their losses to the criterion.

    Returns the network to train, its criterion, and the module of the parameters that exist only in training, or None.
    Without such flags, the first two are the model and the criterion themselves.
    """
    flags = with_defaults(args, NEW_FLAGS)
    if not flags.denoising_groups and not flags.encoder_loss_coef:
        return model, criterion, None
    queries = None
    if flags.denoising_groups:
        queries = DenoisingQueries(
            model.transformer.d_model,
            criterion.num_classes,
            flags.denoising_groups,
            flags.denoising_box_noise,
            flags.denoising_label_noise,
        ).to(criterion.empty_weight.device)
    network = TrainingDETR(model, queries, encoder_loss=flags.encoder_loss_coef > 0)
    return network, TrainingCriterion(criterion, flags.denoising_groups, flags.encoder_loss_coef), queries
