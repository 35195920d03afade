"""Numbers over time: smoothed values, the line that tells them, and the one logger that prints."""

import logging
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from statistics import fmean, median

import torch
import torch.distributed as dist
from tqdm import tqdm

logger = logging.getLogger("detr")


class _AboveProgressBar(logging.StreamHandler):
    """Prints to standard output without tearing a progress bar that is on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


if not logger.handlers:
    logger.addHandler(_AboveProgressBar())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def set_verbose(verbose: bool) -> None:
    """Print everything, or only warnings and errors (what processes other than the main one do)."""
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


class SmoothedValue:
    """A series of numbers: its last `window_size` values for the eye, its sum and count for the record."""

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})"):
        self.window: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt

    def update(self, value: float, n: int = 1) -> None:
        """Add a value that stands for n samples."""
        self.window.append(value)
        self.total += value * n
        self.count += n

    @property
    def median(self) -> float:
        """Median of the window."""
        return median(self.window)

    @property
    def avg(self) -> float:
        """Mean of the window."""
        return sum(self.window) / len(self.window)

    @property
    def global_avg(self) -> float:
        """Mean of the whole series."""
        return self.total / self.count if self.count else float("nan")

    @property
    def max(self) -> float:
        """Largest of the window."""
        return max(self.window)

    @property
    def value(self) -> float:
        """The latest value."""
        return self.window[-1]

    def __str__(self) -> str:
        if not self.window:
            return "-"
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )


def merge_sums(parts: Iterable[dict[str, list]]) -> dict[str, list]:
    """Add up what several loggers have in `sums()`."""
    logger = MetricLogger()
    for part in parts:
        logger.add_sums(part)
    return logger.sums()


class MetricLogger:
    """Named series, and a loop that prints them every few steps."""

    def __init__(self, delimiter: str = "  "):
        self.meters: defaultdict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Give a series its own window or format."""
        self.meters[name] = meter

    def update(self, **values: float) -> None:
        """Append to each named series; scalar tensors are taken too, at the price of a transfer each."""
        for name, value in values.items():
            self.meters[name].update(float(value))

    def synchronize_between_processes(self) -> None:
        """Make the averages those of all processes (the windows stay this one's); a process may have seen nothing."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, self.sums())
        for name in dict.fromkeys(name for theirs in everyones for name in theirs):
            meter = self.meters[name]
            meter.total = sum(theirs[name][0] for theirs in everyones if name in theirs)
            meter.count = sum(theirs[name][1] for theirs in everyones if name in theirs)

    def sums(self) -> dict[str, list]:
        """Sum and count of each whole series: what `add_sums` goes on from."""
        return {name: [meter.total, meter.count] for name, meter in self.meters.items()}

    def add_sums(self, sums: dict[str, list]) -> None:
        """Count in what another logger, of the same series, had summed up."""
        for name, (total, count) in sums.items():
            self.meters[name].total += total
            self.meters[name].count += count

    def averages(self) -> dict[str, float]:
        """Mean of each whole series."""
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def over_processes(self) -> "MetricLogger":
        """Average the series over the processes, step by step, in one call that all must make (for the main one)."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        mine = {name: (list(meter.window), meter.total, meter.count) for name, meter in self.meters.items()}
        everyones = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyones)
        if everyones is None:
            return self
        together = MetricLogger(self.delimiter)
        for name, meter in self.meters.items():
            windows, totals, counts = zip(*(theirs[name] for theirs in everyones), strict=True)
            series = SmoothedValue(meter.window.maxlen, meter.fmt)
            series.window.extend(map(fmean, zip(*windows, strict=True)))
            series.total, series.count = sum(totals), sum(counts)
            together.add_meter(name, series)
        return together

    def log_every(
        self, iterable: Iterable, print_freq: int, header: str | None = "", start: int = 0, in_step: bool = False
    ) -> Iterator:
        """Yield from the iterable; print the series every print_freq steps and at the last one.

        `start` steps of the same epoch lie behind already (a resumed run): the iterable holds only the rest. With
        `in_step`, all processes take the same number of steps, and what is printed is their average.
        """
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
                parts = [header or "", f"[{step:{len(str(steps))}d}/{steps}]", f"eta: {eta}"]
                numbers = self.over_processes() if in_step else self
                parts += [str(numbers)] * bool(self.meters) + [f"time: {step_time}", f"data: {data_time}"]
                if torch.cuda.is_available():
                    parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
                logger.info(self.delimiter.join(parts))
            bar.update()
            before = time.perf_counter()
        bar.close()
        total = time.perf_counter() - begin
        each = total / max(len(iterable), 1)
        logger.info(f"{header} Total time: {timedelta(seconds=int(total))} ({each:.4f} s / it)")
