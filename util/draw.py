"""Boxes, masks and captions on pictures, and many pictures on a sheet; PIL only."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
GAP = 8  # pixels between the pictures of a sheet


def class_colour(label: int, shade: int = 0) -> Colour:
    """Colour of a class: the same in every picture, and far from its neighbours' (hues a golden ratio apart).

    Another `shade` is near it: for objects of one class that touch.
    """
    hue, light = label * 0.618034 + shade * 0.023, 0.95 - 0.12 * (shade % 4)
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, 0.9 - 0.35 * (label % 2), light))


def fit(image: Image.Image, side: int) -> tuple[Image.Image, float]:
    """Scale an image so that its longer side is `side` pixels; return it with the factor (for its boxes).

    A small image grows with its pixels left sharp, so that what the model saw can be seen.
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

    Captions keep inside the picture and clear of each other where there is room. `dashed` boxes have broken lines.
    Lines and letters grow with the picture.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    dashed = dashed or [False] * len(boxes)
    line = max(2, round(max(image.size) / 320))
    font = ImageFont.load_default(max(11, round(max(image.size) / 42)))
    for box, colour, broken in zip(boxes, colours, dashed, strict=True):
        _outline(draw, image.size, box, colour, line, broken)
    taken: list[tuple[float, ...]] = []
    for box, caption, colour in zip(boxes, captions, colours, strict=True):
        if caption:
            _caption(draw, image.size, box, caption, colour, font, taken)
    return image


def _outline(draw: ImageDraw.ImageDraw, size: tuple[int, int], box, colour: Colour, line: int, broken: bool) -> None:
    x0, x1 = (min(max(x, 0), size[0] - 1) for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0), size[1] - 1) for y in (box[1], box[3]))
    if x1 <= x0 or y1 <= y0:
        return
    if not broken:
        # A dark rim keeps a line visible on things of its own colour.
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
    """Write above the box; below its upper edge where there is no room, and further down while others are there."""
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
    """Black or white, whichever reads better on the colour."""
    return (0, 0, 0) if 0.3 * paper[0] + 0.59 * paper[1] + 0.11 * paper[2] > 130 else (255, 255, 255)


def draw_masks(image: Image.Image, masks: np.ndarray, colours: Sequence[Colour], opacity: float = 0.5) -> Image.Image:
    """Tint the pixels of each mask, bool [N, H, W] of the image's own size, on a copy; earlier masks lie on top."""
    pixels = np.array(image.convert("RGB"), np.float32)
    if len(masks) and masks.shape[1:] != pixels.shape[:2]:
        raise ValueError(f"masks of {masks.shape[1]} x {masks.shape[2]} on an image of {pixels.shape[:2]} pixels")
    tinted = pixels.copy()
    for mask, colour in reversed(list(zip(masks, colours, strict=True))):
        tinted[mask] = (1 - opacity) * pixels[mask] + opacity * np.array(colour)
    return Image.fromarray(tinted.round().astype(np.uint8))


def draw_segments(
    image: Image.Image, ids: np.ndarray, segments: Sequence[int], names: Sequence[str], colours: Sequence[Colour]
) -> Image.Image:
    """Draw a panoptic map, ids [H, W] of the image's own size: segments tinted, their borders white, each named."""
    picture = draw_masks(image, np.array([ids == k for k in segments]), colours, opacity=0.6)
    border = np.zeros(ids.shape, bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    picture = draw_masks(picture, border[None], [(255, 255, 255)], opacity=0.8)
    places = []
    for k in segments:
        rows, columns = np.nonzero(ids == k)
        middle = len(rows) // 2  # a pixel of the segment itself, where its centroid may lie outside
        x = np.median(columns[rows == rows[middle]])
        places.append((x, rows[middle], x, rows[middle]))
    return draw_boxes(picture, places, names, colours)


def titled(image: Image.Image, title: str, letters: int = 14) -> Image.Image:
    """Put a line of text on white above a picture; one that is too long ends in dots."""
    font = ImageFont.load_default(letters)
    while font.getlength(title) > image.width - 4 and len(title) > 4:
        title = title[:-4] + "..."
    page = Image.new("RGB", (image.width, image.height + letters + 6), "white")
    ImageDraw.Draw(page).text((2, 1), title, fill="black", font=font)
    page.paste(image, (0, letters + 6))
    return page


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay pictures out in rows, each column as wide as its widest picture. Raises ValueError if there are none."""
    if not pictures:
        raise ValueError("no pictures to lay out on a sheet")
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
