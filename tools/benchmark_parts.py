"""The measurements behind tools/benchmark.py: each `measure_*` yields rows of figures."""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CLASSES, OBJECTS = 91, 7  # COCO's, and its objects in an image on average
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Ours:
    """This tree's DETR, or another one with the same contract: built from the reference's flags."""

    def __init__(self, model: str, queries: int, device: str, **more):
        from main import get_args_parser

        flags = f"--backbone {model.removesuffix('-dc5')} --num_queries {queries} --device {device}".split()
        args = argparse.ArgumentParser(parents=[get_args_parser()]).parse_args(
            flags + ["--dilation"] * model.endswith("-dc5")
        )
        args.backbone_weights = "none"
        with contextlib.redirect_stdout(io.StringIO()):  # some trees talk
            from models import build_model

            self.model, self.criterion, _ = build_model(args)
        self.model.to(device)
        self.device = device

    def batch(self, images: list[Tensor]):
        """Images [3, h, w] in 0..255 as bytes -> what the model takes."""
        from util.misc import nested_tensor_from_tensor_list

        return nested_tensor_from_tensor_list([normalised(image) for image in images]).to(self.device)

    def forward(self, samples) -> Tensor:
        """Logits of the last layer."""
        return self.model(samples)["pred_logits"]

    def loss(self, samples, targets: list[dict]) -> Tensor:
        """The weighted sum over all layers."""
        return self.criterion_only(self.model(samples), targets)

    def criterion_only(self, outputs: dict, targets: list[dict]) -> Tensor:
        """The same, of outputs that are there."""
        losses = self.criterion(outputs, targets)
        return sum(losses[name] * weight for name, weight in self.criterion.weight_dict.items() if name in losses)


class Transformers:
    """Hugging Face's DETR with the same shape; its layers 2 to 4 train, as everywhere else."""

    def __init__(self, model: str, queries: int, device: str, **more):
        from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

        if model not in ("resnet50", "resnet101"):
            raise SystemExit(f"--peer transformers: no {model} there; choose resnet50 or resnet101")
        depths = [3, 4, 6, 3] if model == "resnet50" else [3, 4, 23, 3]
        config = DetrConfig(
            backbone_config=ResNetConfig(depths=depths, out_features=["stage4"]),
            num_queries=queries, num_labels=CLASSES, auxiliary_loss=True,
        )  # fmt: skip
        self.model = DetrForObjectDetection(config).to(device)
        for name, parameter in self.model.model.backbone.named_parameters():
            parameter.requires_grad_(any(f"stages.{stage}" in name for stage in (1, 2, 3)))
        self.device = device

    def batch(self, images: list[Tensor]):
        """Images -> padded pixels and a mask that is 1 on the image."""
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        pixels, mask = torch.zeros(len(images), 3, height, width), torch.zeros(len(images), height, width).long()
        for image, pixel, valid in zip(images, pixels, mask, strict=True):
            pixel[:, : image.shape[1], : image.shape[2]] = normalised(image)
            valid[: image.shape[1], : image.shape[2]] = 1
        return pixels.to(self.device), mask.to(self.device)

    def forward(self, samples) -> Tensor:
        """Logits of the last layer."""
        return self.model(pixel_values=samples[0], pixel_mask=samples[1]).logits

    def loss(self, samples, targets: list[dict]) -> Tensor:
        """The weighted sum over all layers."""
        labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
        return self.model(pixel_values=samples[0], pixel_mask=samples[1], labels=labels).loss

    def criterion_only(self, outputs: dict, targets: list[dict]) -> Tensor:
        """The loss of outputs that are there, as this model computes it."""
        layers = [*outputs["aux_outputs"], outputs]
        logits = torch.stack([layer["pred_logits"] for layer in layers])
        boxes = torch.stack([layer["pred_boxes"] for layer in layers])
        labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
        config = self.model.config
        return self.model.loss_function(logits[-1], labels, self.device, boxes[-1], config, logits, boxes)[0]


def load_tree(folder: str) -> type:
    """Take `models`, `main` and `util` from another folder; its backbones stay random."""
    import torchvision.models.resnet as resnet

    build = resnet._resnet
    resnet._resnet = lambda block, layers, weights, progress, **more: build(block, layers, None, progress, **more)
    sys.path.insert(0, folder)
    return Ours


def measure_forward(options, side: type, peer: type | None) -> Iterator[dict]:
    """Time of a forward pass in evaluation mode, its memory, its FLOPs, and the share of the machine's peak."""
    for setting, ours, theirs, images in settings(options, side, peer):
        sides = [one for one in (ours, theirs) if one]
        for one in sides:
            one.model.eval()
        calls = [forward_call(one, images, setting["precision"]) for one in sides]
        with torch.no_grad():
            flops = count_flops(calls[0]) if not setting["compiled"] else None
            figures = timed(calls, options.rounds, options.device)
        row = setting | compared(figures)
        row["images_per_s"] = setting["batch"] / row["s"]
        if flops:
            row |= {"gflops": flops / 1e9, "of_peak": flops / row["s"] / peak_flops(options.device)}
        yield row


def measure_train(options, side: type, peer: type | None) -> Iterator[dict]:
    """Time of a training step: forward, losses of six layers, backward, clipping, AdamW."""
    for setting, ours, theirs, images in settings(options, side, peer):
        calls = [train_call(one, images, setting["precision"]) for one in (ours, theirs) if one]
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


def measure_evaluator(options, _side: type, _peer: type | None) -> Iterator[dict]:
    """Time of AP over 5,000 images of 100 detections, beside pycocotools."""
    from pycocotools.coco import COCO

    from datasets.coco_eval import CocoEvaluator

    rng = torch.Generator().manual_seed(0)
    images, api = range(1, 5001), COCO()
    corners = torch.rand(5000, OBJECTS, 2, generator=rng) * 400
    sides = 20 + torch.rand(5000, OBJECTS, 2, generator=rng) * 150
    api.dataset = {
        "images": [{"id": i, "height": 600, "width": 600} for i in images],
        "categories": [{"id": c} for c in range(1, 81)],
        "annotations": [
            {"id": i * OBJECTS + k + 1, "image_id": i, "category_id": 1 + (i + k) % 80, "iscrowd": 0,
             "bbox": [*corners[i - 1, k].tolist(), *sides[i - 1, k].tolist()], "area": sides[i - 1, k].prod().item()}
            for i in images for k in range(OBJECTS)
        ],
    }  # fmt: skip
    results = {}
    for i in images:
        near = torch.randint(0, OBJECTS, (100,), generator=rng)
        first = corners[i - 1, near] + torch.randn(100, 2, generator=rng) * 10
        boxes = torch.cat([first, first + sides[i - 1, near]], 1)
        results[i] = {"scores": torch.rand(100, generator=rng), "labels": 1 + (i + near) % 80, "boxes": boxes}
    seconds, stats = {}, {}
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
        for backend in ("auto", "pycocotools"):
            begin = time.perf_counter()
            evaluator = CocoEvaluator(api, ["bbox"], backend=backend)
            evaluator.update(results)
            evaluator.synchronize_between_processes()
            evaluator.accumulate()
            evaluator.summarize()
            seconds[backend] = time.perf_counter() - begin
            stats[backend] = [float(number) for number in evaluator.coco_eval["bbox"].stats[:12]]
    fast, slow = seconds["auto"], seconds["pycocotools"]
    yield {"images": 5000, "s": fast, "pycocotools_s": slow, "ratio": slow / fast,
           "same": stats["auto"] == stats["pycocotools"]}  # fmt: skip


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
    """Graphs that the compiler makes while image sizes change as in a training epoch (without compiling them)."""
    rng = torch.Generator().manual_seed(0)
    for model in options.models:
        ours = side(model, options.queries, options.device)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        ours.model.compile(backend="eager")
        ours.model.train()
        made = []
        for _ in range(40):
            sides = [int(x) for x in torch.randint(64, 161, (4,), generator=rng)]
            samples = ours.batch([torch.zeros(3, sides[0], sides[1]), torch.zeros(3, sides[2], sides[3])])
            ours.model(samples)
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
        ours.model.eval()
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
        if options.device.startswith("cuda"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.manual_seed(0)
        ours = side(model, options.queries, options.device)
        theirs = peer(model, options.queries, options.device) if peer else None
        if compile_it:
            torch._dynamo.reset()
            ours.model.compile()
        setting = {"model": model, "precision": precision, "compiled": compile_it, "batch": batch}
        yield setting, ours, theirs, pictures(batch, options.size)


def pictures(number: int, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Noise of the given sizes, taken in turn."""
    return [torch.randint(0, 256, (3, *sizes[i % len(sizes)]), dtype=torch.uint8) for i in range(number)]


def normalised(image: Tensor) -> Tensor:
    """Bytes -> floats with ImageNet's mean and deviation, which every DETR takes."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image.float() / 255 - mean[:, None, None]) / std[:, None, None]


def some_targets(number: int, device: str) -> list[dict]:
    """Objects of random classes and boxes."""
    centre, size = 0.3 + 0.4 * torch.rand(number, OBJECTS, 2), 0.1 + 0.3 * torch.rand(number, OBJECTS, 2)
    boxes, labels = torch.cat([centre, size], 2), torch.randint(1, CLASSES, (number, OBJECTS))
    return [{"boxes": b.to(device), "labels": c.to(device)} for b, c in zip(boxes, labels, strict=True)]


def forward_call(one, images: list[Tensor], precision: str) -> Callable:
    """Return a function that runs the model on the images, which are on the device already."""
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


def autocast(device: str, precision: str) -> torch.autocast:
    """Build the context of a precision."""
    return torch.autocast(torch.device(device).type, dtype=AMP.get(precision), enabled=precision in AMP)


def timed(calls: list[Callable], rounds: int, device: str) -> list[dict]:
    """Call each in turn, `rounds` times after a warm-up; return median, spread and memory of each."""
    figures = []
    for call in calls:
        call()
        held = start_counting(device)
        call()
        figures.append({"times": [], "memory": most_held(device) - held})
    for _ in range(rounds):
        for call, figure in zip(calls, figures, strict=True):
            begin = clock(device)
            call()
            figure["times"].append(clock(device) - begin)
    return figures


def compared(figures: list[dict]) -> dict:
    """Lay out what `timed` found: seconds, spread and memory, and the peer's with the ratio."""

    def seconds(figure: dict) -> float:
        return statistics.median(figure["times"])

    times = sorted(figures[0]["times"])
    spread = times[(3 * len(times)) // 4] - times[len(times) // 4]
    row = {"s": seconds(figures[0]), "spread": spread, "peak_gb": figures[0]["memory"]}
    if len(figures) > 1:
        row |= {"peer_s": seconds(figures[1]), "peer_gb": figures[1]["memory"], "ratio": seconds(figures[1]) / row["s"]}
    return row


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
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return most_held(device)


def most_held(device: str) -> float:
    """Peak in GB since `start_counting`: of PyTorch's memory on a GPU, of the process's (Linux) on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1e6


def count_flops(call: Callable) -> int:
    """Count the floating point operations of a call, by PyTorch's own counter (a multiply-add is two)."""
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:  # the counter's hooks want gradients
        call()
    return counter.get_total_flops()


_peaks: dict[str, float] = {}


def peak_flops(device: str) -> float:
    """Measure the machine's float32 peak once: the best of some large matrix products."""
    if device not in _peaks:
        n = 8192 if device.startswith("cuda") else 2048
        a, times = torch.rand(n, n, device=device), []
        for _ in range(6):
            begin = clock(device)
            a @ a
            times.append(clock(device) - begin)
        _peaks[device] = 2 * n**3 / min(times)
    return _peaks[device]


def machine(device: str) -> str:
    """Name the hardware."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"
