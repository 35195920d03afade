"""What a run takes with it from one process to the next."""

import argparse
import platform
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from util.checkpoint import save_checkpoint
from util.dist import all_gather, get_rank, get_world_size, is_main_process
from util.logger import logger, merge_sums


@dataclass
class Run:
    """Everything a checkpoint restores."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    flags: argparse.Namespace
    class_names: dict[int, str]
    epoch: int  # the one under way
    seen: int = 0  # images of it that all processes together have trained on
    sums: dict = field(default_factory=dict)  # and what their numbers summed up to, on this process
    best: float = -1.0  # AP (or PQ) of the best epoch so far

    def state(self) -> dict:
        """Tensors and plain Python, for every process to call (there is something of each in it)."""
        everyones = all_gather({"rng": _rng_state(), "sums": self.sums})
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,  # the last one that is complete
            "seen": self.seen,
            "args": vars(self.flags),
            "class_names": self.class_names,
            "best": self.best,
            "processes": everyones,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    def restore(self, state: dict, name: str) -> None:
        """Go on from a checkpoint; one that holds only a model gives only that.

        Flags that differ from the checkpoint's hold from here on, and are told. Raises ValueError where they cannot.
        """
        if "optimizer" not in state:
            logger.info(f"{name} holds a model and no optimizer: training begins at epoch {self.epoch}")
            return
        if state["epoch"] >= self.flags.epochs:
            raise ValueError(
                f"--epochs {self.flags.epochs}, but {name} has {state['epoch'] + 1} epochs behind it: ask for more"
            )
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            _check_moments(self.optimizer)
        except ValueError as error:
            raise ValueError(
                f"{name}: its optimizer trained other parameters ({error}). --lr_backbone 0, --backbone_norm and "
                "--frozen_weights must be as they were; to begin anew from these weights, use --finetune"
            ) from None
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.scaler.load_state_dict(state.get("scaler", {})) if state.get("scaler") else None
        self.epoch = state["epoch"] + 1
        self.seen = state.get("seen", 0)
        self.best = state.get("best", -1.0)
        self._adopt_flags(state)
        processes = state.get("processes", [])
        if len(processes) == get_world_size():
            self.sums = processes[get_rank()]["sums"]
            _restore_rng(processes[get_rank()]["rng"])
        elif processes:
            logger.warning(
                f"{name} was written by {len(processes)} processes, now there are {get_world_size()}: the run goes on "
                "at the same image, but with other random numbers"
            )
            self.sums = merge_sums([theirs["sums"] for theirs in processes]) if is_main_process() else {}

    def _adopt_flags(self, state: dict) -> None:
        changed = changed_flags(self.flags, state, vars(self.flags).keys() - {"resume", "output_dir"})
        if changed:
            logger.info(f"flags unlike the checkpoint's hold from here on: {', '.join(changed.values())}")
        if changed.keys() & {"lr", "lr_backbone", "lr_drop", "weight_decay"}:
            schedule = self.lr_scheduler
            schedule.step_size, schedule.base_lrs = self.flags.lr_drop, [self.flags.lr, self.flags.lr_backbone]
            for group, rate in zip(self.optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = rate * schedule.gamma ** (schedule.last_epoch // schedule.step_size)
                group["weight_decay"] = self.flags.weight_decay
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def save(self, folder: Path, *names: str) -> None:
        """Write a checkpoint under each name. Every process calls it, the main one writes."""
        state = self.state()
        if is_main_process():
            save_checkpoint(state, *(folder / name for name in names))


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where an average of gradients has another shape than its parameter."""
    for parameter, state in optimizer.state.items():
        if "exp_avg" in state and state["exp_avg"].shape != parameter.shape:
            raise ValueError(f"an average of shape {list(state['exp_avg'].shape)} for one of {list(parameter.shape)}")


def changed_flags(flags: argparse.Namespace, state: dict, names: Collection[str]) -> dict[str, str]:
    """Say for each of the flags `names` whose value is not a checkpoint's: what it was, and is."""
    saved = state.get("args", {})
    saved = saved if isinstance(saved, dict) else vars(saved)
    return {
        name: f"--{name} {saved[name]} -> {value}"
        for name, value in vars(flags).items()
        if name in names and name in saved and saved[name] != value
    }


def _rng_state() -> dict:
    """State of this process's generators, as tensors and plain Python."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def _restore_rng(state: dict) -> None:
    """Put this process's generators where `_rng_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    version, words, rest = state["python"]
    random.setstate((version, tuple(words), rest))
