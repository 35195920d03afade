"""What tools/benchmark.py measures of the network and its loss: each `measure_*` yields rows of figures."""

import functools
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.benchmark_sides import CLASSES, Ours, pictures, some_targets
from tools.gauges import clock, count_flops, peak_flops, timed

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def measure_forward(options, side: type, peer: type | None) -> Iterator[dict]:
    """Time of a forward pass in evaluation mode, its memory, its FLOPs, and the share of the machine's peak."""
    for setting, ours, theirs, images in settings(options, side, peer):
        calls = [forward_call(ours, images, setting["precision"])]
        if theirs:
            calls.append(forward_call(theirs, images, options.peer_precision or setting["precision"]))
        with torch.no_grad():
            flops = count_flops(calls[0]) if not setting["compiled"] else None
            figures = timed(calls, options.rounds, options.device)
        row = setting | compared(figures)
        row["images_per_s"] = setting["batch"] / row["s"]
        if flops:
            row |= {"gflops": flops / 1e9, "of_peak": flops / row["s"] / peak(options.device, setting["precision"])}
        yield row


def measure_train(options, side: type, peer: type | None) -> Iterator[dict]:
    """Time of a training step: forward, losses of six layers, backward, clipping, AdamW."""
    for setting, ours, theirs, images in settings(options, side, peer):
        calls = [train_call(ours, images, setting["precision"])]
        if theirs:
            calls.append(train_call(theirs, images, options.peer_precision or setting["precision"]))
        row = setting | compared(timed(calls, options.rounds, options.device))
        row["images_per_s"] = setting["batch"] / row["s"]
        yield row


def measure_split(options, side: type, _: type | None) -> Iterator[dict]:
    """Where a training step's time goes: data to the device, forward, loss, backward, step."""
    for setting, ours, _, images in settings(options, side, None):
        ours.model.train()
        targets, optimizer = some_targets(len(images), options.device), adamw(ours.model)
        rounds = [split_step(ours, images, targets, optimizer, setting["precision"]) for _ in range(options.rounds + 1)]
        names = ("data", "forward", "loss", "backward", "step")
        yield setting | {name: statistics.median(times) for name, *times in zip(names, *rounds[1:], strict=True)}


def split_step(ours: Ours, images: list[Tensor], targets: list[dict], optimizer, precision: str) -> list[float]:
    """Make a training step and return the seconds of its five parts."""
    times = [clock(ours.device)]
    samples = ours.batch(images)
    times.append(clock(ours.device))
    with autocast(ours.device, precision):
        outputs = ours.model(samples)
    times.append(clock(ours.device))
    loss = ours.criterion_only(outputs, targets)
    times.append(clock(ours.device))
    loss.backward()
    times.append(clock(ours.device))
    update(ours.model, optimizer)
    times.append(clock(ours.device))
    return [after - before for before, after in itertools.pairwise(times)]


def measure_criterion(options, side: type, peer: type | None) -> Iterator[dict]:
    """Time of matching and losses over six layers, forward and backward, on random outputs."""
    for batch in options.batch:
        ours = side("resnet50", options.queries, options.device)
        sides = [ours] + ([peer("resnet50", options.queries, options.device)] if peer else [])
        targets = some_targets(batch, options.device)
        layers = [
            {
                "pred_logits": torch.randn(batch, options.queries, CLASSES + 1, device=options.device),
                "pred_boxes": torch.rand(batch, options.queries, 4, device=options.device) * 0.5 + 0.2,
            }
            for _ in range(6)
        ]
        for tensor in itertools.chain.from_iterable(layer.values() for layer in layers):
            tensor.requires_grad_()
        outputs = {**layers[-1], "aux_outputs": layers[:-1]}
        calls = [lambda one=one: one.criterion_only(outputs, targets).backward() for one in sides]  # noqa: B023
        yield {"batch": batch, "queries": options.queries} | compared(timed(calls, options.rounds * 4, options.device))


def measure_syncs(options, side: type, _: type | None) -> Iterator[dict]:
    """Times that a training step makes the CPU wait for the GPU, by PyTorch's own count."""
    if not options.device.startswith("cuda"):
        raise SystemExit("syncs: the CPU waits for a GPU only where there is one: --device cuda")
    from engine import train_one_epoch

    for setting, ours, _, images in settings(options, side, None):
        targets = some_targets(len(images), "cpu")
        loader = [(ours.batch(images).to(torch.device("cpu")).pin_memory(), targets)] * 3
        counts = []
        for steps in (1, 3):  # what an epoch costs once is not a step's
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                train_one_epoch(ours.model, ours.criterion, loader[:steps], adamw(ours.model),
                                torch.device(options.device), 0, 0.1, print_freq=1000)  # fmt: skip
                torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
        yield setting | {"syncs_per_step": (counts[1] - counts[0]) / 2}


def measure_graphs(options, side: type, _: type | None) -> Iterator[dict]:
    """Graphs that the compiler makes in training while image sizes change as in an epoch."""
    rng = torch.Generator().manual_seed(0)
    for model in options.models:
        ours = side(model, options.queries, options.device)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        ours.compile()
        ours.model.train()
        made = []
        for _ in range(40):
            sides = [int(x) for x in torch.randint(64, 161, (4,), generator=rng)]
            samples = ours.batch([torch.zeros(3, sides[0], sides[1]), torch.zeros(3, sides[2], sides[3])])
            ours.loss(samples, some_targets(2, options.device)).backward()
            made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        yield {"model": model, "batches": len(made), "graphs": made[-1], "last_new_at_batch": made.index(made[-1]) + 1}


def measure_cost(options, side: type, _: type | None) -> Iterator[dict]:
    """Forward time as one of batch, size and queries varies and the others stay."""
    (height, width), batch = options.size[0], options.batch[0]
    sweeps = [("batch", value, value, 1.0, options.queries) for value in (1, 2, 4, 8)]
    sweeps += [("size", round(height * k), batch, k, options.queries) for k in (0.4, 0.6, 0.8, 1.0)]
    sweeps += [("queries", value, batch, 1.0, value) for value in (25, 100, 300, 900)]
    for axis, value, number, scale, queries in sweeps:
        ours = side(options.models[0], queries, options.device)
        call = forward_call(ours, pictures(number, [(int(height * scale), int(width * scale))]), options.precision[0])
        with torch.no_grad():
            yield {"axis": axis, "value": value} | compared(timed([call], options.rounds, options.device))


def plot_cost(rows: list[dict], path: Path) -> None:
    """Draw one panel for each axis of `measure_cost`."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(4 * len(axes), 3.2), layout="constrained")
    for name, panel in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        points = [(row["value"], row["s"]) for row in rows if row["axis"] == name]
        panel.plot(*zip(*points, strict=True), marker="o")
        panel.set(xlabel=name, ylabel="seconds a forward pass", ylim=(0, None))
    figure.savefig(path, dpi=120)


def settings(options, side: type, peer: type | None) -> Iterator[tuple]:
    """Yield (setting, ours, theirs, images) for every combination of the flags; fresh models for each."""
    compiled = (False, True) if options.compile else (False,)
    for model, precision, compile_it, batch in itertools.product(
        options.models, options.precision, compiled, options.batch
    ):
        torch.manual_seed(0)
        ours = side(model, options.queries, options.device)
        theirs = peer(model, options.queries, options.device) if peer else None
        if compile_it:
            torch._dynamo.reset()
            ours.compile()
        setting = {"model": model, "precision": precision, "compiled": compile_it, "batch": batch}
        yield setting, ours, theirs, pictures(batch, options.size)


def forward_call(one, images: list[Tensor], precision: str) -> Callable:
    """Return a function that runs the model on the images, which are on the device already."""
    one.model.eval()
    samples = one.batch(images)

    def call():
        with autocast(one.device, precision):
            return one.forward(samples)

    return call


def train_call(one, images: list[Tensor], precision: str) -> Callable:
    """Return a function that makes one step of training."""
    one.model.train()
    samples, targets, optimizer = one.batch(images), some_targets(len(images), one.device), adamw(one.model)

    def call():
        with autocast(one.device, precision):
            loss = one.loss(samples, targets)
        loss.backward()
        update(one.model, optimizer)

    return call


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip, step, and forget the gradients."""
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


@functools.cache
def peak(device: str, precision: str) -> float:
    """Measure the peak of a precision once."""
    return peak_flops(device, AMP.get(precision, torch.float32))


def autocast(device: str, precision: str) -> torch.autocast:
    """Build the context of a precision; TF32 is a switch, which stays as the last call wanted it."""
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(torch.device(device).type, dtype=AMP.get(precision), enabled=precision in AMP)


def compared(figures: list[dict]) -> dict:
    """Lay the peer's figures, where there are some, beside ours, with the ratio of the medians."""
    row, *theirs = figures
    for peer in theirs:
        row |= {"peer_s": peer["s"], "peer_spread": peer["spread"], "peer_gb": peer["peak_gb"]}
        row["ratio"] = peer["s"] / row["s"]
    return row
