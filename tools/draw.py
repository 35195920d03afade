"""Draw boxes, masks, panoptic segments and captions on images, and lay images out on a sheet.

Masks are drawn by torchvision. Its boxes have no dashed lines, and its captions do not grow with the image and may
overlap, so boxes and captions are drawn here.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from util.text import printable

Colour = tuple[int, int, int]
GAP = 8  # pixels between the images of a sheet
LONGEST_CAPTION = 60  # characters


def to_pil(image: Tensor) -> Image.Image:
    """Convert a uint8 RGB tensor [3, H, W] to a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def class_colour(label: int, shade: int = 0) -> Colour:
    """Return the colour of a class: always the same, and far from those of neighbouring ids (golden-ratio hues).

    Different `shade` numbers give similar colours, for objects of one class that touch.
    """
    hue, light = label * 0.618034 + shade * 0.023, 0.95 - 0.12 * (shade % 4)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, 0.9 - 0.35 * (label % 2), light)
    return round(255 * red), round(255 * green), round(255 * blue)


def fit(image: Image.Image, side: int) -> tuple[Image.Image, float]:
    """Scale an image so that its longer side is `side` pixels; return it and the scale factor (for its boxes).

    Small images are enlarged without smoothing, to show the pixels as the model sees them.
    """
    factor = side / max(image.size)
    size = [max(round(length * factor), 1) for length in image.size]
    return image.resize(size, Image.Resampling.LANCZOS if factor < 2 else Image.Resampling.NEAREST), factor


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    captions: Sequence[str],
    colours: Sequence[Colour],
    dashed: Sequence[bool] | None = None,
) -> Image.Image:
    """Draw boxes (x0, y0, x1, y1 in pixels of `image`), a caption at each, on a copy of an RGB image.

    Captions stay inside the image and, where there is room, do not overlap. `dashed` says which boxes have dashed
    lines. Line width and letter size are proportional to the image.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    dashed = dashed or [False] * len(boxes)
    line = max(2, round(max(image.size) / 320))
    font = ImageFont.load_default(max(11, round(max(image.size) / 42)))
    for box, colour, is_dashed in zip(boxes, colours, dashed, strict=True):
        _outline(draw, image.size, box, colour, line, is_dashed)
    taken: list[tuple[float, ...]] = []
    for box, caption, colour in zip(boxes, captions, colours, strict=True):
        if caption:
            _caption(draw, image.size, box, printable(caption)[:LONGEST_CAPTION], colour, font, taken)
    return image


def _outline(draw: ImageDraw.ImageDraw, size: tuple[int, int], box, colour: Colour, line: int, dashed: bool) -> None:
    x0, x1 = (min(max(x, 0), size[0] - 1) for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0), size[1] - 1) for y in (box[1], box[3]))
    if x1 <= x0 or y1 <= y0:
        return
    if not dashed:
        # A dark rim keeps the line visible on objects of the same colour.
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=line + 2)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=line)
        return
    dash = 4 * line
    for x in np.arange(x0, x1, 2 * dash):
        for y in (y0, y1):
            draw.line((x, y, min(x + dash, x1), y), fill=colour, width=line)
    for y in np.arange(y0, y1, 2 * dash):
        for x in (x0, x1):
            draw.line((x, y, x, min(y + dash, y1)), fill=colour, width=line)


def _caption(draw: ImageDraw.ImageDraw, size: tuple[int, int], box, text: str, colour: Colour, font, taken) -> None:
    """Write a caption above its box, or below the box's top edge, at the first place without another caption."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(box[0], 0), max(size[0] - width, 0))
    y = min(max(box[1] - height if box[1] >= height else box[1], 0), max(size[1] - height, 0))
    for candidate in np.arange(y, min(max(box[3], y), size[1] - height) + 1, height):
        place = (x, float(candidate), x + width, float(candidate) + height)
        if not any(_overlap(place, other) for other in taken):
            break
    else:
        place = (x, y, x + width, y + height)
    taken.append(place)
    draw.rectangle(place, fill=colour)
    draw.text((place[0] + 2 - left, place[1] + 2 - top), text, fill=_ink(colour), font=font)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(paper: Colour) -> Colour:
    """Return black or white, whichever is easier to read on a background colour."""
    return (0, 0, 0) if 0.3 * paper[0] + 0.59 * paper[1] + 0.11 * paper[2] > 130 else (255, 255, 255)


def draw_masks(image: Image.Image, masks: np.ndarray, colours: Sequence[Colour], opacity: float = 0.5) -> Image.Image:
    """Tint the pixels of each mask, bool [N, H, W] of the image's size, on a copy; earlier masks lie on top."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if len(masks) == 0:
        return to_pil(pixels)
    disjoint = masks & (np.arange(len(masks))[:, None, None] == masks.argmax(0))  # torchvision blackens overlaps
    return to_pil(draw_segmentation_masks(pixels, torch.from_numpy(disjoint), opacity, list(colours)))


def draw_panoptic(image: Image.Image, ids: np.ndarray, segments: Sequence[dict], names: dict[int, str]) -> Image.Image:
    """Draw a panoptic map on a copy of an image: segments tinted, with white borders and class names.

    `ids` [h, w] are scaled to the image; `segments` are COCO's `segments_info`.
    """
    ids = np.array(Image.fromarray(ids.astype(np.int32)).resize(image.size, Image.Resampling.NEAREST))
    segments = [segment for segment in segments if (ids == segment["id"]).any()]
    colours = [class_colour(segment["category_id"], shade) for shade, segment in enumerate(segments)]
    picture = draw_masks(image, np.array([ids == segment["id"] for segment in segments]), colours, opacity=0.6)
    border = np.zeros(ids.shape, bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    picture = draw_masks(picture, border[None], [(255, 255, 255)], opacity=0.8)
    places = []
    for segment in segments:
        rows, columns = np.nonzero(ids == segment["id"])
        y = rows[len(rows) // 2]  # of a pixel inside the segment; the centroid may lie outside
        x = np.median(columns[rows == y])
        places.append((x, y, x, y))
    return draw_boxes(picture, places, [class_name(names, segment["category_id"]) for segment in segments], colours)


def class_name(names: dict[int, str], label: int) -> str:
    """Return the name of a class, or its number where the name is unknown."""
    return str(names.get(label, f"class {label}"))


def titled(image: Image.Image, title: str, letters: int = 14) -> Image.Image:
    """Put a title on white above an image; a title that is too long ends in dots."""
    title = printable(title)
    font = ImageFont.load_default(letters)
    while font.getlength(title) > image.width - 4 and len(title) > 4:
        title = title[:-4] + "..."
    page = Image.new("RGB", (image.width, image.height + letters + 6), "white")
    ImageDraw.Draw(page).text((2, 1), title, fill="black", font=font)
    page.paste(image, (0, letters + 6))
    return page


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay images out in rows, each column as wide as its widest image. Raises ValueError if there are none."""
    if not pictures:
        raise ValueError("no images to lay out on a sheet")
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    widths = [max(p.width for p in pictures[c::columns]) for c in range(min(columns, len(pictures)))]
    heights = [max(p.height for p in row) for row in rows]
    size = (sum(widths) + GAP * (len(widths) + 1), sum(heights) + GAP * (len(heights) + 1))
    sheet, y = Image.new("RGB", size, "white"), GAP
    for row, height in zip(rows, heights, strict=True):
        x = GAP
        for picture, width in zip(row, widths, strict=False):
            sheet.paste(picture, (x, y))
            x += width + GAP
        y += height + GAP
    return sheet
