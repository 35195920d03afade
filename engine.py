"""What one epoch of training and one pass of evaluation do."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from datasets.coco_eval import CocoEvaluator
from datasets.evaluators import Batch, build_evaluators
from util.logger import MetricLogger, SmoothedValue

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    max_norm: float = 0,
    *,
    amp: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accum_steps: int = 1,
    print_freq: int = 10,
    done: int = 0,
    sums: dict[str, list] | None = None,
    after_step: Callable[[int, MetricLogger], None] | None = None,
) -> dict[str, float]:
    """Train on every batch once; return the epoch's averages.

    Gradients are clipped to a norm of `max_norm` (0: not at all). `amp` is "bf16", "fp16" (with a `scaler`) or None.
    The optimizer steps every `accum_steps` batches, on the mean of their gradients. Raises FloatingPointError, before
    the weights are touched, when the loss is not finite.

    An epoch taken up in the middle has `done` batches behind it (the loader holds only the others), with `sums` of
    their numbers. `after_step(done, metrics)` is called after each step of the optimizer.
    """
    model.train()
    criterion.train()
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    metrics = MetricLogger()
    metrics.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    metrics.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    metrics.add_sums(sums or {})
    batches = len(data_loader)
    optimizer.zero_grad()
    rows = metrics.log_every(data_loader, print_freq, f"Epoch: [{epoch}]", start=done, in_step=True)
    for step, (samples, targets) in enumerate(rows):
        ids = [int(target["image_id"]) for target in targets if "image_id" in target]
        samples = samples.to(device, non_blocking=True)
        targets = to_device(targets, device)
        group = min(accum_steps, batches - (step - step % accum_steps))  # batches that share this step's update
        closes = (step + 1) % accum_steps == 0 or step + 1 == batches
        with nullcontext() if closes else no_sync(model):
            with autocast(device, amp):
                outputs = model(samples)
            losses = criterion(outputs, targets)
            values = loss_values(losses, criterion.weight_dict)
            check_finite(values, f"epoch {epoch}, step {done + step}, images {ids}")
            loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
            scaler.scale(loss / group).backward()
        if closes:
            if max_norm > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        metrics.update(**values, lr=optimizer.param_groups[0]["lr"])
        if closes and after_step:
            after_step(done + step + 1, metrics)
    metrics.synchronize_between_processes()
    return metrics.averages()


def compile_network(model: nn.Module) -> None:
    """Compile a model in place: one graph for the first image size, and one for all others."""
    # Otherwise (seen in torch 2.14) the backward pass of a convolution is compiled anew for each size.
    model.compile(options={"force_layout_optimization": True})


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict[str, nn.Module],
    data_loader: Iterable,
    base_ds,
    device: torch.device,
    output_dir: str,
    *,
    amp: str | None = None,
    coco_backend: str = "auto",
    print_freq: int = 10,
) -> tuple[dict, CocoEvaluator | None]:
    """Run the model over the data and compute every metric of `datasets.evaluators`, at the images' original sizes.

    `base_ds` is the annotations' index as pycocotools builds it (needed on the main process only). Returns the averaged
    losses with, on the main process, the metrics: `coco_eval_bbox` (COCO's twelve numbers), `coco_eval_masks` where
    there are masks, and `PQ_all`, `PQ_th`, `PQ_st` where there are panoptic maps; and the CocoEvaluator.
    """
    model.eval()
    criterion.eval()
    metrics = MetricLogger()
    metrics.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    evaluators = build_evaluators(postprocessors, data_loader, base_ds, output_dir, coco_backend)
    for samples, targets in metrics.log_every(data_loader, print_freq, "Test:"):
        samples = samples.to(device, non_blocking=True)
        on_device = to_device(targets, device)
        with autocast(device, amp):
            outputs = model(samples)
        metrics.update(**loss_values(criterion(outputs, on_device), criterion.weight_dict))
        batch = Batch(outputs, samples, targets)
        results = postprocessors["bbox"](outputs, batch.original_sizes.to(device, non_blocking=True))
        if "segm" in postprocessors:
            results = postprocessors["segm"](results, outputs, batch.original_sizes, batch.sizes)
        predictions = dict(zip(batch.image_ids, results, strict=True))
        for evaluator in evaluators.values():
            evaluator.update(predictions, batch)
    metrics.synchronize_between_processes()
    stats = metrics.averages()
    for evaluator in evaluators.values():
        evaluator.synchronize_between_processes()
        evaluator.accumulate()
        stats |= evaluator.summarize()
    return stats, evaluators.get("coco")


def check_finite(values: dict[str, float], where: str) -> None:
    """Raise FloatingPointError, naming the losses, if the total is not finite: weights must not learn from it."""
    if not math.isfinite(values["loss"]):
        broken = [name for name, value in values.items() if name.endswith("_unscaled") and not math.isfinite(value)]
        raise FloatingPointError(f"{where}: not finite: {', '.join(name[: -len('_unscaled')] for name in broken)}")


def no_sync(model: nn.Module):
    """Build the context in which a distributed model keeps its gradients to itself; for any other, one of no effect."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def to_device(targets: Iterable[dict], device: torch.device) -> list[dict]:
    """Copy the tensors of the targets; entries of another kind pass."""
    return [
        {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in target.items()
        }
        for target in targets
    ]


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Build the context the model runs in: half precision of a kind, or None for float32."""
    return torch.autocast(torch.device(device).type, dtype=AMP_TYPES.get(amp), enabled=amp is not None)


def allow_tf32(yes: bool) -> None:
    """Say, for the whole process, whether a GPU may round the inputs of float32 products to TF32's 10 bits of fraction.

    PyTorch lets convolutions do so unasked, which moves outputs by about 1e-3.
    """
    torch.backends.cudnn.allow_tf32 = yes
    torch.set_float32_matmul_precision("high" if yes else "highest")


def loss_values(losses: dict[str, Tensor], weight_dict: dict[str, float]) -> dict[str, float]:
    """Bring the losses to the CPU, in one copy, as the numbers the log shows.

    `loss` is the weighted sum, `loss_ce` and so on its weighted parts, `*_unscaled` all values as they were given.
    """
    numbers = torch.stack([value.detach().float().mean() for value in losses.values()]).tolist()
    raw = dict(zip(losses, numbers, strict=True))
    weighted = {name: raw[name] * weight for name, weight in weight_dict.items() if name in raw}
    values = {"loss": sum(weighted.values()), **weighted, **{f"{name}_unscaled": value for name, value in raw.items()}}
    return values | ({"class_error": raw["class_error"]} if "class_error" in raw else {})
