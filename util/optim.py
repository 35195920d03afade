"""The optimizer, and the schedule of the learning rates."""

import math
from collections.abc import Callable

import torch
from torch import nn

# Factor of the rates by the share of the run that is done, and the number of drops.
SHAPES = {
    "step": lambda done, drops: 0.1**drops,
    "linear": lambda done, drops: max(0.0, 1 - done),
    "cosine": lambda done, drops: (1 + math.cos(math.pi * min(1.0, done))) / 2,
}


def build_optimizer(args, model: nn.Module, training_only: nn.Module | None = None) -> torch.optim.Optimizer:
    """Build AdamW, with a learning rate of its own for the backbone; parameters beside the model come last.

    With `--decoder_delay`, decoder and object queries are a group of their own, marked as `delayed`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    backbone = {name for name, _ in named if "backbone" in name}
    waiting = ("transformer.decoder.", "query_embed.") if args.decoder_delay else ()
    delayed = {name for name, _ in named if any(part in name for part in waiting)}
    groups: list[dict] = [
        {"params": [p for name, p in named if name not in backbone | delayed]},
        {"params": [p for name, p in named if name in backbone], "lr": args.lr_backbone},
    ]
    if delayed:
        groups.append({"params": [p for name, p in named if name in delayed], "delayed": True})
    if training_only:
        groups.append({"params": list(training_only.parameters())})
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)


def build_lr_scheduler(
    args, optimizer: torch.optim.Optimizer, steps_per_epoch: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the schedule of the rates: stepped after every epoch, or after every step if `steps_per_epoch` is given.

    The rate of a `delayed` group is 0 for the share `--decoder_delay` of the steps.
    """
    if not steps_per_epoch:
        return torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)
    shape, steps = SHAPES[args.lr_schedule], args.epochs * steps_per_epoch

    def factor_after(delay: int) -> Callable[[int], float]:
        def factor(step: int) -> float:
            warmup = min(1.0, max(0, step + 1 - delay) / (args.warmup_steps + 1))
            return warmup * shape(step / steps, step // steps_per_epoch // args.lr_drop)

        return factor

    delays = [round(args.decoder_delay * steps) * ("delayed" in group) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [factor_after(delay) for delay in delays])


def moving_average(decay: float):
    """Return the update of an exponential moving average, as torch.optim.swa_utils.AveragedModel takes it.

    After n updates the decay is at most (1 + n) / (10 + n): with `decay` alone, the weights at the start would keep a
    share of decay^n, for 0.999 still 37 % after 1,000 steps.
    """

    @torch.no_grad()
    def update(averages: list[torch.Tensor], values: list[torch.Tensor], updates: torch.Tensor) -> None:
        if not averages[0].is_floating_point():  # counters of batch norm
            torch._foreach_copy_(averages, values)
            return
        share = 1 - ((1 + updates) / (10 + updates)).clamp(max=decay)  # a tensor: its value is not needed on the CPU
        changes = torch._foreach_sub(values, averages)
        torch._foreach_mul_(changes, share)
        torch._foreach_add_(averages, changes)

    return update


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict, name: str) -> None:
    """Load the moments that a checkpoint called `name` saved; the options of the groups stay those of the flags.

    Raises ValueError if they are of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    try:
        counts = [[len(group["params"]) for group in side] for side in (saved["param_groups"], groups)]
        if counts[0] != counts[1]:
            raise ValueError(f"groups of {counts[0]} parameters there, of {counts[1]} here")
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        for parameter, moments in optimizer.state.items():
            if "exp_avg" in moments and moments["exp_avg"].shape != parameter.shape:
                shapes = list(moments["exp_avg"].shape), list(parameter.shape)
                raise ValueError(f"an average of shape {shapes[0]} for a parameter of shape {shapes[1]}")
    except ValueError as error:
        raise ValueError(
            f"{name}: its optimizer trained other parameters ({error}). Give the --lr_backbone (0 or not), "
            "--decoder_delay (0 or not), --backbone_norm and --frozen_weights of that run; "
            "to start again from these weights, use --finetune"
        ) from None
