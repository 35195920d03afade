"""Detect objects in images with a trained model, and draw them.

from tools.predictor import Predictor
predictor = Predictor.from_checkpoint("runs/shapes/checkpoint_best.pth")
predictor("photo.jpg").draw().save("found.png")
"""

import io
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import hubconf
from datasets.coco_names import COCO_NAMES
from datasets.images import read_image, to_rgb
from datasets.masks import read_segment_ids
from datasets.transforms import resize
from models.attention_maps import record_attention
from models.detr import PostProcess
from models.segmentation import PostProcessSegm
from models.weights import build_described
from tools.draw import class_colour, class_name, draw_boxes, draw_masks, draw_panoptic, fit, to_pil
from tools.draw_attention import Attention, Point, draw_attention, outside, read_attention
from util.checkpoint import count_classes, load_checkpoint
from util.dist import pick_device
from util.flags import NEW_FLAGS, with_defaults
from util.origin import saved_flags

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HUB_NAMES = [name for name in vars(hubconf) if name.startswith("detr_")]
COCO_CLASSES = (91, 250)  # classes of the published models: of things, and of things and stuff
SMALL = 480  # pixels; smaller images are enlarged to this size before drawing
ImageLike = str | Path | Image.Image | Tensor | np.ndarray


@dataclass
class Detections:
    """The objects detected in one image [3, H, W], by descending score; boxes are x0 y0 x1 y1 in its pixels.

    Mask models give `masks`, bool [N, H, W]. Panoptic models give `panoptic_png`, an encoded map of segment ids in
    COCO's format (0: no segment), and `segments`, COCO's `segments_info`. A Predictor with `attention` gives the
    weights of its last layers. Otherwise these are None.
    """

    image: Tensor
    scores: Tensor  # [N]
    labels: Tensor  # [N]
    boxes: Tensor  # [N, 4]
    class_names: dict[int, str]
    masks: Tensor | None = None
    panoptic_png: bytes | None = None
    segments: list[dict] | None = None
    attention: Attention | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def is_finite(self) -> bool:
        """Return whether all numbers are finite; a model that diverged, or overflows in float16, gives others."""
        return bool(self.boxes.isfinite().all() and self.scores.isfinite().all())

    def name(self, label: int) -> str:
        """Return the name of a class, or its number where the name is unknown."""
        return class_name(self.class_names, label)

    @property
    def segment_ids(self) -> np.ndarray | None:
        """The panoptic map: ids [H, W], 0 where there is no segment."""
        return None if self.panoptic_png is None else read_segment_ids(io.BytesIO(self.panoptic_png))

    @property
    def kinds(self) -> list[str]:
        """The kinds of drawing that are possible: "attention", "boxes", "masks", "panoptic"."""
        possible = {
            "attention": self.attention,
            "boxes": self.boxes,
            "masks": self.masks,
            "panoptic": self.segments,
        }
        return [kind for kind, data in possible.items() if data is not None]

    def draw(self, kind: str | None = None, points: Sequence[Point] = ()) -> Image.Image:
        """Draw "boxes", "masks" (with boxes) or "panoptic" segments; by default the last of `kinds`.

        "attention" draws a panel for each object, and one for each of `points` (x, y in pixels).
        """
        kind = kind or self.kinds[-1]
        if kind == "attention" and self.attention is None:
            raise ValueError("no attention was recorded: set `attention = True` on the Predictor before it predicts")
        if kind not in self.kinds:
            raise ValueError(f"this model gives no {kind}: choose from {', '.join(self.kinds)}")
        if kind == "attention" and (wrong := outside(points, self.image)):
            raise ValueError(f"points {wrong} lie outside the image of {list(self.image.shape[:0:-1])} pixels")
        picture = to_pil(self.image)
        labels = self.labels.tolist()
        colours = [class_colour(label) for label in labels]
        if kind == "masks":
            picture = draw_masks(picture, self.masks.cpu().numpy(), colours)
        picture, factor = fit(picture, max(SMALL, *picture.size))
        if kind == "panoptic":
            return draw_panoptic(picture, self.segment_ids, self.segments, self.class_names)
        captions = [f"{self.name(c)} {s:.2f}" for c, s in zip(labels, self.scores.tolist(), strict=True)]
        if kind == "attention":
            return draw_attention(to_pil(self.image), self.attention, self.boxes, captions, colours, points)
        return draw_boxes(picture, (self.boxes * factor).tolist(), captions, colours)


class Predictor:
    """A model with its post-processing; call it with one image, or `predict_batch` with several.

    `postprocessors` are those that `build_model` returns. Images are resized as in evaluation: shortest side
    `min_size`, longest side at most `max_size`. `amp` ("bf16", "fp16" or None) runs the network in half precision.
    With `attention`, detections have the attention weights of the last layers.
    """

    def __init__(
        self,
        model: nn.Module,
        postprocessors: dict[str, nn.Module],
        class_names: dict[int, str],
        min_size: int = 800,
        max_size: int = 1333,
        device: str = "cuda",
        amp: str | None = None,
    ):
        if min_size < 1 or max_size < min_size:
            raise ValueError(f"min_size {min_size}, max_size {max_size}: at least 1, and max_size not below min_size")
        self.device = pick_device(device)
        self.model, self.postprocessors = model.to(self.device).eval(), postprocessors
        self.class_names, self.min_size, self.max_size = class_names, min_size, max_size
        self.amp = amp
        self.attention = False

    @classmethod
    def from_checkpoint(
        cls, path_or_url: str | Path, device: str = "cuda", class_names: dict[int, str] | None = None
    ) -> "Predictor":
        """Build the model that a checkpoint describes; `class_names` take precedence over the checkpoint's own.

        Raises FileNotFoundError, or ValueError for a file that cannot be read or does not name its architecture.
        """
        name, state = str(path_or_url), load_checkpoint(path_or_url)
        if not saved_flags(state):
            raise ValueError(
                f"{name} does not say its architecture (no 'args' in it): name it, one of {', '.join(HUB_NAMES)} "
                "(--model, or Predictor.from_hub)"
            )
        model, postprocessors, args = build_described(state, name)
        names = class_names or state.get("class_names") or _default_names(args.num_classes)
        args = with_defaults(args, NEW_FLAGS)
        return cls(model, postprocessors, names, args.min_size, args.max_size, device)

    @classmethod
    def from_hub(
        cls, name: str, file: str | Path | None = None, device: str = "cuda", class_names: dict[int, str] | None = None
    ) -> "Predictor":
        """Build a published model by its name in hubconf, with the published weights or those of a local `file`."""
        if name not in HUB_NAMES:
            raise ValueError(f"no model {name!r}: choose one of {', '.join(HUB_NAMES)}")
        classes = _class_count(load_checkpoint(file), str(file)) if file else (250 if "panoptic" in name else 91)
        entry = getattr(hubconf, name)
        model, postprocessor = entry(pretrained=file or True, num_classes=classes, return_postprocessor=True)
        postprocessors = {"bbox": postprocessor}
        if "panoptic" in name:
            postprocessors = {"bbox": PostProcess(), "segm": PostProcessSegm(), "panoptic": postprocessor}
        return cls(model, postprocessors, class_names or _default_names(classes), device=device)

    def compile(self, sizes: str = "any") -> None:
        """Compile the network, which pays off for more than a few dozen images.

        `sizes` is "any" for one graph for images of all sizes, or "fixed" for one graph per size (a CUDA graph on a
        GPU), for images and batches of few different sizes.
        """
        if sizes == "fixed":
            self.model.compile(dynamic=False, mode="reduce-overhead")
        else:
            self.model.compile(dynamic=True)

    def __call__(self, image: ImageLike, threshold: float | None = None) -> Detections:
        """Detect the objects of one image: a path, a PIL image, uint8 [3, H, W] or a uint8 array [H, W, 3].

        Objects with a score of at least `threshold` (default 0.5) are returned, and panoptic segments
        with a score above `threshold` (default 0.85).
        """
        return self.predict_batch([image], threshold)[0]

    @torch.no_grad()
    def predict_batch(self, images: Sequence[ImageLike], threshold: float | None = None) -> list[Detections]:
        """Detect the objects of several images in one forward pass; images of similar sizes need less padding."""
        if not images:
            return []
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold}: a score between 0 and 1")
        images = [as_tensor(image) for image in images]
        resized = [resize(image, None, self.min_size, self.max_size)[0] for image in images]
        with torch.autocast(self.device.type, dtype=AMP_TYPES.get(self.amp), enabled=self.amp is not None):
            inputs = [image.to(self.device) for image in resized]
            with record_attention(self.model, [-1]) if self.attention else nullcontext() as maps:
                outputs = self.model(inputs)
        sizes, input_sizes = (torch.tensor([image.shape[-2:] for image in group]) for group in (images, resized))

        results, kept = [], []
        for result in self.postprocessors["bbox"](outputs, sizes):
            order = result["scores"].argsort(descending=True)
            keep = order[~(result["scores"][order] < (0.5 if threshold is None else threshold))]  # NaN is kept
            kept.append(keep)
            results.append({name: value[keep] for name, value in result.items()})
        if "segm" in self.postprocessors:  # full-size masks are large, so only those of kept queries are computed
            selected = {"pred_masks": [masks[keep] for masks, keep in zip(outputs["pred_masks"], kept, strict=True)]}
            results = self.postprocessors["segm"](results, selected, sizes, input_sizes)
            for result in results:
                result["masks"] = result["masks"][:, 0].bool()
        detections = [
            Detections(image, **{name: value.cpu() for name, value in result.items()}, class_names=self.class_names)
            for image, result in zip(images, results, strict=True)
        ]
        if maps:
            for i, covered in enumerate((input_sizes / input_sizes.max(0).values).tolist()):
                detections[i].attention = read_attention(maps, i, kept[i], tuple(covered))
        if "panoptic" in self.postprocessors:
            answers = self._panoptic(outputs, input_sizes, sizes, threshold)
            for each, answer in zip(detections, answers, strict=True):
                each.panoptic_png, each.segments = answer["png_string"], answer["segments_info"]
        return detections

    def _panoptic(self, outputs: dict, input_sizes: Tensor, sizes: Tensor, threshold: float | None) -> list[dict]:
        """Compute the panoptic maps, with another threshold than the post-processor's own if one is given."""
        postprocessor: Any = self.postprocessors["panoptic"]
        own = postprocessor.threshold
        postprocessor.threshold = own if threshold is None else threshold
        padded_size = tuple(input_sizes.max(0).values.tolist())
        maps = postprocessor(outputs, input_sizes, sizes, padded_size=padded_size, first_id=1)
        postprocessor.threshold = own
        return maps


def as_tensor(image: ImageLike) -> Tensor:
    """Return an image as uint8 RGB [3, H, W].

    Takes a path, a PIL image, a uint8 tensor [3, H, W], or a uint8 array [H, W, 3] (RGB) or [H, W] (grey). Raises
    ValueError for other shapes and types.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)):
            raise ValueError(f"an array of {image.dtype} {list(image.shape)}: expected uint8 [H, W, 3] or [H, W]")
        image = Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ValueError(f"a tensor of {image.dtype} {list(image.shape)}: expected uint8 [3, H, W]")
        return image
    return read_image(image)


def _class_count(state: dict, name: str) -> int:
    """Return the number of classes of a checkpoint's class head; ValueError if it has none."""
    classes = count_classes(state["model"])
    if classes is None:
        raise ValueError(f"{name}: no class head 'class_embed' in it; its architecture is not DETR")
    return classes


def _default_names(classes: int) -> dict[int, str]:
    return COCO_NAMES if classes in COCO_CLASSES else {}
