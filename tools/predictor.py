"""A checkpoint becomes something that finds objects in a picture, and draws them.

from tools.predictor import Predictor
predictor = Predictor.from_checkpoint("runs/shapes/checkpoint_best.pth")
predictor("photo.jpg").draw().save("found.png")
"""

import argparse
import io
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
from util.checkpoint import load_checkpoint, load_model
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
    """A model and its read-outs, called with one image at a time.

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

    def faster(self, compile: bool = False, amp: str | None = None) -> "Predictor":
        """Compile the network, which pays from some dozens of images on, or run it in half precision (bf16, fp16)."""
        if compile:
            self.model.compile(dynamic=True)  # one graph for images of all sizes
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
        classes = count_classes(state, name)
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
        classes = count_classes(load_checkpoint(file), str(file)) if file else (250 if "panoptic" in name else 91)
        entry = getattr(hubconf, name)
        model, read_out = entry(pretrained=file or True, num_classes=classes, return_postprocessor=True)
        postprocessors = {"bbox": read_out}
        if "panoptic" in name:
            postprocessors = {"bbox": PostProcess(), "segm": PostProcessSegm(), "panoptic": read_out}
        names = class_names or (COCO_NAMES if classes in COCO_CLASSES else {})
        return cls(model, postprocessors, names, device=device)

    @torch.no_grad()
    def __call__(self, image: str | Path | Image.Image | Tensor, threshold: float | None = None) -> Found:
        """Find the objects of a file, a PIL image or a uint8 tensor [3, H, W].

        Objects score at least `threshold` (0.5); segments of a panoptic map more than it (its own, 0.85).
        """
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
        elif not isinstance(image, Tensor):
            image = read_image(image)
        height, width = image.shape[-2:]
        resized, _ = resize(image, None, self.min_size, self.max_size)
        with autocast(self.device, self.amp):
            outputs = self.model([resized.to(self.device)])
        sizes, inner = torch.tensor([[height, width]]), torch.tensor([resized.shape[-2:]])

        result = self.postprocessors["bbox"](outputs, sizes)[0]
        order = result["scores"].argsort(descending=True)
        keep = order[result["scores"][order] >= (0.5 if threshold is None else threshold)]
        result = {name: value[keep] for name, value in result.items()}
        if "segm" in self.postprocessors:
            result["masks"] = torch.zeros((0, height, width), dtype=torch.bool)
            if len(keep):  # masks at full size are large: only those wanted are drawn
                some = {"pred_masks": outputs["pred_masks"][:, keep]}
                masks = self.postprocessors["segm"]([result], some, sizes, inner)[0]["masks"]
                result["masks"] = masks[:, 0].bool()
        found = Found(image, **{k: v.cpu() for k, v in result.items()}, class_names=self.class_names)
        if "panoptic" in self.postprocessors:
            self._read_panoptic(found, outputs, inner, sizes, threshold)
        return found

    def _read_panoptic(self, found: Found, outputs: dict, inner: Tensor, sizes: Tensor, threshold: float | None):
        read_out = self.postprocessors["panoptic"]
        own = read_out.threshold
        read_out.threshold = own if threshold is None else threshold
        (answer,) = read_out(outputs, inner, sizes, first_id=1)
        read_out.threshold = own
        with Image.open(io.BytesIO(answer["png_string"])) as file:
            rgb = np.array(file, np.int64)
        found.segment_ids = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
        found.segments = answer["segments_info"]


def count_classes(state: dict, name: str) -> int:
    """Read K off the class head of a checkpoint. ValueError if it has none, so is of another architecture."""
    heads = [value for key, value in state["model"].items() if key.endswith("class_embed.bias")]
    if len(heads) != 1:
        raise ValueError(f"{name}: no class head 'class_embed' in it; it is of another architecture than DETR")
    return len(heads[0]) - 1
