"""A model with the weights that a run starts from: a checkpoint's, another model's, or random ones."""

import argparse

import torch
from torch import nn

from models import build_model
from models.checkpointing import checkpoint_activations
from util.checkpoint import count_classes, load_checkpoint, load_model
from util.finetune import finetune
from util.logger import logger
from util.origin import check_origin, saved_flags


def build_described(state: dict, name: str) -> tuple[nn.Module, dict[str, nn.Module], argparse.Namespace]:
    """Build the network that a checkpoint called `name` describes, with its weights.

    Returns the model on the CPU, its post-processors, and the flags of the run. Raises ValueError if the checkpoint
    does not say its architecture, as the published files do not.
    """
    saved, classes = saved_flags(state), count_classes(state["model"])
    if not saved:
        raise ValueError(f"{name} does not say its architecture (no 'args' in it)")
    if classes is None:
        raise ValueError(f"{name}: no class head 'class_embed' in it; it is of another architecture than DETR")
    args = argparse.Namespace(**{**saved, "backbone_weights": "none", "device": "cpu", "num_classes": classes})
    model, _, postprocessors = build_model(args)
    load_model(model, state, name)
    return model, postprocessors, args


def build_parts(
    args, device: torch.device, checkpoint: dict | None = None, name: str = "", class_names: dict | None = None
) -> tuple:
    """Build model, criterion and post-processors on the device, with the weights of a checkpoint called `name`.

    Differences between this run (flags, `class_names` of its data) and the one that wrote the weights are logged.
    """
    # When resuming, --finetune and --frozen_weights are ignored: the checkpoint has all weights.
    origin, source = checkpoint, args.finetune or args.frozen_weights
    if source and not checkpoint:
        origin, name = load_checkpoint(source), source
    # A checkpoint has the backbone's weights too, so ImageNet's are not downloaded.
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
        logger.warning("evaluating a model with random weights: give its checkpoint with --resume")
    if args.checkpoint_activations:
        checkpoint_activations(model)
    return model.to(device), criterion, postprocessors
