"""Flags become a model, its loss and its post-processors."""

import argparse

from torch import nn

from models.backbone import Backbone, Joiner
from models.criterion import SetCriterion, weights_for_layers
from models.detr import DETR, PostProcess
from models.matcher import HungarianMatcher
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.segmentation import DETRsegm, PostProcessPanoptic, PostProcessSegm
from models.transformer import Transformer
from util.dist import pick_device
from util.logger import logger

# The flags that DETR did not have. A caller whose `args` knows only the old ones gets these.
NEW_FLAGS = {"num_classes": None, "thing_classes": None, "backbone_weights": "imagenet", "backbone_norm": "frozen"}


def build_model(args) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Build what the flags describe: the model, the criterion, and the post-processors by name.

    `args` is any object with the model's flags as attributes: a Namespace of `main.get_args_parser()`, one found in a
    checkpoint (or the dict of them that this project's hold), a class of your own. `num_classes` defaults to 250 for
    coco_panoptic and to COCO's 91 otherwise.
    """
    args = argparse.Namespace(**args) if isinstance(args, dict) else args
    new = {name: getattr(args, name, default) for name, default in NEW_FLAGS.items()}
    num_classes = new["num_classes"] or (250 if args.dataset_file == "coco_panoptic" else 91)
    sizes = (args.backbone, args.lr_backbone > 0, args.masks, args.dilation)
    try:
        backbone = Backbone(*sizes, weights=new["backbone_weights"], norm=new["backbone_norm"])
    except OSError as error:
        if hasattr(args, "backbone_weights"):
            raise
        # Callers who cannot name weights mostly load a whole checkpoint next, so no network need not stop them.
        logger.warning(f"{error}; the backbone is random until a checkpoint is loaded into the model")
        backbone = Backbone(*sizes, weights="none", norm=new["backbone_norm"])
    transformer = Transformer(
        d_model=args.hidden_dim,
        nhead=args.nheads,
        num_encoder_layers=args.enc_layers,
        num_decoder_layers=args.dec_layers,
        dim_feedforward=args.dim_feedforward,
        dropout=args.dropout,
        normalize_before=args.pre_norm,
        return_intermediate_dec=True,
    )
    position_embedding = _position_embedding(args.position_embedding, args.hidden_dim // 2)
    model = DETR(Joiner(backbone, position_embedding), transformer, num_classes, args.num_queries, args.aux_loss)
    if args.masks:
        model = DETRsegm(model, freeze_detr=bool(args.frozen_weights))

    matcher = HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou)
    weights = {"loss_ce": 1, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    weight_dict = weights_for_layers(weights, args.dec_layers if args.aux_loss else 1)
    losses, postprocessors = ["labels", "boxes", "cardinality"], {"bbox": PostProcess()}
    if args.masks:
        weight_dict |= {"loss_mask": args.mask_loss_coef, "loss_dice": args.dice_loss_coef}
        losses.append("masks")
        postprocessors |= {"segm": PostProcessSegm()} | _panoptic(args.dataset_file, new["thing_classes"])
    criterion = SetCriterion(num_classes, matcher, weight_dict, args.eos_coef, losses)
    criterion.to(pick_device(args.device))
    return model, criterion, postprocessors


def _panoptic(dataset_file: str, thing_classes: list[int] | None) -> dict[str, nn.Module]:
    """The panoptic read-out, where the data has stuff: in COCO, the classes above 90."""
    if thing_classes is None and dataset_file != "coco_panoptic":
        return {}
    things = range(91) if thing_classes is None else thing_classes
    return {"panoptic": PostProcessPanoptic(dict.fromkeys(things, True))}


def _position_embedding(kind: str, num_pos_feats: int) -> nn.Module:
    if kind in ("sine", "v2"):
        return PositionEmbeddingSine(num_pos_feats, normalize=True)
    if kind in ("learned", "v3"):
        return PositionEmbeddingLearned(num_pos_feats)
    raise ValueError(f"no position embedding {kind!r}: choose sine or learned")
