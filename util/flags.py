"""Flags: defaults of those that a caller's `args` may lack, and a check of values. Nothing here imports PyTorch."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

# The flags of models and data that DETR did not have. A caller whose `args` lacks one gets its default.
NEW_FLAGS = {
    "backbone_weights": "imagenet",
    "backbone_norm": "frozen",
    "checkpoint_activations": False,
    "class_balance": "none",
    "denoising_groups": 0,
    "denoising_box_noise": 0.4,
    "denoising_label_noise": 0.2,
    "encoder_loss_coef": 0.0,
    "query_init": "random",
    "num_classes": None,
    "thing_classes": None,
    "min_size": 800,
    "max_size": 1333,
    "augment": "full",
    "image_dtype": "float32",
    "train_images": None,
    "train_annotations": None,
    "val_images": None,
    "val_annotations": None,
    "allow": (),
    "shapes_train": 4000,
    "shapes_val": 250,
    "shapes_size": 192,
    "shapes_classes": 4,
    "shapes_seed": 0,
}

# The least value of each flag of main.py that is a number and has one.
# fmt: off
LEAST_VALUES = dict.fromkeys((
    "lr", "lr_backbone", "weight_decay", "clip_max_norm", "enc_layers", "dropout", "ema_decay", "denoising_groups",
    "warmup_steps", "decoder_delay", "start_epoch", "patience", "save_every_steps", "num_workers", "seed",
    "shapes_seed", "eos_coef", "set_cost_class", "set_cost_bbox", "set_cost_giou", "denoising_box_noise",
    "denoising_label_noise", "encoder_loss_coef", "mask_loss_coef", "dice_loss_coef", "bbox_loss_coef",
    "giou_loss_coef",
), 0) | dict.fromkeys((
    "batch_size", "epochs", "lr_drop", "accum_steps", "dec_layers", "dim_feedforward", "hidden_dim", "nheads",
    "num_queries", "num_classes", "min_size", "max_size", "shapes_train", "shapes_val", "shapes_size",
    "shapes_classes", "eval_every", "print_freq", "world_size",
), 1) | {"eval_max_dets": 10}
# fmt: on


def with_defaults(args: Any, defaults: Mapping[str, Any]) -> argparse.Namespace:
    """Return the flags of `args` in a new Namespace, with `defaults` for those that it lacks.

    `args` is any object with flags as attributes (class attributes count), or a dict of them. It is not changed.
    """
    if isinstance(args, Mapping):
        return argparse.Namespace(**{**defaults, **args})
    own = {name: getattr(args, name) for name in dir(args) if not name.startswith("_")}
    return argparse.Namespace(**{**defaults, **own})


def with_values(args: argparse.Namespace, **values) -> argparse.Namespace:
    """Return a copy of the flags, with other values for some."""
    return argparse.Namespace(**{**vars(args), **values})


def check_numbers(flags: Mapping[str, Any], at_least: Mapping[str, float]) -> None:
    """Raise ValueError, naming flag and value, for NaN and infinities, and for values below those of `at_least`."""
    for name, value in flags.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: give a finite number")
        if value is not None and name in at_least and value < at_least[name]:
            raise ValueError(f"--{name} {value}: give {at_least[name]} or more")


def changed_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the flags of a parser that have other values in `args` than their defaults."""
    defaults = vars(parser.parse_args([]))
    return {name: value for name, value in vars(args).items() if name in defaults and value != defaults[name]}
