"""Transforms of an image together with its target.

Every transform takes and returns (image, target): a PIL image or a tensor [C, H, W] (uint8 is fastest), and a dict as
in datasets/coco.py, or None. Boxes are (x0, y0, x1, y1) in pixels until RelativeBoxes or Normalize. The caller's target
is not changed. Random transforms draw from Python's `random`: seeding it makes them repeatable.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torchvision.transforms as tv
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from util.box_ops import box_xyxy_to_cxcywh

Picture = Image.Image | Tensor
Pair = tuple[Picture, dict | None]
PER_OBJECT = ("boxes", "labels", "area", "iscrowd", "masks")  # entries with one row for each object


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Make random draws inside the block a function of `key`; restore the generators' states afterwards."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed("/".join(map(str, key)))
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


def crop(image: Picture, target: dict | None, region: tuple[int, int, int, int]) -> Pair:
    """Cut out `region` = (top, left, height, width); objects that end up without area are dropped."""
    top, left, height, width = region
    image = F.crop(image, top, left, height, width)
    if target is None:
        return image, None
    target = {**target, "size": torch.tensor([height, width])}
    keep = None
    if "masks" in target:
        target["masks"] = target["masks"][:, top : top + height, left : left + width]
        keep = target["masks"].flatten(1).any(1)
    if "boxes" in target:
        corners = target["boxes"].reshape(-1, 2, 2) - torch.tensor([left, top])
        corners = torch.minimum(corners, torch.tensor([width, height])).clamp(min=0)
        sides = corners[:, 1] - corners[:, 0]
        target["boxes"], target["area"] = corners.reshape(-1, 4), sides.prod(1)
        keep = (sides > 0).all(1)
    if keep is not None:
        target |= {name: target[name][keep] for name in PER_OBJECT if name in target}
    return image, target


def hflip(image: Picture, target: dict | None) -> Pair:
    """Mirror left and right."""
    width = F.get_size(image)[1]
    image = F.horizontal_flip(image)
    if target is None:
        return image, None
    target = dict(target)
    if "boxes" in target:
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return image, target


def resized_size(height: int, width: int, size: int, max_size: int | None = None) -> tuple[int, int]:
    """Return (height, width) by DETR's resize rule.

    The shorter side becomes `size`, or less where the longer side would exceed `max_size` by more than rounding.
    Fractions of the longer side are cut off. An image whose shorter side has its final length is not resized.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
    if short == size:
        return height, width
    other = int(size * long / short)
    if max_size is not None and size < 1:  # so thin that the rule would leave no pixel
        size, other = 1, max_size
    return (size, other) if height <= width else (other, size)


def resize(image: Picture, target: dict | None, size: int | Sequence[int], max_size: int | None = None) -> Pair:
    """Resize to a (width, height), or so that the shorter side is `size` and the longer at most about `max_size`."""
    height, width = F.get_size(image)
    new_height, new_width = (
        size[::-1] if isinstance(size, (list, tuple)) else resized_size(height, width, size, max_size)
    )
    image = F.resize(image, [new_height, new_width], antialias=True)
    if target is None:
        return image, None
    target = {**target, "size": torch.tensor([new_height, new_width])}
    ratio = torch.tensor([new_width / width, new_height / height])
    if "boxes" in target:
        target["boxes"] = target["boxes"] * ratio.repeat(2)
    if "area" in target:
        target["area"] = target["area"] * ratio.prod()
    if "masks" in target:
        masks = target["masks"]
        nearest = interpolate(masks[:, None].float(), (new_height, new_width), mode="nearest")
        target["masks"] = nearest[:, 0] > 0.5
    return image, target


def pad(image: Picture, target: dict | None, padding: tuple[int, int]) -> Pair:
    """Add `padding` = (columns, rows) of zeros at the right and the bottom."""
    columns, rows = padding
    image = F.pad(image, [0, 0, columns, rows])
    if target is None:
        return image, None
    target = {**target, "size": torch.tensor(F.get_size(image))}
    if "masks" in target:
        target["masks"] = torch.nn.functional.pad(target["masks"], (0, columns, 0, rows))
    return image, target


class Compose:
    """Apply transforms one after another."""

    def __init__(self, transforms: Sequence[Callable]):
        self.transforms = transforms

    def __call__(self, image: Picture, target: dict | None) -> Pair:
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target

    def __repr__(self) -> str:
        return "\n    ".join(["Compose(", *map(str, self.transforms)]) + "\n)"


class RandomHorizontalFlip:
    """Mirror with probability p."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def __call__(self, img: Picture, target: dict | None) -> Pair:
        return hflip(img, target) if random.random() < self.p else (img, target)


class RandomResize:
    """Resize to one of `sizes`, as `resize` does."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None):
        self.sizes, self.max_size = list(sizes), max_size

    def __call__(self, img: Picture, target: dict | None = None) -> Pair:
        return resize(img, target, random.choice(self.sizes), self.max_size)


class RandomCrop:
    """Crop a region of fixed (height, width) at a random place."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, img: Picture, target: dict | None) -> Pair:
        return _crop_somewhere(img, target, *self.size)


class RandomSizeCrop:
    """Crop a region whose sides are drawn from min_size..max_size (at most the image's), at a random place."""

    def __init__(self, min_size: int, max_size: int):
        self.min_size, self.max_size = min_size, max_size

    def __call__(self, img: Picture, target: dict | None) -> Pair:
        height, width = (random.randint(min(self.min_size, side), min(self.max_size, side)) for side in F.get_size(img))
        return _crop_somewhere(img, target, height, width)


class CenterCrop:
    """Crop a region of (height, width) from the middle."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, img: Picture, target: dict | None) -> Pair:
        (height, width), (h, w) = F.get_size(img), self.size
        _check_room(height, width, h, w)
        return crop(img, target, (round((height - h) / 2), round((width - w) / 2), h, w))


class RandomPad:
    """Pad the right and the bottom by up to `max_pad` pixels each."""

    def __init__(self, max_pad: int):
        self.max_pad = max_pad

    def __call__(self, img: Picture, target: dict | None) -> Pair:
        return pad(img, target, (random.randint(0, self.max_pad), random.randint(0, self.max_pad)))


class RandomResizedCrop:
    """With probability p, crop a region whose sides are `least`..1 of the image's; then resize.

    A crop gets the size that `resize` gives the whole image, so all images of one shape have one size.
    """

    def __init__(self, least: float, size: int, max_size: int | None = None, p: float = 0.5):
        self.least, self.size, self.max_size, self.p = least, size, max_size, p

    def __call__(self, img: Picture, target: dict | None) -> Pair:
        sides = F.get_size(img)
        new_height, new_width = resized_size(*sides, self.size, self.max_size)
        if random.random() < self.p:
            img, target = _crop_somewhere(img, target, *(round(s * random.uniform(self.least, 1)) or 1 for s in sides))
        return resize(img, target, (new_width, new_height))


class RandomSelect:
    """Apply the first transform with probability p, else the second."""

    def __init__(self, transforms1: Callable, transforms2: Callable, p: float = 0.5):
        self.transforms1, self.transforms2, self.p = transforms1, transforms2, p

    def __call__(self, img: Picture, target: dict | None) -> Pair:
        return self.transforms1(img, target) if random.random() < self.p else self.transforms2(img, target)


class RandomColours:
    """Change brightness, contrast, saturation and hue of a uint8 tensor (torchvision's RandomPhotometricDistort)."""

    def __init__(self):
        self.distort = tv.v2.RandomPhotometricDistort()

    def __call__(self, img: Tensor, target: dict | None) -> Pair:
        return self.distort(img), target


class RandomErasing:
    """Erase a random rectangle of a tensor image (torchvision's RandomErasing, its arguments); boxes are unchanged."""

    def __init__(self, *args, **kwargs):
        self.eraser = tv.RandomErasing(*args, **kwargs)

    def __call__(self, img: Tensor, target: dict | None) -> Pair:
        return self.eraser(img), target


class ToTensor:
    """Convert a PIL image or uint8 tensor to a float tensor in 0..1, as torchvision's `to_tensor` does."""

    def __call__(self, img: Picture, target: dict | None) -> Pair:
        return img.float() / 255 if isinstance(img, Tensor) else tv.functional.to_tensor(img), target


class PILToTensor:
    """Convert a PIL image to a uint8 tensor; tensors are returned as they are."""

    def __call__(self, image: Picture, target: dict | None) -> Pair:
        return image if isinstance(image, Tensor) else F.pil_to_tensor(image), target


class RelativeBoxes:
    """Convert boxes from pixels, x0 y0 x1 y1, to (cx, cy, w, h) in 0..1 of the image, which model and loss use."""

    def __call__(self, image: Picture, target: dict | None) -> Pair:
        if target is None or "boxes" not in target:
            return image, target
        height, width = F.get_size(image)
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        return image, {**target, "boxes": box_xyxy_to_cxcywh(target["boxes"]) / scale}


class Normalize:
    """Subtract `mean` from a float image and divide by `std`, per channel; make boxes relative (RelativeBoxes)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = list(mean), list(std)

    def __call__(self, image: Tensor, target: dict | None = None) -> Pair:
        return RelativeBoxes()(F.normalize(image, self.mean, self.std), target)


def _crop_somewhere(image: Picture, target: dict | None, height: int, width: int) -> Pair:
    full_height, full_width = F.get_size(image)
    _check_room(full_height, full_width, height, width)
    top, left = random.randint(0, full_height - height), random.randint(0, full_width - width)
    return crop(image, target, (top, left, height, width))


def _check_room(full_height: int, full_width: int, height: int, width: int) -> None:
    if height > full_height or width > full_width:
        raise ValueError(f"cannot crop {height} x {width} (height x width) out of {full_height} x {full_width}")
