"""State of this process's random number generators, as checkpoints hold it."""

import random

import numpy as np
import torch


def random_state() -> dict:
    """Return the state of all generators, as tensors and plain Python."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def restore_random_state(state: dict) -> None:
    """Set the generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    version, words, rest = state["python"]
    random.setstate((version, tuple(words), rest))
