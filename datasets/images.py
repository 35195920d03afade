"""A picture file becomes RGB bytes [3, H, W], whatever its kind."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor


def read_image(path: str | Path) -> Tensor:
    """Read an image file as uint8 RGB [3, H, W], as its pixels are stored: EXIF rotation is not applied.

    (COCO's boxes refer to the stored pixels.) Grey, palette, CMYK and 16-bit files are converted, transparency is
    dropped. Raises FileNotFoundError, or ValueError naming a file that cannot be decoded.
    """
    try:
        data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    try:
        if data[:2].tolist() == [0xFF, 0xD8]:  # a JPEG: torchvision gives PIL's pixels without PIL's copies
            pixels = decode_jpeg(data, mode=ImageReadMode.UNCHANGED)
            if len(pixels) == 3:
                return pixels
            if len(pixels) == 1:
                return pixels.expand(3, -1, -1)
        with Image.open(path) as image:
            return pil_to_tensor(to_rgb(image))
    except (RuntimeError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: not a readable image ({error}); replace the file or remove it from the annotations"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; 16-bit grey is scaled down rather than clipped, as PIL would."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values = values // 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
