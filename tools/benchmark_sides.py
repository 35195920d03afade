"""The implementations that tools/benchmark.py compares, behind one face, and what they are fed."""

import argparse
import contextlib
import io
import sys

import torch
from torch import Tensor

CLASSES, OBJECTS = 91, 7  # COCO's, and its objects in an image on average


class Ours:
    """This tree's DETR, or another one with the same contract: built from the reference's flags."""

    def __init__(self, model: str, queries: int, device: str):
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

    def compile(self) -> None:
        """Compile the network as the tree does, where it has a way of its own."""
        import engine

        getattr(engine, "compile_network", torch.nn.Module.compile)(self.model)

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

    def __init__(self, model: str, queries: int, device: str):
        from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

        if model not in ("resnet50", "resnet101"):
            raise SystemExit(f"--peer transformers: no {model} there; choose resnet50 or resnet101")
        depths = [3, 4, 6, 3] if model == "resnet50" else [3, 4, 23, 3]
        config = DetrConfig(
            backbone_config=ResNetConfig(depths=depths, out_features=["stage4"]),
            num_queries=queries, num_labels=CLASSES, auxiliary_loss=True,
            attention_dropout=0.1, activation_dropout=0.1,  # as the paper's; 0 by default there
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
