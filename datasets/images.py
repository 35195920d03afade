"""Image files of all kinds, decoded to 8-bit RGB."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from util.text import printable

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N")  # 16-bit grey: divided by 257, so that 65535 becomes 255
REFUSED_MODES = ("I", "F")  # 32-bit: no range is given by the type


def allow_large_images() -> None:
    """Let this process decode images of any size; PIL refuses those above twice its `MAX_IMAGE_PIXELS`."""
    Image.MAX_IMAGE_PIXELS = None


@contextmanager
def decoding(file: str | Path | BinaryIO, what: str = "image") -> Iterator[None]:
    """Turn any error of a decoder into a ValueError that names the file and the remedy.

    FileNotFoundError, and errors of the system (OSError with an error number), keep their type: the file itself may be
    intact.
    """
    name = printable(file)
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such {what}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; --allow large_images reads it") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can break a decoder in any way
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, f"{name}: {error.strerror}") from error
        why = f"not a readable {what} ({printable(error)}); replace the file or remove it from the annotations"
        raise ValueError(f"{name}: {why}") from error


def read_image(path: str | Path) -> Tensor:
    """Read an image file as uint8 RGB [3, H, W], as its pixels are stored: EXIF rotation is not applied.

    (COCO's boxes refer to the stored pixels.) Grey, palette and CMYK files are converted, transparency is dropped, and
    16-bit grey is divided by 257. Raises FileNotFoundError, or ValueError naming a file that cannot be decoded, has
    32-bit pixels, or has more pixels than PIL allows (see `allow_large_images`).
    """
    # Channels stay innermost in memory: resizing is faster with them there.
    return torch.from_numpy(read_pixels(path)).permute(2, 0, 1)


def read_pixels(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 RGB [H, W, 3]; see `read_image`."""
    with decoding(path):
        pixels = _decode_jpeg(Path(path).read_bytes())
        if pixels is None:
            with Image.open(path) as image:
                pixels = np.array(to_rgb(image))
        return pixels


def read_upright(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB, rotated as its EXIF tag says."""
    with decoding(path), Image.open(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode an ordinary JPEG to PIL's pixels [H, W, 3] in two thirds of PIL's time; None for other files."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours = simplejpeg.decode_jpeg_header(data)[:3]
        limit = Image.MAX_IMAGE_PIXELS
        if colours not in ("YCbCr", "Gray") or (limit and height * width > limit):
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # damaged: PIL can read past some kinds of damage, and describes the others
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB by a rule that depends on the image's mode only; ValueError for modes that have none."""
    # PIL before version 11 gives 16-bit PNG files the mode of 32-bit ones.
    if image.mode in DEEP_MODES or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in REFUSED_MODES:
        raise ValueError(f"pixels of mode {image.mode}, 32 bits, have no fixed range: convert the file to 8 or 16 bits")
    return image.convert("RGB")
