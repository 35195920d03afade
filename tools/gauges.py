"""What a machine gives and a call takes: time, memory, floating point operations."""

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


def timed(calls: list[Callable], rounds: int, device: str) -> list[dict]:
    """Call each in turn, `rounds` times after a warm-up; return median `s`, `spread` and `peak_gb` of each.

    The spread is from quartile to quartile, the memory what a call takes at most on top of what was held before it.
    """
    peaks = []
    for call in calls:
        call()
        held = start_counting(device)
        call()
        peaks.append(most_held(device) - held)
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            begin = clock(device)
            call()
            seconds.append(clock(device) - begin)
    return [summary(seconds) | {"peak_gb": peak} for seconds, peak in zip(times, peaks, strict=True)]


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, and spread from quartile to quartile."""
    ordered = sorted(seconds)
    spread = ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]
    return {"s": statistics.median(ordered), "spread": spread}


def clock(device: str) -> float:
    """Return the time in seconds, once the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def start_counting(device: str) -> float:
    """Forget the peak of memory so far, and return the gigabytes held now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    if sys.platform != "linux":
        return float("nan")
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # else memory freed before would hide what a call takes
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return most_held(device)


def most_held(device: str) -> float:
    """Peak in GB since `start_counting`: of PyTorch's memory on a GPU, of the process's (Linux) on the CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform != "linux":
        return float("nan")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e9


def count_flops(call: Callable) -> int:
    """Count the floating point operations of a call, by PyTorch's own counter (a multiply-add is two)."""
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:  # the counter's hooks want gradients
        call()
    return counter.get_total_flops()


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Measure the machine's peak in a precision: the best of some large matrix products, whatever else is set."""
    n = 8192 if device.startswith("cuda") else 4096
    a, times = torch.rand(n, n, device=device).to(dtype), []
    for _ in range(6):
        begin = clock(device)
        a @ a
        times.append(clock(device) - begin)
    return 2 * n**3 / min(times)


def machine(device: str) -> str:
    """Name the hardware; of a CPU also whether it has AMX, on which the speed of bf16 hangs."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    amx = ", AMX" * any("amx_bf16" in line.split() for line in lines)
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores{amx}"
