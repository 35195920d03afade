"""Flags: those that a caller's `args` may lack, and values that no flag takes."""

import argparse
import math
from collections.abc import Mapping
from typing import Any


def with_defaults(args: Any, defaults: Mapping[str, Any]) -> argparse.Namespace:
    """Return the flags of `args` in a new Namespace, with `defaults` for those that it lacks.

    `args` is any object with flags as attributes (class attributes count), or a dict of them. It is not changed.
    """
    if isinstance(args, Mapping):
        return argparse.Namespace(**{**defaults, **args})
    own = {name: getattr(args, name) for name in dir(args) if not name.startswith("_")}
    return argparse.Namespace(**{**defaults, **own})


def check_numbers(flags: Mapping[str, Any], at_least: Mapping[str, float]) -> None:
    """Raise ValueError, naming flag and value, for NaN and infinities, and for values below those of `at_least`."""
    for name, value in flags.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: give a finite number")
        if value is not None and name in at_least and value < at_least[name]:
            raise ValueError(f"--{name} {value}: give {at_least[name]} or more")
