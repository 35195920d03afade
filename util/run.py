"""The state of a training run: what its checkpoints hold, when they are written, and when the run stops."""

import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from util.checkpoint import BEST, not_finite, position, save_checkpoint
from util.dist import all_gather, from_main, get_rank, get_world_size, is_main_process
from util.epoch_row import build_row, epoch_score, table_line
from util.interruption import Interruption
from util.logger import logger
from util.meters import MetricLogger, merge_sums
from util.optim import restore_optimizer
from util.origin import differences
from util.output_dir import append_row, truncate_log
from util.random_state import random_state, restore_random_state
from util.safe_load import first_line
from util.tensorboard import TensorBoard


@dataclass
class Run:
    """Everything a checkpoint restores. The position in training is given by `epoch` and `seen` alone.

    Without an `output_dir`, nothing is written.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    flags: dict  # of the command line, stored in checkpoints
    class_names: dict[int, str]
    output_dir: Path | None = None
    accum_steps: int = 1  # batches of a step
    save_every_steps: int = 0  # 0: only after each epoch
    check_signals_every: int = 10  # steps; a single process checks after each
    lr_drop: int = 200
    steps_per_epoch: int = 0  # of a schedule that is stepped after every step; 0: it is stepped after every epoch
    images_per_step: int = 1  # of all processes together
    ema: AveragedModel | None = None  # a moving average of the weights, which is evaluated in their place
    training_only: nn.Module | None = None  # parameters beside the model
    with_targets: bool = False  # the network in training takes the targets too
    tensorboard: TensorBoard | None = None
    epoch: int = 0  # the current one, from 0
    seen: int = 0  # images of it that all processes together have trained on
    best: float = -1.0  # AP (or PQ) of the best epoch
    stale: int = 0  # evaluations since then
    sums: dict = field(default_factory=dict)  # of the epoch's metrics up to `seen`, on this process
    random: dict = field(default_factory=random_state)  # the generators at `seen`, on this process
    interruption: Interruption = field(default_factory=Interruption)

    def epochs(self) -> Iterator[int]:
        """Yield the epochs to train: to --epochs, or until --patience evaluations in a row gave no better score."""
        begin = time.perf_counter()
        while self.epoch < self.flags["epochs"]:
            if 0 < self.flags.get("patience", 0) <= self.stale:
                logger.info(f"--patience: {self.stale} evaluations were not better than {self.best:.3f}; training ends")
                break
            yield self.epoch
        logger.info(f"Training time {timedelta(seconds=int(time.perf_counter() - begin))}")

    @contextmanager
    def training(self, loader: DataLoader) -> Iterator[None]:
        """Prepare the loader for the rest of the epoch; save what was trained if a signal or an error ends it early.

        The last step of the epoch saves too: an error in the evaluation costs no training.
        """
        batches = loader.batch_sampler
        loader.dataset.set_epoch(self.epoch)
        batches.set_epoch(self.epoch, self.seen)
        self._images, self._images_per_batch = batches.length, batches.images_per_step
        self._batches_left, self._first, self._begin = len(batches), self.seen, time.perf_counter()
        with self.interruption.deferred():
            try:
                yield
                self._leave_if_asked(saved=True)
            except Exception:
                self._save_after_error()  # signals are still deferred: a launcher may be stopping this process
                raise

    @property
    def epochs_left(self) -> int:
        """Epochs after this one."""
        return self.flags["epochs"] - 1 - self.epoch

    @property
    def evaluated_model(self) -> nn.Module:
        """The model to evaluate, and the one that `model` in a checkpoint holds: the averaged one if there is one."""
        return self.ema.module if self.ema else self.model

    @property
    def batches_done(self) -> int:
        """Batches of the epoch that this process has trained on."""
        return math.ceil(self.seen / self._images_per_batch)  # rounded up only after a change of the batch size

    def after_step(self, batches: int, metrics: MetricLogger) -> None:
        """Advance the position by a step of so many batches; save if that is due, and exit if a signal was received."""
        self._batches_left -= batches
        at_end = self._batches_left == 0
        self.seen = self._images if at_end else self.seen + batches * self._images_per_batch
        self.sums, self.random = metrics.sums(), random_state()
        if self.ema:
            self.ema.update_parameters(self.model)
        if self.steps_per_epoch:
            self._step_schedule()
        steps = self.batches_done // self.accum_steps
        due = at_end or (self.save_every_steps > 0 and steps % self.save_every_steps == 0)
        if due:
            self.save("checkpoint.pth")
        if due or get_world_size() == 1 or steps % self.check_signals_every == 0:
            self._leave_if_asked(saved=due)

    def finish_epoch(self, train_stats: dict, test_stats: dict) -> None:
        """Advance to the next epoch; write the log row, the curves, and then the checkpoints."""
        epoch = self.epoch
        if not self.steps_per_epoch:
            self._step_schedule()
        self.epoch, self.seen, self.sums, self.random = epoch + 1, 0, {}, random_state()
        row = build_row(epoch, train_stats, test_stats, self.trainable_parameters())
        names = []
        if self.epoch % self.lr_drop == 0 or self.epoch % 100 == 0:
            names.append(f"checkpoint{epoch:04}.pth")
        score = from_main(lambda: epoch_score(row))
        if score > self.best:
            self.best, self.stale = score, 0
            names.append(BEST)
        elif test_stats:
            self.stale += 1
        if self.output_dir and is_main_process():
            append_row(self.output_dir / "log.txt", row)
            self._draw(row)
        self.save(*names, "checkpoint.pth")  # last: with it, the epoch counts as done
        logger.info(table_line(row, time.perf_counter() - self._begin, self.best))

    def trainable_parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def save(self, *names: str) -> None:
        """Write a checkpoint under each name. Every process calls it, the main one writes."""
        if self.output_dir:
            processes = all_gather({"rng": self.random, "sums": self.sums})
            if is_main_process():
                self._write(processes, names)

    def restore(self, state: dict | None, name: str) -> None:
        """Continue from a checkpoint; one without an optimizer gives only the model. None: start from the beginning.

        Rates, weight decay and schedule are what the flags say: a changed flag takes effect, and is logged. Raises
        ValueError if the checkpoint cannot be continued with these flags.
        """
        if state is None:
            return
        if "optimizer" not in state:
            logger.info(f"{name} holds a model and no optimizer: training starts at epoch {self.epoch}")
            return
        if not isinstance(state.get("epoch"), Integral):
            raise ValueError(f"{name} holds an optimizer but no epoch: use --finetune to start from its weights")
        self.epoch, self.seen = position(state)
        if self.epoch > self.flags["epochs"]:
            raise ValueError(f"--epochs {self.flags['epochs']}, but {name} has trained {self.epoch} epochs: give more")
        try:
            self._restore_state(state, name)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{name}: training cannot be continued from it ({type(error).__name__}: {first_line(error)}): another "
                "program wrote it, or it is incomplete. To start from its weights, use --finetune"
            ) from error
        if self.output_dir and is_main_process():
            truncate_log(self.output_dir / "log.txt", self.epoch)

    def _restore_state(self, state: dict, name: str) -> None:
        """Load all that a checkpoint holds besides the model."""
        restore_optimizer(self.optimizer, state["optimizer"], name)
        steps = self.epoch * self.steps_per_epoch + math.ceil(self.seen / self.images_per_step)
        for _ in range(steps if self.steps_per_epoch else self.epoch):
            self._step_schedule()
        if self.ema and "ema" in state:  # the checkpoint's `model`, loaded into both, is the average
            self.ema.n_averaged.fill_(state["ema"]["updates"])
            self.model.load_state_dict(state["ema"]["trained_model"])
        if self.training_only and "training_only" in state:
            self.training_only.load_state_dict(state["training_only"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.best, self.stale = state.get("best", -1.0), state.get("stale", 0)
        if not isinstance(self.best, Real):
            raise TypeError(f"'best' is {self.best!r}")
        changed = differences(self.flags, state, self.flags.keys() - {"resume", "output_dir", "overwrite"})
        if changed:
            logger.info(f"flags changed since the checkpoint take effect: {', '.join(changed.values())}")
        self._restore_processes(state.get("processes", []), name)
        logger.info(f"continuing at epoch {self.epoch}, step {math.ceil(self.seen / self.images_per_step)}")

    def _restore_processes(self, processes: list[dict], name: str) -> None:
        if len(processes) == get_world_size():
            self.sums, self.random = processes[get_rank()]["sums"], processes[get_rank()]["rng"]
            restore_random_state(self.random)
        elif processes:
            logger.warning(
                f"{name} was written by {len(processes)} processes, now there are {get_world_size()}: training "
                "continues at the same image, but with other random numbers"
            )
            self.sums = merge_sums([process["sums"] for process in processes]) if is_main_process() else {}

    def _step_schedule(self) -> None:
        with warnings.catch_warnings():  # PyTorch does not know of steps made before a resume
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.lr_scheduler.step()

    def _draw(self, row: dict) -> None:
        try:
            from util.plot_utils import draw_curves  # here: matplotlib's import takes half a second

            draw_curves(self.output_dir)
            if self.tensorboard:
                self.tensorboard.write(row)
        except Exception as error:  # a picture must not end a training
            logger.warning(f"{self.output_dir}: curves.png or TensorBoard's log could not be written: {error}")

    def _leave_if_asked(self, saved: bool = False) -> None:
        signal = self.interruption.requested()
        if not signal:
            return
        if not saved and self.seen > self._first:
            self.save("checkpoint.pth")
        where = f"after {self.seen} of {self._images} images of epoch {self.epoch}"
        file = f"saved {self.output_dir}/checkpoint.pth; continue with --resume auto"
        what = file if self.output_dir else "no --output_dir, nothing saved"
        logger.info(f"stopped by a signal {where}: {what}")
        self.interruption.leave(signal)

    def _save_after_error(self) -> None:
        """Save the position after the last step. The other processes may be gone: only this one's part is written."""
        if not self.output_dir or not is_main_process() or self.seen == self._first:
            return
        try:
            self._write([{"rng": self.random, "sums": self.sums}], ["checkpoint.pth"])
            logger.warning(
                f"an error ends the run; {self.output_dir}/checkpoint.pth holds the {self.seen} images of epoch "
                f"{self.epoch} before it: continue with --resume auto"
            )
        except Exception as error:  # must not hide the first one
            logger.warning(f"nothing could be saved after an error: {error}")

    def _write(self, processes: list[dict], names: Sequence[str]) -> None:
        weights = self.evaluated_model.state_dict()
        if broken := not_finite(weights):
            raise FloatingPointError(
                f"epoch {self.epoch}: {len(broken)} weights are not finite, {broken[0]} among them; no checkpoint is "
                f"written. Resume from the last one, with a lower --lr or a smaller --clip_max_norm"
            )
        state = {
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,  # the last complete one
            "seen": self.seen,
            "args": self.flags,
            "class_names": self.class_names,
            "best": self.best,
            "stale": self.stale,
            "processes": processes,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }
        if self.ema:
            state["ema"] = {"updates": int(self.ema.n_averaged), "trained_model": self.model.state_dict()}
        if self.training_only:
            state["training_only"] = self.training_only.state_dict()
        save_checkpoint(state, *(self.output_dir / name for name in names))
