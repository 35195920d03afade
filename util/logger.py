"""The project's logger, smoothed metrics, and the loop that prints them."""

import logging
import math
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from util.text import printable

logger = logging.getLogger("detr")


class _StdoutHandler(logging.StreamHandler):
    """Print to standard output, above a progress bar if there is one.

    An output that is closed (`| head`) or on a full disk must not end a training: what is printed after the first
    error, by anybody, is discarded. Control characters are printed as escapes: class and file names come from data.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(printable(self.format(record), keep="\n\t"), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError) as error:
            _discard_stdout()
            _write_stderr(f"standard output cannot be written ({error}): log lines are lost from here on\n")


def _discard_stdout() -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)


def _write_stderr(text: str) -> None:
    try:
        os.write(2, text.encode())
    except OSError:
        pass


def configure_logging() -> None:
    """Print the project's log lines on standard output. Programs call it at their start; a library never does."""
    if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
        logger.addHandler(_StdoutHandler())
        logger.setLevel(logging.INFO)


def set_verbose(verbose: bool) -> None:
    """Log everything, or only warnings and errors (what processes other than the main one do)."""
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def finite_or_null(value: Any) -> Any:
    """Replace numbers that JSON does not have (NaN, infinities) by None, at any depth of dicts and lists."""
    if isinstance(value, dict):
        return {name: finite_or_null(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class SmoothedValue:
    """A series of numbers: its last `window_size` values, and the sum and count of all."""

    def __init__(self, window_size: int = 20, fmt: str | None = None):
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"

    def update(self, value: float, n: int = 1) -> None:
        """Add a value that stands for n samples."""
        self.deque.append(value)
        self.total += value * n
        self.count += n

    def synchronize_between_processes(self) -> None:
        """Add up sum and count over the processes; the window stays this process's own."""
        if dist.is_available() and dist.is_initialized():
            sums: list = [None] * dist.get_world_size()
            dist.all_gather_object(sums, (self.total, self.count))
            self.total, self.count = sum(total for total, _ in sums), sum(count for _, count in sums)

    @property
    def median(self) -> float:
        """Median of the window."""
        return median(self.deque)

    @property
    def avg(self) -> float:
        """Mean of the window."""
        return sum(self.deque) / len(self.deque)

    @property
    def global_avg(self) -> float:
        """Mean of the whole series."""
        return self.total / self.count if self.count else float("nan")

    @property
    def max(self) -> float:
        """Largest of the window."""
        return max(self.deque)

    @property
    def value(self) -> float:
        """The latest value."""
        return self.deque[-1]

    def __str__(self) -> str:
        if not self.deque:
            return "-"
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )


def merge_sums(parts: Iterable[dict[str, list]]) -> dict[str, list]:
    """Add up what several loggers return from `sums()`."""
    total = MetricLogger()
    for part in parts:
        total.add_sums(part)
    return total.sums()


class MetricLogger:
    """Named series (also attributes of the logger), and a loop that prints them every few steps."""

    def __init__(self, delimiter: str = "\t"):
        self.meters: defaultdict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def __getattr__(self, attr: str) -> SmoothedValue:
        """Return the series of that name."""
        meters = self.__dict__.get("meters", {})
        if attr not in meters:
            raise AttributeError(f"{type(self).__name__} has neither an attribute nor a series {attr!r}")
        return meters[attr]

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Give a series its own window or format."""
        self.meters[name] = meter

    def update(self, **kwargs: float) -> None:
        """Append to each named series. A scalar tensor is accepted too, but copies it from its device."""
        for name, value in kwargs.items():
            self.meters[name].update(float(value))

    def synchronize_between_processes(self) -> None:
        """Add up sums and counts over the processes; a process may lack a series. Windows stay this process's own."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.sums())
        for name, (total, count) in merge_sums(parts).items():
            self.meters[name].total, self.meters[name].count = total, count

    def sums(self) -> dict[str, list]:
        """Return sum and count of each series, as `add_sums` takes them."""
        return {name: [meter.total, meter.count] for name, meter in self.meters.items()}

    def add_sums(self, sums: dict[str, list]) -> None:
        """Add the sums and counts of another logger."""
        for name, (total, count) in sums.items():
            self.meters[name].total += total
            self.meters[name].count += count

    def averages(self) -> dict[str, float]:
        """Return the mean of each series that has values."""
        return {name: meter.global_avg for name, meter in self.meters.items() if meter.count}

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def over_processes(self) -> "MetricLogger":
        """Return, on the main process, a logger of the values averaged over processes. Every process must call it."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        own = {name: (list(meter.deque), meter.total, meter.count) for name, meter in self.meters.items()}
        parts: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, parts)
        if parts is None:
            return self
        together = MetricLogger(self.delimiter)
        for name, meter in self.meters.items():
            windows, totals, counts = zip(*(part[name] for part in parts if name in part), strict=True)
            series = SmoothedValue(meter.deque.maxlen, meter.fmt)
            series.deque.extend(map(fmean, zip(*windows, strict=False)))
            series.total, series.count = sum(totals), sum(counts)
            together.add_meter(name, series)
        return together

    def log_every(
        self, iterable: Iterable, print_freq: int, header: str | None = None, start: int = 0, in_step: bool = False
    ) -> Iterator:
        """Yield from the iterable; print the series every print_freq steps and at the last one.

        A resumed epoch has `start` steps before the iterable's first. With `in_step`, all processes take the same
        number of steps, and their average is printed.
        """
        if logger.level == logging.NOTSET and not logger.isEnabledFor(logging.INFO):  # programs that configure nothing
            configure_logging()
        header = header or ""
        steps = start + len(iterable)
        step_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        begin = before = time.perf_counter()
        bar = tqdm(total=steps, initial=start, desc=header, leave=False, disable=not sys.stderr.isatty())
        for step, item in enumerate(iterable, start):
            data_time.update(time.perf_counter() - before)
            yield item
            step_time.update(time.perf_counter() - before)
            if step % print_freq == 0 or step == steps - 1:
                eta = timedelta(seconds=int(step_time.global_avg * (steps - 1 - step)))
                parts = [header, f"[{step:{len(str(steps))}d}/{steps}]", f"eta: {eta}"]
                if self.meters:
                    parts.append(str(self.over_processes() if in_step else self))
                parts += [f"time: {step_time}", f"data: {data_time}"]
                if torch.cuda.is_available():
                    parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
                logger.info(self.delimiter.join(parts))
            bar.update()
            before = time.perf_counter()
        bar.close()
        total = time.perf_counter() - begin
        per_step = total / max(len(iterable), 1)
        logger.info(f"{header} Total time: {timedelta(seconds=int(total))} ({per_step:.4f} s / it)")
