"""Smoothed metrics, and the loop that prints them."""

import logging
import shutil
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from statistics import fmean, median

import torch
import torch.distributed as dist
from tqdm import tqdm

from util.logger import configure_logging, logger

SLOW_LOADER = 0.3  # share of a step's time from which on waiting for data is worth a line


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
        if _world_size() > 1:
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
        if _world_size() == 1:
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
        if _world_size() == 1:
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

    def short_line(self, parts: list[str]) -> str:
        """Summarise a step for a terminal: `parts`, then the means of series, as many as fit into its width and 120.

        "error" is the mean class_error.
        """
        means = {name: meter.global_avg for name, meter in self.meters.items() if meter.count}
        parts = list(parts)
        if "loss" in means:
            parts.insert(2, f"loss {means['loss']:.2f}")
        for name in ("loss_ce", "loss_bbox", "loss_giou"):
            if name in means:
                parts.append(f"{name.removeprefix('loss_')} {means[name]:.2f}")
        if "class_error" in means:
            parts.append(f"error {means['class_error']:.1f}")
        if "lr" in means:
            parts.append(f"lr {self.meters['lr'].value:.1e}")
        width, line = min(120, shutil.get_terminal_size().columns - 1), ""
        for part in parts:
            longer = f"{line}  {part}" if line else part
            if len(longer) <= width:
                line = longer
        return line

    def log_every(
        self,
        iterable: Iterable,
        print_freq: int,
        header: str | None = None,
        start: int = 0,
        epochs_left: int | None = None,
    ) -> Iterator:
        """Yield from the iterable; print the series every print_freq steps and at the last one.

        A resumed epoch has `start` steps before the iterable's first. `epochs_left` is given in training, where items
        are (samples, targets) and all processes take the same number of steps: their average is printed, and on a
        terminal a short line with the images per second and the time to the end of the run.
        """
        if logger.level == logging.NOTSET and not logger.isEnabledFor(logging.INFO):  # no logging is configured
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
                seconds = step_time.global_avg * (steps - 1 - step)
                shown = self if epochs_left is None else self.over_processes()
                parts = [header, f"[{step:{len(str(steps))}d}/{steps}]", f"eta: {_duration(seconds)}"]
                if shown.meters:
                    parts.append(str(shown))
                parts += [f"time: {step_time}", f"data: {data_time}"]
                if torch.cuda.is_available():
                    parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
                short = [header, f"{step}/{steps}", f"eta {_duration(seconds)}"]
                if epochs_left is not None:
                    short[-1] += f"/{_duration(seconds + epochs_left * steps * step_time.global_avg)}"
                    short.append(f"{_world_size() * len(item[1]) / step_time.avg:.1f} img/s")
                logger.info(self.delimiter.join(parts), extra={"short": shown.short_line(short)})
            bar.update()
            before = time.perf_counter()
        bar.close()
        total = time.perf_counter() - begin
        share = data_time.global_avg / max(step_time.global_avg, 1e-9)
        if epochs_left is not None and len(iterable) >= 20 and share > SLOW_LOADER:
            logger.info(f"{share:.0%} of the time was spent waiting for data: more --num_workers may help")
        logger.info(f"{header} Total time: {_duration(total)} ({total / max(len(iterable), 1):.4f} s / it)")


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=int(seconds))
