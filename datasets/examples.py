"""A picture of the first images of an evaluation: annotated objects above, detections below."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import resize
from torchvision.utils import draw_bounding_boxes, save_image

from datasets.coco import MEAN, STD
from util.dist import is_main_process
from util.logger import logger
from util.text import printable

COUNT = 4
WIDTH = 400  # pixels of an image in the picture
SHOWN = 0.5  # score from which a detection is drawn


class ExamplePictures:
    """An evaluator (see datasets/evaluators.py) that writes a picture, and gives no numbers."""

    def __init__(self, file: Path, names: dict[int, str]):
        self.file, self.names = file, names
        self.columns: list[Tensor] = []

    def update(self, predictions: dict[int, dict[str, Tensor]], batch) -> None:
        """Draw the images of a batch, until there are enough."""
        images = batch.samples.tensors
        for i, (image_id, target) in enumerate(zip(batch.image_ids, batch.targets, strict=True)):
            if len(self.columns) == COUNT or not is_main_process():
                return
            height, width = (int(side) for side in target["size"])
            pixels = images[i, :, :height, :width].cpu()
            if pixels.is_floating_point():
                mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
                pixels = ((pixels.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            self.columns.append(self._column(pixels, target, predictions[image_id]))

    def _column(self, pixels: Tensor, target: dict, result: dict[str, Tensor]) -> Tensor:
        height = max(round(WIDTH * pixels.shape[1] / pixels.shape[2]), 1)
        pixels = resize(pixels, [height, WIDTH])
        scale = torch.tensor([WIDTH, height, WIDTH, height])
        truth = box_convert(target["boxes"].cpu().float(), "cxcywh", "xyxy") * scale
        shown = result["scores"].cpu() > SHOWN
        full_height, full_width = target["orig_size"].tolist()
        found = result["boxes"][shown.to(result["boxes"].device)].cpu().float() * scale
        found /= torch.tensor([full_width, full_height, full_width, full_height])
        labels, scores = result["labels"].cpu()[shown].tolist(), result["scores"].cpu()[shown].tolist()
        captions = [f"{self._name(label)} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        annotated = _draw(pixels, truth, [self._name(label) for label in target["labels"].tolist()], "lime")
        return torch.cat([annotated, _draw(pixels, found, captions, "yellow")], dim=1)

    def _name(self, label: int) -> str:
        return printable(self.names.get(label, label))

    def synchronize_between_processes(self) -> None:
        """Do nothing: the main process has images of its own."""

    def accumulate(self) -> None:
        """Do nothing: the pictures are drawn."""

    def summarize(self) -> dict:
        """Write the file."""
        if self.columns:
            height = max(column.shape[1] for column in self.columns)
            columns = [pad(column, (0, 4, 0, height - column.shape[1]), value=255) for column in self.columns]
            try:
                save_image(torch.cat(columns, dim=2) / 255, self.file)
            except OSError as error:  # a picture must not end a training
                logger.warning(f"{self.file} could not be written: {error}")
        return {}


def _draw(pixels: Tensor, boxes: Tensor, captions: list[str], colour: str) -> Tensor:
    low = torch.minimum(boxes[:, :2], boxes[:, 2:])  # torchvision refuses boxes with corners in another order
    boxes = torch.cat([low, torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
    return draw_bounding_boxes(pixels, boxes, captions, colors=colour, width=2) if len(boxes) else pixels
