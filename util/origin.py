"""Differences between the run that wrote a checkpoint and the one that uses it."""

import argparse
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from util.checkpoint import count_classes
from util.logger import logger

FLAGS_WITHOUT_WEIGHTS = ("dilation", "nheads", "pre_norm")  # they change the network, but no weight's shape
# Flags that describe a network and its input: where the command line does not give them, a checkpoint's hold.
DESCRIBING = (
    "backbone", "dilation", "backbone_norm", "position_embedding", "hidden_dim", "nheads", "enc_layers", "dec_layers",
    "dim_feedforward", "pre_norm", "num_queries", "masks", "min_size", "max_size",
)  # fmt: skip
SHOWN = 5  # class names listed in a message


def check_origin(flags: dict[str, Any], state: dict, name: str, class_names: dict[int, str], starts: bool) -> None:
    """Log how the run that wrote a checkpoint differs from the one with these flags and classes.

    `starts`: the weights only initialise a new training (--finetune). Otherwise the classes keep their meaning, and
    ValueError is raised if names of the data are the checkpoint's names of other ids.
    """
    if other := differences(flags, state, FLAGS_WITHOUT_WEIGHTS):
        logger.warning(f"{name} was trained with flags of another network: {', '.join(other.values())}")
    if not starts:
        check_class_names(state, name, class_names)
    elif count_classes(state["model"]) == flags["num_classes"]:  # else the class head is re-initialised
        check_class_names(state, name, class_names, strict=False)


def check_class_names(state: dict, name: str, class_names: dict[int, str], strict: bool = True) -> None:
    """Warn of ids that have one name in the checkpoint and another in the data; case does not count.

    With `strict`, raise ValueError where such a name in the data is the checkpoint's name of another id.
    """
    saved = state.get("class_names")
    if not isinstance(saved, dict) or not saved:
        return
    theirs = {number: str(text).casefold() for number, text in saved.items()}
    ours = {number: str(text).casefold() for number, text in class_names.items()}
    other = [number for number in ours if number in theirs and ours[number] != theirs[number]]
    if other:
        listed = [f"{number} is {saved[number]!r} there and {class_names[number]!r} here" for number in other]
        text = f"{name}: its class names are not the data's: {_some(listed)}"
        if strict and any(ours[number] in theirs.values() for number in other):
            raise ValueError(
                f"{text}. With other class ids its predictions are wrong: give the annotations the category ids "
                "of the checkpoint, or train anew from its weights with --finetune"
            )
        logger.warning(text)
    if strict and (unknown := [f"{number} {class_names[number]!r}" for number in ours if number not in theirs]):
        logger.warning(f"{name}: it was trained without these classes of the data: {_some(unknown)}")


def saved_flags(state: dict) -> dict[str, Any]:
    """Return the flags of the run that a checkpoint is from; none if it does not say."""
    saved = state.get("args")
    saved = vars(saved) if isinstance(saved, (argparse.Namespace, SimpleNamespace)) else saved
    return saved if isinstance(saved, dict) else {}


def describe(flags: argparse.Namespace, state: dict, name: str) -> argparse.Namespace:
    """Return `flags` with the network and the image sizes that a checkpoint describes.

    The flags in `flags.given_flags` keep their values: those of the command line.
    """
    saved = saved_flags(state)
    taken = {flag: saved[flag] for flag in DESCRIBING if flag in saved and flag not in flags.given_flags}
    other = [f"--{flag} {value}" for flag, value in taken.items() if value != getattr(flags, flag)]
    if other:
        logger.info(f"from {name}: {', '.join(other)}")
    return argparse.Namespace(**{**vars(flags), **taken})


def differences(flags: dict, state: dict, names: Collection[str]) -> dict[str, str]:
    """Return, for each of the flags `names` that differs from a checkpoint's, a text with both values."""
    saved = saved_flags(state)
    return {
        name: f"--{name} {saved[name]} -> {value}"
        for name, value in flags.items()
        if name in names and name in saved and saved[name] != value
    }


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")
