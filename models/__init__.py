"""Build the model, its loss and its post-processors from the flags."""

import argparse

from torch import nn

from models.backbone import build_backbone
from models.criterion import SetCriterion, loss_weights
from models.detr import DETR, PostProcess, build
from models.local_queries import init_local_queries
from models.matcher import build_matcher
from models.segmentation import DETRsegm, PostProcessPanoptic, PostProcessSegm
from models.transformer import build_transformer
from util.dist import pick_device
from util.flags import NEW_FLAGS, with_defaults

__all__ = ["build", "build_model"]

COCO_CLASSES, COCO_PANOPTIC_CLASSES = 91, 250  # largest category id + 1, in the published models
COCO_THINGS = range(91)  # category ids of COCO's things; its stuff has larger ones


def build_model(args) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Build the model, the criterion and the post-processors, by name, from the flags.

    `args` is any object with the model's flags as attributes, or a dict of them: the Namespace of
    `main.get_args_parser()`, the entry `args` of a checkpoint, an object of your own class. `num_classes` defaults to
    250 for coco_panoptic and to COCO's 91 otherwise.
    """
    args = argparse.Namespace(**args) if isinstance(args, dict) else args
    flags = with_defaults(args, NEW_FLAGS)
    coco_panoptic = flags.dataset_file == "coco_panoptic"
    num_classes = flags.num_classes or (COCO_PANOPTIC_CLASSES if coco_panoptic else COCO_CLASSES)
    model = DETR(build_backbone(args), build_transformer(flags), num_classes, flags.num_queries, flags.aux_loss)
    if flags.query_init == "local":
        init_local_queries(model)
    if flags.masks:
        model = DETRsegm(model, freeze_detr=bool(flags.frozen_weights), matched_masks_only=True)

    weights = build_losses(flags)
    weight_dict = loss_weights(weights, flags.dec_layers if flags.aux_loss else 1)
    criterion = SetCriterion(num_classes, build_matcher(flags), weight_dict, flags.eos_coef, list(weights))
    criterion.to(pick_device(flags.device))
    return model, criterion, build_postprocessors(flags)


def build_losses(args) -> dict[str, dict[str, float]]:
    """List the losses to compute, each with the weights of the values it returns (none: for the log only).

    The loss "xyz" is the method `loss_xyz` of SetCriterion.
    """
    losses: dict[str, dict[str, float]] = {
        "labels": {"loss_ce": 1},
        "boxes": {"loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef},
        "cardinality": {},
    }
    if args.masks:
        losses["masks"] = {"loss_mask": args.mask_loss_coef, "loss_dice": args.dice_loss_coef}
    return losses


def build_postprocessors(args) -> dict[str, nn.Module]:
    """Build the post-processors by name: `bbox`, with masks also `segm`, and for data with stuff `panoptic`."""
    postprocessors = {"bbox": PostProcess()}
    if args.masks:
        postprocessors["segm"] = PostProcessSegm()
        things = args.thing_classes
        if things is None and args.dataset_file == "coco_panoptic":
            things = COCO_THINGS
        if things is not None:
            postprocessors["panoptic"] = PostProcessPanoptic(dict.fromkeys(things, True))
    return postprocessors
