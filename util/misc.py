"""The old address of the utilities, for code written against DETR; nothing inside the project imports it."""

import subprocess
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from util import dist
from util.dist import (
    all_gather,
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
    reduce_dict,
    save_on_master,
)
from util.logger import MetricLogger, SmoothedValue
from util.nested_tensor import NestedTensor, collate_fn, nested_tensor_from_tensor_list

__all__ = [
    "MetricLogger",
    "NestedTensor",
    "SmoothedValue",
    "accuracy",
    "all_gather",
    "collate_fn",
    "get_rank",
    "get_sha",
    "get_world_size",
    "init_distributed_mode",
    "interpolate",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "nested_tensor_from_tensor_list",
    "reduce_dict",
    "save_on_master",
]


def init_distributed_mode(args) -> None:
    """Join the process group and note the outcome on `args` (`distributed`, `rank`, `gpu`), as old scripts expect."""
    info = dist.init_distributed_mode(getattr(args, "device", "cuda"), getattr(args, "dist_url", "env://"))
    args.distributed, args.rank, args.world_size, args.gpu = (
        info.distributed,
        info.rank,
        info.world_size,
        info.local_rank,
    )


@torch.no_grad()
def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """Percentage of rows of `output` [N, K] whose k best classes hold the one of `target` [N]; 0 when N is 0."""
    if not len(target):
        return [torch.zeros([], device=output.device) for _ in topk]
    best = output.topk(max(topk), dim=1).indices
    hits = best == target[:, None]
    return [100 * hits[:, :k].any(dim=1).float().mean() for k in topk]


def get_sha() -> str:
    """Say which commit of the project is running, and whether it was changed."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)

    try:
        sha, branch = git("rev-parse", "HEAD").strip(), git("rev-parse", "--abbrev-ref", "HEAD").strip()
        status = "has uncommitted changes" if git("diff", "HEAD", "--name-only").strip() else "clean"
    except (OSError, subprocess.CalledProcessError):
        return "sha: unknown, status: not a git checkout"
    return f"sha: {sha}, status: {status}, branch: {branch}"
