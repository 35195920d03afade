"""One epoch of training, and one evaluation."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datasets.coco_eval import CocoEvaluator
from datasets.evaluators import Batch, build_evaluators
from datasets.panoptic_eval import PanopticEvaluator
from util.logger import logger
from util.meters import MetricLogger, SmoothedValue

__all__ = ["CocoEvaluator", "EvalOptions", "PanopticEvaluator", "evaluate", "train_one_epoch"]

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIN_SCALE = 2.0**-30  # of the loss in fp16; with a lower one, a step that is not finite is not due to overflow


def train_one_epoch(
    model: nn.Module, criterion: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer,
    device: torch.device, epoch: int, max_norm: float = 0, *, amp: str | None = None,
    scaler: torch.amp.GradScaler | None = None, accum_steps: int = 1, print_freq: int = 10, state=None,
) -> dict[str, float]:  # fmt: skip
    """Train on every batch once; return the epoch's averages.

    Gradients are clipped to a norm of `max_norm` (0: not at all). `amp` is "bf16", "fp16" (with a `scaler`) or None.
    The optimizer steps every `accum_steps` batches, on the mean of their gradients. `state` (a `util.run.Run`) saves
    checkpoints and handles signals: its `after_step` is called after each step. Raises FloatingPointError, before the
    weights change, when the loss or a gradient is not finite; in fp16 the scaler skips such steps, as long as a lower
    scale may help. If `state.with_targets`, the model takes the targets too (models/training.py).
    """
    model.train()
    criterion.train()
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    metrics = MetricLogger(delimiter="  ")
    metrics.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    metrics.add_sums(state.sums if state else {})
    with_targets = getattr(state, "with_targets", False)
    done, batches = state.batches_done if state else 0, len(data_loader)
    optimizer.zero_grad()
    rows = metrics.log_every(data_loader, print_freq, f"Epoch: [{epoch}]", done, getattr(state, "epochs_left", 0))
    for step, (samples, targets) in enumerate(rows):
        group = min(accum_steps, batches - (step - step % accum_steps))  # batches that share this step's update
        last_in_group = (step + 1) % accum_steps == 0 or step + 1 == batches
        ids = [int(target["image_id"]) for target in targets if "image_id" in target]
        with nullcontext() if last_in_group else no_sync(model):
            samples, targets = samples.to(device, non_blocking=True), to_device(targets, device)
            with autocast(device, amp):
                losses = criterion(model(samples, targets) if with_targets else model(samples), targets)
            loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
            scaler.scale(loss / group).backward()
        norm = None
        if last_in_group:
            scaler.unscale_(optimizer)
            norm = gradient_norm(model)
        values, norm_value = loss_values_and_norm(losses, criterion.weight_dict, norm)
        if check_finite(values, norm_value, model, scaler, f"epoch {epoch}, step {done + step}, images {ids}"):
            update_metrics(metrics, values | {"lr": optimizer.param_groups[0]["lr"]})
        if last_in_group:
            if max_norm > 0:
                nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if state:
                state.after_step(group, metrics)
    metrics.synchronize_between_processes()
    return metrics.averages()


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def check_finite(
    values: dict[str, float], norm: float, model: nn.Module, scaler: torch.amp.GradScaler, place: str
) -> bool:
    """Return whether the loss and the gradient's norm are finite; raise FloatingPointError if they must be.

    In fp16 they need not be: the scaler skips the step and lowers its scale. The error names the losses, or else the
    parameters, with values that are not finite.
    """
    if math.isfinite(values["loss"]) and math.isfinite(norm):
        return True
    if scaler.is_enabled() and scaler.get_scale() > MIN_SCALE:
        logger.info(f"{place}: overflow in fp16, step skipped")
        return False
    names = [name for name, value in values.items() if name.endswith("_unscaled") and not math.isfinite(value)]
    names = [name.removesuffix("_unscaled") for name in names]
    if not names:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        names = [f"the gradient of {name}" for name, grad in gradients.items() if not grad.isfinite().all()]
    raise FloatingPointError(f"{place}: not finite: {', '.join(names)}")


def update_metrics(metrics: MetricLogger, values: dict[str, float]) -> None:
    """Append a step's values; `class_error`, where the criterion gives it, is printed as the latest value."""
    if "class_error" in values and "class_error" not in metrics.meters:
        metrics.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    metrics.update(**values)


def compile_network(model: nn.Module) -> None:
    """Compile a model in place: one graph for the first image size, and one for all others."""
    # Without this option, the backward pass of a convolution is compiled again for each size (torch 2.14).
    model.compile(options={"force_layout_optimization": True})


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate; AP counts the `max_detections` best detections of each image.

    `amp` is "bf16", "fp16" or None; `coco_backend` as `--coco_eval`; a log line every `print_freq` batches.
    """

    amp: str | None = None
    coco_backend: str = "auto"
    max_detections: int = 100
    print_freq: int = 10


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict[str, nn.Module],
    data_loader: Iterable,
    base_ds,
    device: torch.device,
    output_dir: str,
    options: EvalOptions = EvalOptions(),
) -> tuple[dict, CocoEvaluator | None]:
    """Run the model over the data and compute every metric of `datasets.evaluators`, at the images' original sizes.

    `base_ds` is the annotations' index as pycocotools builds it (needed on the main process only). Returns the averaged
    losses with, on the main process, the metrics: `coco_eval_bbox` (COCO's twelve numbers), `coco_eval_masks` where
    there are masks, and `PQ_all`, `PQ_th`, `PQ_st` where there are panoptic maps; and the CocoEvaluator.
    """
    model.eval()
    criterion.eval()
    metrics = MetricLogger(delimiter="  ")
    evaluators = build_evaluators(postprocessors, data_loader, base_ds, output_dir, options.coco_backend)
    if "coco" in evaluators:
        evaluators["coco"].set_max_detections(options.max_detections)
    for samples, targets in metrics.log_every(data_loader, options.print_freq, "Test:"):
        samples = samples.to(device, non_blocking=True)
        on_device = to_device(targets, device)
        with autocast(device, options.amp):
            outputs = model(samples)
            losses = criterion(outputs, on_device)
        update_metrics(metrics, loss_values(losses, criterion.weight_dict))
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


def no_sync(model: nn.Module):
    """Return the context in which a distributed model skips the gradient all-reduce; any other model needs none."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def to_device(targets: Iterable[dict], device: torch.device) -> list[dict]:
    """Copy the tensors of the targets to the device; other entries are left as they are."""
    return [
        {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in target.items()
        }
        for target in targets
    ]


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Return the context for the forward pass and the loss: "bf16", "fp16", or None for float32."""
    return torch.autocast(torch.device(device).type, dtype=AMP_TYPES.get(amp), enabled=amp is not None)


def pick_amp(name: str | None, device: torch.device) -> str | None:
    """Return the precision of `--amp`: "auto" is "bf16" where the hardware multiplies it; "none" is None, float32."""
    if name != "auto":
        return None if name == "none" else name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    logger.info(f"--amp auto: {'bf16' if fast else 'float32'}")
    return "bf16" if fast else None


def allow_tf32(yes: bool) -> None:
    """Set, for the whole process, whether a GPU may round inputs of float32 products to TF32's 10 bits of fraction.

    PyTorch allows it to convolutions by default, which moves outputs by about 1e-3.
    """
    torch.backends.cudnn.allow_tf32 = yes
    torch.set_float32_matmul_precision("high" if yes else "highest")


def loss_values(losses: dict[str, Tensor], weight_dict: dict[str, float]) -> dict[str, float]:
    """Copy the losses to the CPU, at once, as the numbers of the log.

    `loss` is the weighted sum, `loss_ce` and so on its weighted parts, `*_unscaled` all values as they were given.
    """
    return loss_values_and_norm(losses, weight_dict, None)[0]


def loss_values_and_norm(
    losses: dict[str, Tensor], weight_dict: dict[str, float], norm: Tensor | None
) -> tuple[dict[str, float], float]:
    """Copy the losses and the gradient's norm (0 if there is none yet) to the CPU at once."""
    tensors = [value.detach().float().mean() for value in losses.values()]
    if norm is not None:
        tensors.append(norm.float().to(tensors[0].device))
    *numbers, last = torch.stack(tensors).tolist() + ([0.0] if norm is None else [])
    raw = dict(zip(losses, numbers, strict=True))
    weighted = {name: raw[name] * weight for name, weight in weight_dict.items() if name in raw}
    values = {"loss": sum(weighted.values()), **weighted, **{f"{name}_unscaled": value for name, value in raw.items()}}
    if "class_error" in raw:
        values["class_error"] = raw["class_error"]
    return values, last
