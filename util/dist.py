"""Processes: who this one is among them, and the collective calls a run needs."""

import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from util.logger import logger, set_verbose

POLL = 1.0  # seconds between two looks at how the other processes fare
_store: dist.Store | None = None  # where the processes of the run met


@dataclass(frozen=True)
class ProcessInfo:
    """This process's place in the run: `local_rank` counts within its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def distributed(self) -> bool:
        """Whether there is anybody to talk to."""
        return self.world_size > 1


def process_info_from_environment() -> ProcessInfo:
    """Read the launcher's variables: torchrun's, or Slurm's when it started more than one task.

    A lone SLURM_PROCID (an interactive shell on a cluster) is a single process like any other.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return ProcessInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return ProcessInfo(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0)))
    return ProcessInfo()


def _meet_on_the_first_node() -> None:
    """Say where the tasks of a plain `srun` meet; torchrun and submitit say it themselves."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", 0))
    os.environ["MASTER_ADDR"] = names.split()[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + (job * 7 + step) % 40000))


def _gloo() -> str:
    """Name the CPU's backend: gloo, or where TORCH_DISTRIBUTED_DEBUG is DETAIL the same under another name.

    DETAIL puts a wrapper around a backend, and PyTorch's DistributedDataParallel (seen in 2.11 to 2.15) takes whatever
    is called gloo for the bare one, and crashes.
    """
    if dist.get_debug_level() != dist.DebugLevel.DETAIL:
        return "gloo"
    if "watched_gloo" not in dist.Backend.backend_list:
        dist.Backend.register_backend("watched_gloo", dist.ProcessGroupGloo, devices=["cpu"])
    return "watched_gloo"


def init_distributed_mode(device: str = "cuda", dist_url: str = "env://") -> ProcessInfo:
    """Join the process group the launcher describes, if it describes one, and return this process's place.

    Only the main process logs afterwards. Objects are gathered over gloo, on the CPU; gradients over NCCL on GPUs.
    """
    info = process_info_from_environment()
    if info.distributed:
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(info.local_rank)
        if "MASTER_ADDR" not in os.environ and "SLURM_JOB_ID" in os.environ:
            _meet_on_the_first_node()
        global _store
        _store, _, _ = next(dist.rendezvous(dist_url, rank=info.rank, world_size=info.world_size))
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if on_gpu else _gloo(),
            store=_store,
            world_size=info.world_size,
            rank=info.rank,
            timeout=timedelta(minutes=30),
        )
        set_verbose(info.rank == 0)
        logger.info(f"distributed: {info.world_size} processes, this is rank {info.rank} ({dist.get_backend()})")
    return info


@contextmanager
def process_group(device: str = "cuda", dist_url: str = "env://") -> Iterator[ProcessInfo]:
    """Join the process group, and leave it together: an error in one process ends the others within seconds.

    They would wait for it in their next collective call otherwise, until that times out.
    """
    info = init_distributed_mode(device, dist_url)
    if not info.distributed:
        yield info
        return
    # Of this attempt only: a launcher that starts the processes again may keep the store.
    failed = from_main(lambda: f"detr/failed/{uuid.uuid4()}")
    over = threading.Event()
    watch = threading.Thread(target=_watch_the_others, args=(failed, over), daemon=True)
    watch.start()
    leaving = None
    try:
        yield info
    except SystemExit as agreed:  # all processes stop after the same step
        leaving = agreed
    except BaseException as error:
        over.set()
        _store.set(failed, f"rank {info.rank}: {type(error).__name__}: {error}")
        raise
    dist.barrier()  # still watched: another process may yet fail on its last steps
    over.set()
    watch.join()
    dist.destroy_process_group()
    if leaving:
        raise leaving


def _watch_the_others(failed: str, over: threading.Event) -> None:
    """End this process when another one has left its error under the key, or the one that keeps the store is gone."""
    while not over.wait(POLL):
        try:
            news = _store.get(failed).decode() if _store.check([failed]) else ""
        except RuntimeError:
            news = "the main process is gone"
        if news and not over.is_set():
            os.write(2, f"leaving, because of {news}\n".encode())
            os._exit(1)


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
    """Ask the main process alone, and return its answer, a picklable object, on every process."""
    if get_world_size() == 1:
        return ask()
    answer = [ask() if is_main_process() else None]
    dist.broadcast_object_list(answer)
    return answer[0]


def gather_to_main(data: Any) -> list | None:
    """Collect a picklable object of every process, in rank order, on the main process; None on the others."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(data, gathered, dst=0)
    return gathered


def mean_over_processes(value: float, device: torch.device) -> Tensor | float:
    """Average a number over processes; it stays on the device where there are several."""
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


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn the flag into a device: this process's own GPU, or the CPU (said in one line) where there is none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.info(f"no GPU here: --device {name} becomes cpu")
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", local_rank)
    return device
