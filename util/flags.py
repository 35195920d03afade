"""Flags that a caller's `args` may lack."""

import argparse
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
