"""The reference's import path of the utilities, for code written against DETR; models and datasets do not use it."""

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
from util.logger import configure_logging, set_verbose
from util.meters import MetricLogger, SmoothedValue
from util.metrics import accuracy
from util.nested_tensor import NestedTensor, collate_fn, nested_tensor_from_tensor_list
from util.project import get_sha

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
    "setup_for_distributed",
]


def init_distributed_mode(args) -> None:
    """Join the process group and set `distributed`, `rank`, `world_size` and `gpu` on `args`."""
    configure_logging()
    info = dist.init_distributed_mode(getattr(args, "device", "cuda"), getattr(args, "dist_url", "env://"))
    args.distributed, args.rank, args.world_size = info.distributed, info.rank, info.world_size
    args.gpu = info.local_rank


def setup_for_distributed(is_master: bool) -> None:
    """Let only the main process log; `print` is not changed."""
    configure_logging()
    set_verbose(is_master)


def _max_by_axis(the_list: list[list[int]]) -> list[int]:
    return [max(sizes) for sizes in zip(*the_list, strict=True)]


def _onnx_nested_tensor_from_tensor_list(tensor_list: list[Tensor]) -> NestedTensor:
    return nested_tensor_from_tensor_list(tensor_list)
