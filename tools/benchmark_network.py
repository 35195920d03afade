"""What tools/benchmark.py times: networks with DETR's contract, Hugging Face's DETR, and calls of their parts."""

import argparse
import contextlib
import ctypes
import io
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

# This project's modules are imported in functions: in the process of OtherTree they are another folder's.

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES, OBJECTS = 91, 7  # COCO's, and its mean number of objects in an image
Clock = tuple[Callable[[], float], float]  # a function that gives the seconds of one call, and the call's peak memory


class Detr:
    """A tree with DETR's contract, built from flags: this one, or the folder at the front of sys.path."""

    def __init__(self, setting: dict, *flags: str):
        from main import get_args_parser
        from models import build_model

        model, self.device = setting["model"], setting["device"]
        words = [*flags, "--backbone", model.removesuffix("-dc5"), "--num_queries", str(setting["queries"])]
        if model.endswith("-dc5"):
            words.append("--dilation")
        args = argparse.ArgumentParser(parents=[get_args_parser()]).parse_args([*words, "--device", self.device])
        args.backbone_weights = "none"
        with contextlib.redirect_stdout(io.StringIO()):
            self.model, self.criterion, _ = build_model(args)
        self.model.to(self.device)

    def inputs(self, images: list[Tensor]) -> dict:
        """Convert normalised images [3, h, w] to the model's arguments."""
        from util.misc import nested_tensor_from_tensor_list  # the address that every tree has

        return {"samples": nested_tensor_from_tensor_list(images).to(self.device)}

    def loss(self, inputs: dict, targets: list[dict]) -> Tensor:
        """Run the model; return the weighted sum of the losses of all layers."""
        return self.loss_of(self.model(**inputs), targets)

    def loss_of(self, outputs: dict, targets: list[dict]) -> Tensor:
        """Return the weighted sum of the losses for given outputs."""
        losses, weights = self.criterion(outputs, targets), self.criterion.weight_dict
        return sum(losses[name] * weight for name, weight in weights.items() if name in losses)


class Transformers:
    """Hugging Face's DETR of the same shape; layers 2 to 4 of its backbone train, as they do here."""

    def __init__(self, setting: dict):
        from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

        depths = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}.get(setting["model"])
        if depths is None:
            raise SystemExit(f"--peer transformers has no {setting['model']}: choose resnet50 or resnet101")
        backbone = ResNetConfig(depths=depths, out_features=["stage4"])
        dropout = {"attention_dropout": 0.1, "activation_dropout": 0.1}  # the paper's; 0 by default there
        shape = {"num_queries": setting["queries"], "num_labels": CLASSES, "auxiliary_loss": True}
        self.device = setting["device"]
        self.model = DetrForObjectDetection(DetrConfig(backbone_config=backbone, **shape, **dropout)).to(self.device)
        for name, parameter in self.model.model.backbone.named_parameters():
            parameter.requires_grad_(any(f"stages.{stage}" in name for stage in (1, 2, 3)))

    def inputs(self, images: list[Tensor]) -> dict:
        """Convert normalised images [3, h, w] to the model's arguments; the mask is 1 on the image."""
        from util.misc import nested_tensor_from_tensor_list

        pixels, padding = nested_tensor_from_tensor_list(images).to(self.device).decompose()
        return {"pixel_values": pixels, "pixel_mask": (~padding).long()}

    def loss(self, inputs: dict, targets: list[dict]) -> Tensor:
        """Run the model; return the weighted sum of the losses of all layers."""
        return self.model(**inputs, labels=self._labels(targets)).loss

    def loss_of(self, outputs: dict, targets: list[dict]) -> Tensor:
        """Return the weighted sum of the losses for given outputs."""
        layers = [*outputs["aux_outputs"], outputs]
        logits, boxes = (torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes"))
        labels, config = self._labels(targets), self.model.config
        return self.model.loss_function(logits[-1], labels, self.device, boxes[-1], config, logits, boxes)[0]

    def _labels(self, targets: list[dict]) -> list[dict]:
        return [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]


class OtherTree:
    """Another tree in a process of its own, which measures one call each time it is asked to."""

    def __init__(self, folder: str):
        if not (Path(folder) / "main.py").is_file():
            raise SystemExit(f"--peer {folder}: neither transformers nor a folder with a main.py in it")
        spawn = multiprocessing.get_context("spawn")
        self.folder, (self.pipe, theirs) = folder, spawn.Pipe()
        spawn.Process(target=serve, args=(str(Path(folder).resolve()), theirs), daemon=True).start()
        theirs.close()

    def ask(self, setting: dict | None = None) -> float:
        """Send a setting, which gives the peak memory of a call, or None, which gives the seconds of a call."""
        try:
            self.pipe.send(setting)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise SystemExit(f"{self.folder}: the benchmark failed there") from None


def serve(folder: str, pipe) -> None:
    """Answer OtherTree's questions until it is gone, with the modules of a folder."""
    from torchvision.models import resnet

    sys.path.insert(0, folder)
    build = resnet._resnet  # other trees ask for ImageNet weights: give them random ones
    resnet._resnet = lambda block, layers, weights, progress, **more: build(block, layers, None, progress, **more)
    measure = None
    with contextlib.suppress(EOFError):
        while True:
            setting = pipe.recv()
            if setting is None:
                pipe.send(measure())
            else:
                measure, peak = prepare(Detr, setting)
                pipe.send(peak)


def prepare(side, setting: dict) -> Clock:
    """Build the model that a setting describes on one side, and the call to be measured."""
    if isinstance(side, OtherTree):
        peak = side.ask(setting)
        return side.ask, peak
    torch.manual_seed(0)
    torch.set_num_threads(setting["threads"])
    one = side(setting)
    if setting["compiled"]:
        import engine

        torch._dynamo.reset()
        getattr(engine, "compile_network", torch.nn.Module.compile)(one.model)
    return clock(CALLS[setting["what"]](one, setting), setting)


def clock(call: Callable, setting: dict) -> Clock:
    """Warm a call up, and measure its memory; what it prints is dropped."""
    timer = Timer("call()", globals={"call": call}, num_threads=setting["threads"])
    with contextlib.redirect_stdout(io.StringIO()):
        call()
        before = reset_peak(setting["device"])
        call()
        peak = peak_memory(setting["device"]) - before

    def measure() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            return timer.timeit(1).mean

    return measure, peak


def reset_peak(device: str) -> float:
    """Forget the peak memory so far; return the gigabytes in use."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # freed memory that is kept would hide what a call needs
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device: str) -> float:
    """Return the peak in GB since `reset_peak`: PyTorch's on a GPU, the process's on a CPU (Linux only)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform != "linux":
        return float("nan")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def forward(one, setting: dict) -> Callable:
    """Return a function that runs the model in evaluation mode."""
    one.model.eval()
    inputs = one.inputs(noise(setting))

    def call():
        with torch.no_grad(), autocast(setting):
            one.model(**inputs)

    return call


def train(one, setting: dict) -> Callable:
    """Return a function that makes one training step: forward, losses, backward, clipping, AdamW."""
    one.model.train()
    inputs, targets = one.inputs(noise(setting)), random_targets(setting)
    optimizer = torch.optim.AdamW([p for p in one.model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def call():
        with autocast(setting):
            loss = one.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(one.model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    return call


def criterion(one, setting: dict) -> Callable:
    """Return a function that computes matching and losses of six layers of random outputs, forward and backward."""
    shape, targets = (6, setting["batch"], setting["queries"]), random_targets(setting)
    logits = torch.randn(*shape, CLASSES + 1, device=setting["device"], requires_grad=True)
    boxes = (torch.rand(*shape, 4, device=setting["device"]) * 0.5 + 0.2).requires_grad_()

    def call():
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
        one.loss_of({**layers[-1], "aux_outputs": layers[:-1]}, targets).backward()

    return call


def masks(one: Detr, setting: dict, all_queries: bool) -> Callable:
    """Return a function that trains the mask head: it draws the masks of matched queries, or first those of all."""
    images, targets = noise(setting), random_targets(setting)
    inputs = one.inputs(images)
    for image, target in zip(images, targets, strict=True):
        target["masks"] = torch.rand(OBJECTS, *image.shape[1:], device=setting["device"]) < 0.5

    def call():
        one.model.train().zero_grad()
        outputs = one.model(**inputs)
        if all_queries:
            every = torch.arange(setting["batch"] * setting["queries"], device=setting["device"])
            drawn = outputs["masks_of"](every // setting["queries"], every % setting["queries"])
            outputs["masks_of"] = lambda image, query: drawn[image * setting["queries"] + query]
        losses = one.criterion(outputs, targets)
        (losses["loss_mask"] + losses["loss_dice"]).backward()

    return call


def noise(setting: dict) -> list[Tensor]:
    """Make a batch of images [3, h, w] of random, normalised values."""
    return [torch.randn(3, *size) for size in itertools.islice(itertools.cycle(setting["size"]), setting["batch"])]


def random_targets(setting: dict) -> list[dict]:
    """Make objects of random classes and boxes for a batch."""
    shape, device = (setting["batch"], OBJECTS), setting["device"]
    boxes = torch.cat([0.3 + 0.4 * torch.rand(*shape, 2), 0.1 + 0.3 * torch.rand(*shape, 2)], 2).to(device)
    labels = torch.randint(1, CLASSES, shape).to(device)
    return [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]


def autocast(setting: dict) -> torch.autocast:
    """Return the context of a precision; TF32 is a global switch."""
    precision = setting["precision"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(torch.device(setting["device"]).type, dtype=AMP.get(precision), enabled=precision in AMP)


CALLS = {"forward": forward, "train": train, "criterion": criterion}
