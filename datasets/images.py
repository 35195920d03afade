"""A picture file becomes RGB bytes [3, H, W], whatever its kind."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def read_image(path: str | Path) -> Tensor:
    """Read an image file as uint8 RGB [3, H, W], as its pixels are stored: EXIF rotation is not applied.

    (COCO's boxes refer to the stored pixels.) Grey, palette, CMYK and 16-bit files are converted, transparency is
    dropped. Raises FileNotFoundError, or ValueError naming a file that cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(to_rgb(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = f"not a readable image ({error}); replace the file or remove it from the annotations"
        raise ValueError(f"{path}: {why}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)  # channels stay innermost in memory: resizing is faster so


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; 16-bit grey is scaled down, where PIL would clip it."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values = values // 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
