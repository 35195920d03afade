"""Train the same steps in this project's way and in plain PyTorch, and compare the loss curves.

python -m tests.loss_curves curves.png --steps 200 --ways plain fast bf16 compiled --coco_path COCO --device cpu

Other flags are main.py's. Plain is torchvision's own ResNet on normalised floats, PyTorch's own attention module, every
layer's loss by itself and the optimizer parameter by parameter. Dropout is off in all: its random numbers would differ.
"""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from datasets import build_dataset
from engine import compile_network, train_one_epoch
from main import build_run, build_train_loader, get_args_parser
from models import backbone, build_model, resnet
from models.attention import Attention
from tests.helpers import loader_of
from util.nested_tensor import NestedTensor


class LossRecorder:
    """Stands in for `util.run.Run`: record the sum of the losses after each step."""

    batches_done, sums = 0, {}

    def __init__(self):
        self.totals = [0.0]

    def after_step(self, _, metrics) -> None:
        """Append the epoch's sum so far to that of the epochs before."""
        self.totals.append(self.before + metrics.sums()["loss"][0])


def curve(args: argparse.Namespace, way: str, steps: int) -> list[float]:
    """Return the losses of the first steps: plain, fast, bf16 or compiled."""
    torch.manual_seed(args.seed)
    train_set = build_dataset("train", args)
    args.num_classes = args.num_classes or train_set.num_classes
    model, criterion, _ = build_model(args)
    device, recorder = torch.device(args.device), LossRecorder()
    optimizer = build_run(args, model.to(device), loader_of(), train_set.class_names).optimizer
    batches = build_train_loader(train_set, args, device)
    if way == "plain":
        model.to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.AdamW(optimizer.param_groups, fused=False, foreach=False)
        criterion = OneByOne(criterion)
    if way == "compiled":
        torch._dynamo.reset()
        compile_network(model)
    with plainly() if way == "plain" else nullcontext():
        for epoch in range(math.ceil(steps / len(batches))):
            batches.dataset.set_epoch(epoch)
            batches.batch_sampler.set_epoch(epoch)
            loader = list(batches)[: steps - len(recorder.totals) + 1]
            if way == "plain":
                loader = [(normalised(samples), targets) for samples, targets in loader]
            recorder.before = recorder.totals[-1]
            train_one_epoch(
                model, criterion, loader, optimizer, device, epoch, args.clip_max_norm, print_freq=50,
                amp="bf16" if way == "bf16" else None, state=recorder,
            )  # fmt: skip
    return np.diff(recorder.totals).tolist()


@contextmanager
def plainly() -> Iterator[None]:
    """Use torchvision's and PyTorch's own forward passes."""

    def attention(self, query, key, value, key_padding_mask=None, need_weights=False, attn_mask=None):
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        return nn.MultiheadAttention.forward(self, query, key, value, need_weights=need_weights, **masks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet.FoldedBasicBlock, "forward", resnet.BasicBlock.forward)
        patch.setattr(resnet.FoldedBottleneck, "forward", resnet.Bottleneck.forward)
        patch.setattr(Attention, "forward", attention)
        yield


class OneByOne(nn.Module):
    """The criterion, given one decoder layer at a time."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion, self.weight_dict = criterion, criterion.weight_dict

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        """Losses of all layers, as SetCriterion names them."""
        losses = self.criterion({name: value for name, value in outputs.items() if name != "aux_outputs"}, targets)
        for i, layer in enumerate(outputs["aux_outputs"]):
            losses |= {f"{name}_{i}": value for name, value in self.criterion(layer, targets).items()}
        return losses


def normalised(samples: NestedTensor) -> NestedTensor:
    """Bytes -> floats with ImageNet's mean and deviation; padding is zero after that."""
    pixels, mask = samples.decompose()
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.PIXEL_MEAN, backbone.PIXEL_STD))
    return NestedTensor(((pixels.float() / 255 - mean) / std).masked_fill(mask[:, None], 0.0), mask)


def main() -> None:
    """Draw the curves, and print how far each is from the plain one."""
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[get_args_parser()], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ways", nargs="+", default=["plain", "fast", "bf16"])
    args = parser.parse_args()
    args.dropout = 0.0
    curves = {way: curve(args, way, args.steps) for way in args.ways}
    args.picture.with_suffix(".json").write_text(json.dumps(curves))
    for way, losses in curves.items():
        off = np.abs(np.array(losses) / curves[args.ways[0]] - 1)
        print(f"{way}: the last loss is {losses[-1]:.4f}; off by {off.mean():.2%} on average, {off.max():.2%} at most")
    draw(curves, args.picture)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, and below how far each is from the first."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    first, *_ = curves.values()
    for way, losses in curves.items():
        above.plot(losses, label=way, linewidth=1)
        below.plot(100 * (np.array(losses) / first - 1), linewidth=1)
    above.set(ylabel="loss")
    below.set(xlabel="step", ylabel=f"% off {next(iter(curves))}")
    above.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
