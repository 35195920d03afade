"""A model with the weights that a run starts from: a checkpoint's, another model's, or random ones."""

import argparse

import torch

from models import build_model
from util.checkpoint import load_checkpoint, load_model
from util.finetune import finetune
from util.logger import logger
from util.origin import check_origin


def build_parts(
    args, device: torch.device, checkpoint: dict | None = None, name: str = "", class_names: dict | None = None
) -> tuple:
    """Build model, criterion and post-processors on the device, with the weights of a checkpoint called `name`.

    Differences between the run that the weights are from and this one, or its data's `class_names`, are logged.
    """
    # When resuming, --finetune and --frozen_weights are ignored: the checkpoint has all weights.
    origin, source = checkpoint, args.finetune or args.frozen_weights
    if source and not checkpoint:
        origin, name = load_checkpoint(source), source
    # A checkpoint has the backbone too: ImageNet's need not be downloaded.
    weights = "none" if origin else args.backbone_weights
    flags = {**vars(args), "backbone_weights": weights, "device": str(device)}
    model, criterion, postprocessors = build_model(argparse.Namespace(**flags))
    starts = bool(args.finetune and not checkpoint)
    if origin:
        check_origin(vars(args), origin, name, class_names or {}, starts)
    if checkpoint:
        load_model(model, checkpoint, name)
        logger.info(f"weights from {name}")
    elif starts:
        logger.info("\n  ".join(finetune(model, origin["model"], name)))
    elif origin:
        load_model(model.detr, origin, name)
        logger.info(f"detector from {name}, frozen: only the mask head trains")
    elif args.eval:
        logger.warning("evaluating a model that was never trained: --resume names its checkpoint")
    return model.to(device), criterion, postprocessors
