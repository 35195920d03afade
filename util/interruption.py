"""Signals that ask a run to stop: it finishes its step, saves, and exits."""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FrameType

import torch
import torch.distributed as dist

from util.dist import get_world_size, is_main_process

# Ctrl-C; what schedulers, torchrun and `kill` send; a closed terminal; and the two that Slurm jobs are warned with.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Interruption:
    """While entered, a signal of SIGNALS ends the process by SystemExit; a second Ctrl-C interrupts at once.

    During `deferred`, the first signal is only recorded, so that a step can end and be saved. Signals that the process
    ignores (SIGHUP under nohup) stay ignored.
    """

    def __init__(self):
        self.received = 0
        self.is_deferred = False
        self.previous: dict[int, object] = {}
        self.process = os.getpid()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows it in no other thread
            handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Record signals until the end of this context, and end the process then if `requested` was not asked."""
        with nullcontext() if self.previous else self:
            self.is_deferred = True
            try:
                yield
            finally:
                self.is_deferred = False
            if self.received:  # here, or earlier where Python ignored the SystemExit, as it does in __del__
                self.leave(self.received)

    def _record(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.process:  # a child of this process, before it has its own handlers
            return
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if is_main_process():
            plan = "finishing this step, then saving and exiting" if self.is_deferred else "exiting"
            text = f"{signal.Signals(number).name}: {plan}\n"
            try:
                os.write(2, text.encode())  # not print: the signal may have arrived in the middle of one
            except OSError:  # the terminal is gone
                pass
        if not self.is_deferred:
            self.leave(number)

    def requested(self) -> int:
        """Return the signal that any process of the run has received, or 0. Every process must call it."""
        if get_world_size() == 1:
            return self.received
        received = torch.tensor(self.received)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)

    def leave(self, number: int) -> None:
        """Call the previously installed handler of the signal, if any (submitit's requeues the job).

        Otherwise, and if that handler returns, raise SystemExit with the status that a shell gives for the signal.
        """
        handler = self.previous.get(number)
        self.__exit__()
        if callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)
        raise SystemExit(128 + number)


_exiting = multiprocessing.Value("b", 0, lock=False)  # shared with child processes: 1 once the main process exits
atexit.register(setattr, _exiting, "value", 1)


def _ignore_signals_until_exit(exiting, _: int) -> None:
    def handler(*_) -> None:
        if exiting.value:
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, handler)


# `worker_init_fn` of data loaders: schedulers signal all processes, and the main process decides what to do.
worker_init = partial(_ignore_signals_until_exit, _exiting)
