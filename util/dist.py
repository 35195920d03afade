"""Distributed processes: rank and world size, the process group, and the collective calls that a run needs."""

import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.logger import logger, set_verbose

TIMEOUT = timedelta(minutes=30)  # for one collective call: the main process may evaluate while the others wait


@dataclass(frozen=True)
class ProcessInfo:
    """Rank of this process, number of processes, and rank within its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def distributed(self) -> bool:
        """Whether the run has several processes."""
        return self.world_size > 1


def process_info_from_environment() -> ProcessInfo:
    """Read the launcher's variables: torchrun's, or Slurm's when it started more than one task.

    SLURM_PROCID alone (an interactive shell on a cluster) means a single process.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return ProcessInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return ProcessInfo(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0)))
    return ProcessInfo()


def _set_master_from_slurm() -> None:
    """Set MASTER_ADDR and MASTER_PORT for a plain `srun`; torchrun and submitit set them themselves."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", 0))
    os.environ["MASTER_ADDR"] = names.split()[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + (job * 7 + step) % 40000))


def init_distributed_mode(device: str = "cuda", dist_url: str = "env://") -> ProcessInfo:
    """Join the process group that the launcher describes, if any, and return this process's rank in it.

    Afterwards only the main process logs. Objects are gathered over gloo, on the CPU; gradients over NCCL on GPUs.
    """
    info = process_info_from_environment()
    if info.distributed:
        on_gpu = _device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(info.local_rank)
        if "MASTER_ADDR" not in os.environ and "SLURM_JOB_ID" in os.environ:
            _set_master_from_slurm()
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=dist_url,
            world_size=info.world_size,
            rank=info.rank,
            timeout=TIMEOUT,
        )
        set_verbose(info.rank == 0)
        logger.info(f"distributed: {info.world_size} processes, this is rank {info.rank} ({dist.get_backend()})")
    return info


@contextmanager
def process_group(device: str = "cuda", dist_url: str = "env://") -> Iterator[ProcessInfo]:
    """Join the process group, and leave it together with the other processes.

    A process that fails does not wait for the others: its connections close, which raises an error in their next
    collective call (gloo), and the launcher ends them (torchrun, or `srun --kill-on-bad-exit=1`).
    """
    info = init_distributed_mode(device, dist_url)
    stop = None
    try:
        yield info
    except SystemExit as request:  # all processes stop after the same step
        stop = request
    if info.distributed:
        dist.barrier()
        dist.destroy_process_group()
    if stop:
        raise stop


def is_dist_avail_and_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Count the processes of the run."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and logs."""
    return get_rank() == 0


def barrier() -> None:
    """Wait for every process."""
    if is_dist_avail_and_initialized():
        dist.barrier()


def all_gather(data: Any) -> list:
    """Collect a picklable object of every process, in rank order, on every process."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, data)
    return gathered


def from_main(ask: Callable[[], Any]) -> Any:
    """Call a function on the main process only, and return its result, a picklable object, on every process."""
    if get_world_size() == 1:
        return ask()
    result = [ask() if is_main_process() else None]
    dist.broadcast_object_list(result)
    return result[0]


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the main process's buffers, such as batch norm statistics, to every process."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_to_main(data: Any) -> list | None:
    """Collect a picklable object of every process, in rank order, on the main process; None on the others."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(data, gathered, dst=0)
    return gathered


def mean_over_processes(value: Any, device: torch.device) -> Any:
    """Average a number, or a tensor of numbers, over processes; it stays on the device where there are several."""
    if get_world_size() == 1:
        return value
    total = torch.as_tensor(value, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return total / get_world_size()


def reduce_dict(input_dict: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Sum (or average) scalar tensors over processes, in one call. Every process must hold the same names."""
    if get_world_size() == 1:
        return input_dict
    with torch.no_grad():
        names = sorted(input_dict)
        values = torch.stack([input_dict[name].detach() for name in names])
        dist.all_reduce(values)
        if average:
            values /= get_world_size()
        return dict(zip(names, values.unbind(), strict=True))


def save_on_master(*args: Any, **kwargs: Any) -> None:
    """`torch.save` on the main process, nothing on the others."""
    if is_main_process():
        torch.save(*args, **kwargs)


def distribute(model: nn.Module, processes: ProcessInfo, device: torch.device) -> nn.Module:
    """Wrap the model for several processes; a single process gets it back unchanged."""
    if not processes.distributed:
        return model
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        logger.info("batch norm is not synchronised: the main process's statistics are evaluated and saved")
    # The gradient of a 1x1 convolution is the same memory under channels-last strides: nothing is copied.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of the flag: this process's own GPU, or the CPU (with a log line) on a machine without one."""
    device = _device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.info(f"no GPU here: --device {name} becomes cpu")
        device = torch.device("cpu")
    if device.type == "cpu":
        _check_threads()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: this process needs GPU {device.index}, and the machine has {torch.cuda.device_count()}, "
            "numbered from 0; start one process for each GPU"
        )
    return device


def _check_threads() -> None:
    """Warn if the processes of this machine have more threads than it has cores, which makes all of them slower."""
    threads, processes = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if threads * processes > (os.cpu_count() or 1):
        logger.warning(
            f"{processes} processes with {threads} threads each on {os.cpu_count()} cores slow each other down: "
            f"set OMP_NUM_THREADS={max((os.cpu_count() or 1) // processes, 1)}"
        )


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; give cuda, cuda:1 or cpu, for example") from None
