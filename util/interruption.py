"""Being asked to stop: a run finishes its step, saves, and leaves."""

import atexit
import multiprocessing
import os
import signal
import threading
from functools import partial
from types import FrameType

import torch
import torch.distributed as dist

from util.dist import get_world_size, is_main_process

# Ctrl-C; what schedulers, torchrun and `kill` send; and the two that Slurm jobs ask to be warned with.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class Interruption:
    """While entered, the first signal of SIGNALS is only noted; a second Ctrl-C interrupts at once, as ever."""

    def __init__(self):
        self.received = 0
        self.previous: dict[int, object] = {}
        self.process = os.getpid()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.process:  # a child of this process, before it has its own handlers
            return
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if is_main_process():
            text = f"{signal.Signals(number).name}: finishing this step, then saving and leaving\n"
            os.write(2, text.encode())  # a handler must not print: it may have come in the middle of a print

    def requested(self) -> int:
        """Return the signal that any process of the run has received, or 0. Every process must call it."""
        if get_world_size() == 1:
            return self.received
        received = torch.tensor(self.received)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)

    def leave(self, number: int) -> None:
        """Do what the signal did before: a handler of someone else's is called (submitit's requeues the job).

        Otherwise, and if that handler returns, raise SystemExit with the status that such a death has in a shell.
        """
        handler = self.previous.get(number)
        self.__exit__()
        if callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)
        raise SystemExit(128 + number)


_over = multiprocessing.Value("b", 0, lock=False)  # whether the main process is at its end; its children see it
atexit.register(setattr, _over, "value", 1)


def _leave_signals_to_the_main_process(over, _: int) -> None:
    def obey(*_) -> None:
        if over.value:  # the main process is clearing up
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, obey)


# For a data loader's workers: schedulers send signals to all processes, and what they mean is the main one's to say.
worker_init = partial(_leave_signals_to_the_main_process, _over)
