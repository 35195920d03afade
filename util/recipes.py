"""Recipes: named sets of flag values (`--recipe NAME`). A flag on the command line overrides its recipe's value."""

import argparse
from collections.abc import Sequence
from typing import Any

# A small DETR trained from scratch on generated images, on a CPU: batch norm that trains, pre-norm layers, few queries,
# images of one size.
DEMO = {
    "dataset_file": "shapes",
    "coco_path": "data/shapes",
    "shapes_train": 6600,
    "shapes_classes": 3,
    "shapes_size": 128,
    "min_size": 80,
    "max_size": 80,
    "augment": "flip",
    "device": "cpu",
    "amp": "auto",
    "num_workers": 0,
    "print_freq": 25,
    "backbone": "resnet18",
    "backbone_weights": "none",
    "backbone_norm": "batch",
    "pre_norm": True,
    "hidden_dim": 128,
    "dim_feedforward": 256,
    "enc_layers": 2,
    "dec_layers": 3,
    "num_queries": 6,
    "dropout": 0.0,
    "batch_size": 32,
    "lr": 1.4e-3,
    "lr_backbone": 1.4e-3,
    "lr_schedule": "linear",
    "warmup_steps": 100,
    "eos_coef": 0.7,
    "encoder_loss_coef": 1.0,
    "query_init": "local",
    "ema_decay": 0.997,
    "epochs": 6,
}

# What shortens training without a change of the network (docs/convergence.md).
FAST = {
    "encoder_loss_coef": 1.0,
    "query_init": "local",
    "ema_decay": 0.999,
    "lr_schedule": "linear",
    "warmup_steps": 500,
    "dropout": 0.0,
}

# A few hundred photographs and a backbone with ImageNet weights, on a CPU or one GPU (docs/own-data.md).
SMALL = FAST | {
    "backbone": "resnet18",
    "min_size": 320,
    "max_size": 416,
    "augment": "crop",
    "pre_norm": True,
    "hidden_dim": 128,
    "dim_feedforward": 512,
    "enc_layers": 2,
    "dec_layers": 3,
    "num_queries": 50,
    "amp": "auto",
    "batch_size": 8,
    "lr": 1.4e-3,
    "lr_backbone": 2e-4,
    "warmup_steps": 100,
    "decoder_delay": 0.15,
    "eos_coef": 0.4,
    "dropout": 0.1,
    "class_balance": "weights",
    "ema_decay": 0.998,
    "epochs": 60,
    "eval_every": 10,
}

RECIPES: dict[str, dict[str, Any]] = {"demo": DEMO, "fast": FAST, "small": SMALL}


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; flags that it does not give have the values of its --recipe, or else their defaults.

    `given_flags` of the result lists the names of those that it does give.
    """
    unset: list = []  # in place of every default, to see which flags are given
    marked = parser.parse_args(argv, argparse.Namespace(**{action.dest: unset for action in parser._actions}))
    if marked.recipe is not unset:
        parser.set_defaults(**RECIPES[marked.recipe])
    args = parser.parse_args(argv)
    args.given_flags = [name for name, value in vars(marked).items() if value is not unset]
    return args
