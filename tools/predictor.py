"""A checkpoint becomes something that finds objects in a picture, and draws them.

from tools.predictor import Predictor
predictor = Predictor.from_checkpoint("runs/shapes/checkpoint_best.pth")
predictor("photo.jpg").draw().save("found.png")
"""

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import hubconf
from datasets.coco_names import COCO_NAMES
from datasets.images import read_image, to_rgb
from datasets.transforms import resize
from engine import autocast
from main import get_args_parser
from models import build_model
from models.detr import PostProcess
from models.segmentation import PostProcessSegm
from util.checkpoint import count_classes, load_checkpoint, load_model
from util.dist import pick_device
from util.draw import class_colour, draw_boxes, draw_masks, draw_segments, fit

HUB_NAMES = [name for name in vars(hubconf) if name.startswith("detr_")]
COCO_CLASSES = (91, 250)  # sizes of the class head in the published models: things, and things with stuff
SMALL = 480  # pictures are enlarged to so many pixels before they are drawn on


@dataclass
class Found:
    """What was found in an image [3, H, W], the best first; boxes are x0 y0 x1 y1 in its pixels.

    `masks` bool [N, H, W] are those of a mask model. `segment_ids` [H, W], 0 = nothing, and `segments` (COCO's
    `segments_info`) are those of a panoptic one; else None.
    """

    image: Tensor
    scores: Tensor  # [N]
    labels: Tensor  # [N]
    boxes: Tensor  # [N, 4]
    class_names: dict[int, str]
    masks: Tensor | None = None
    segment_ids: np.ndarray | None = None
    segments: list[dict] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def name(self, label: int) -> str:
        """Name of a class, or its number where the name is not known."""
        return self.class_names.get(label, f"class {label}")

    @property
    def kinds(self) -> list[str]:
        """What can be drawn, the richest last."""
        return ["boxes"] + ["masks"] * (self.masks is not None) + ["panoptic"] * (self.segments is not None)

    def draw(self, kind: str | None = None) -> Image.Image:
        """Draw it: "boxes", "masks" (and boxes) or "panoptic"; by default the richest there is."""
        kind = kind or self.kinds[-1]
        if kind not in self.kinds:
            raise ValueError(f"this model finds no {kind}: choose from {', '.join(self.kinds)}")
        picture = Image.fromarray(self.image.permute(1, 2, 0).cpu().numpy())
        if kind == "panoptic":
            ids = [segment["id"] for segment in self.segments]
            names = [self.name(segment["category_id"]) for segment in self.segments]
            colours = [class_colour(s["category_id"], i if s["isthing"] else 0) for i, s in enumerate(self.segments)]
            picture, _ = fit(picture, max(SMALL, *picture.size))
            nearest = Image.fromarray(self.segment_ids.astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST)
            return draw_segments(picture, np.array(nearest), ids, names, colours)
        labels = self.labels.tolist()
        colours = [class_colour(label) for label in labels]
        if kind == "masks":
            picture = draw_masks(picture, self.masks.cpu().numpy(), colours)
        picture, factor = fit(picture, max(SMALL, *picture.size))
        captions = [f"{self.name(c)} {s:.2f}" for c, s in zip(labels, self.scores.tolist(), strict=True)]
        return draw_boxes(picture, (self.boxes * factor).tolist(), captions, colours)


class Predictor:
    """A model and its read-outs, called with one image, or with `many`.

    `postprocessors` are build_model's. Images are resized as in evaluation: shortest side `min_size`, longest at most
    `max_size`.
    """

    def __init__(
        self,
        model: nn.Module,
        postprocessors: dict[str, nn.Module],
        class_names: dict[int, str],
        min_size: int = 800,
        max_size: int = 1333,
        device: str = "cuda",
    ):
        self.device = pick_device(device)
        self.model, self.postprocessors = model.to(self.device).eval(), postprocessors
        self.class_names, self.min_size, self.max_size = class_names, min_size, max_size
        self.amp: str | None = None

    def faster(self, compile: str | None = None, amp: str | None = None) -> "Predictor":
        """Compile the network, which pays from some dozens of images on, or run it in half precision (bf16, fp16).

        `compile` is "any", one graph for images of all sizes, or "fixed", a graph for each size that comes, recorded
        as a CUDA graph on a GPU: for images (and batches) of one or few sizes.
        """
        if compile == "any":
            self.model.compile(dynamic=True)
        elif compile == "fixed":
            self.model.compile(dynamic=False, mode="reduce-overhead")
        self.amp = amp
        return self

    @classmethod
    def from_checkpoint(
        cls, path_or_url: str | Path, device: str = "cuda", class_names: dict[int, str] | None = None
    ) -> "Predictor":
        """Rebuild the model a checkpoint describes; `class_names` take precedence over its own.

        Raises FileNotFoundError, or ValueError for a file that cannot be read, or does not say its architecture.
        """
        name, state = str(path_or_url), load_checkpoint(path_or_url)
        if not state.get("args"):
            raise ValueError(
                f"{name} does not say its architecture (no 'args' in it): name it, one of {', '.join(HUB_NAMES)} "
                "(--model, or Predictor.from_hub)"
            )
        given = state["args"] if isinstance(state["args"], dict) else vars(state["args"])
        defaults = vars(argparse.ArgumentParser(parents=[get_args_parser()]).parse_args([]))
        classes = needed_classes(state, name)
        here = {"backbone_weights": "none", "device": "cpu", "num_classes": classes}
        args = argparse.Namespace(**{**defaults, **given, **here})
        model, _, postprocessors = build_model(args)
        load_model(model, state, name)
        names = class_names or state.get("class_names") or (COCO_NAMES if classes in COCO_CLASSES else {})
        return cls(model, postprocessors, names, args.min_size, args.max_size, device)

    @classmethod
    def from_hub(
        cls, name: str, file: str | Path | None = None, device: str = "cuda", class_names: dict[int, str] | None = None
    ) -> "Predictor":
        """Build a published model by its name in hubconf, with the published weights or those of a local `file`."""
        if name not in HUB_NAMES:
            raise ValueError(f"no model {name!r}: choose one of {', '.join(HUB_NAMES)}")
        classes = needed_classes(load_checkpoint(file), str(file)) if file else (250 if "panoptic" in name else 91)
        entry = getattr(hubconf, name)
        model, read_out = entry(pretrained=file or True, num_classes=classes, return_postprocessor=True)
        postprocessors = {"bbox": read_out}
        if "panoptic" in name:
            postprocessors = {"bbox": PostProcess(), "segm": PostProcessSegm(), "panoptic": read_out}
        names = class_names or (COCO_NAMES if classes in COCO_CLASSES else {})
        return cls(model, postprocessors, names, device=device)

    def __call__(self, image: str | Path | Image.Image | Tensor, threshold: float | None = None) -> Found:
        """Find the objects of a file, a PIL image or a uint8 tensor [3, H, W].

        Objects score at least `threshold` (0.5); segments of a panoptic map more than it (its own, 0.85).
        """
        return self.many([image], threshold)[0]

    @torch.no_grad()
    def many(self, images: Sequence[str | Path | Image.Image | Tensor], threshold: float | None = None) -> list[Found]:
        """Find the objects of several images in one pass of the network; images of like sizes waste less padding."""
        if not images:
            return []
        images = [as_tensor(image) for image in images]
        resized = [resize(image, None, self.min_size, self.max_size)[0] for image in images]
        with autocast(self.device, self.amp):
            outputs = self.model([image.to(self.device) for image in resized])
        sizes, inner = (torch.tensor([image.shape[-2:] for image in group]) for group in (images, resized))

        results, kept = [], []
        for result in self.postprocessors["bbox"](outputs, sizes):
            order = result["scores"].argsort(descending=True)
            kept.append(order[result["scores"][order] >= (0.5 if threshold is None else threshold)])
            results.append({name: value[kept[-1]] for name, value in result.items()})
        if "segm" in self.postprocessors:  # masks at full size are large: only those wanted are drawn
            some = {"pred_masks": [masks[keep] for masks, keep in zip(outputs["pred_masks"], kept, strict=True)]}
            results = self.postprocessors["segm"](results, some, sizes, inner)
            for result in results:
                result["masks"] = result["masks"][:, 0].bool()
        found = [
            Found(image, **{name: value.cpu() for name, value in result.items()}, class_names=self.class_names)
            for image, result in zip(images, results, strict=True)
        ]
        if "panoptic" in self.postprocessors:
            self._read_panoptic(found, outputs, inner, sizes, threshold)
        return found

    def _read_panoptic(
        self, found: list[Found], outputs: dict, inner: Tensor, sizes: Tensor, threshold: float | None
    ) -> None:
        read_out = self.postprocessors["panoptic"]
        own = read_out.threshold
        read_out.threshold = own if threshold is None else threshold
        answers = read_out(outputs, inner, sizes, padded_size=tuple(inner.max(0).values.tolist()), first_id=1)
        read_out.threshold = own
        for each, answer in zip(found, answers, strict=True):
            with Image.open(io.BytesIO(answer["png_string"])) as file:
                rgb = np.array(file, np.int64)
            each.segment_ids = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
            each.segments = answer["segments_info"]


def as_tensor(image: str | Path | Image.Image | Tensor) -> Tensor:
    """Read a file, or take a PIL image or a tensor: uint8 RGB [3, H, W]."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    return image if isinstance(image, Tensor) else read_image(image)


def needed_classes(state: dict, name: str) -> int:
    """Read K off the class head of a checkpoint. ValueError if it has none, so is of another architecture."""
    classes = count_classes(state["model"])
    if classes is None:
        raise ValueError(f"{name}: no class head 'class_embed' in it; it is of another architecture than DETR")
    return classes
