"""Draw where a model attends: the decoder's attention for each object, the encoder's from chosen points.

As in the paper's figures 3 and 6. The weights are those of the last layer, the mean over its heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from tools.draw import Colour, contact_sheet, draw_boxes, titled

Point = tuple[float, float]
COLUMNS = 4  # panels in a row, at most
SIDE = 360  # pixels of a panel's longer side
OPACITY = 0.7  # of the colours of the weights over the grey image
MARK: Colour = (255, 60, 60)  # the colour of chosen points


@dataclass
class Attention:
    """The attention weights for one image, on cells that cover the padded input.

    `covered` is the share of the cells' height and width that the image covers; the rest is padding.
    """

    objects: Tensor  # [N, h, w], the decoder's, for each detected object
    cells: Tensor  # [h * w, h, w], the encoder's, from each cell
    covered: tuple[float, float]

    def from_point(self, point: Point, size: tuple[int, int]) -> Tensor:
        """Return the encoder's weights [h, w] from the cell at a point (x, y) of an image of `size` (width, height)."""
        rows, columns = self.cells.shape[-2:]
        row = min(int(point[1] / size[1] * self.covered[0] * rows), rows - 1)
        column = min(int(point[0] / size[0] * self.covered[1] * columns), columns - 1)
        return self.cells[row * columns + column]


def read_attention(maps: dict[str, list[Tensor]], image: int, queries: Tensor, covered: tuple[float, float]):
    """Take the Attention of one image and of some of its queries from maps that `record_attention` filled."""
    encoder, decoder = maps["encoder"][-1][image], maps["decoder"][-1][image]
    return Attention(decoder[:, queries].mean(0).cpu(), encoder.mean(0).cpu(), covered)


def outside(points: Sequence[Point], image: Tensor) -> list[Point]:
    """Return the points (x, y) that do not lie on an image [3, H, W]."""
    height, width = image.shape[-2:]
    return [(x, y) for x, y in points if not (0 <= x < width and 0 <= y < height)]


def heat(image: Image.Image, weights: Tensor, covered: tuple[float, float]) -> Image.Image:
    """Draw weights [h, w] over a grey copy of an image, from dark blue (0) to yellow (their maximum)."""
    rows, columns = (share * length for share, length in zip(covered, weights.shape, strict=True))
    weights = weights[: math.ceil(rows - 1e-4), : math.ceil(columns - 1e-4)]  # without the padding
    box = (0, 0, min(columns, weights.shape[1]), min(rows, weights.shape[0]))
    values = Image.fromarray(weights.float().numpy()).resize(image.size, Image.Resampling.BILINEAR, box)
    shares = np.array(values) / max(float(weights.max()), 1e-12)
    colours = matplotlib.colormaps["viridis"](shares.clip(0, 1), bytes=True)[..., :3]
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(colours), OPACITY)


def draw_attention(
    image: Image.Image,
    attention: Attention,
    boxes: Tensor,
    captions: Sequence[str],
    colours: Sequence[Colour],
    points: Sequence[Point] = (),
) -> Image.Image:
    """Lay out panels: all boxes [N, 4]; the attention for each, with its box; the attention from each point (x, y)."""
    size = image.size
    factor = SIDE / max(size)
    image = image.resize([max(round(length * factor), 1) for length in size], Image.Resampling.LANCZOS)
    scaled = (boxes * factor).tolist()
    overview = draw_boxes(image, scaled, captions, colours)
    for number, point in enumerate(points, 1):
        overview = mark(overview, point, factor, str(number))
    panels = [titled(overview, f"{len(scaled)} objects")]
    for weights, box, caption, colour in zip(attention.objects, scaled, captions, colours, strict=True):
        panel = draw_boxes(heat(image, weights, attention.covered), [box], [""], [colour])
        panels.append(titled(panel, f"decoder: {caption}"))
    for number, (x, y) in enumerate(points, 1):
        panel = heat(image, attention.from_point((x, y), size), attention.covered)
        panels.append(titled(mark(panel, (x, y), factor, ""), f"encoder: point {number} ({x:g},{y:g})"))
    return contact_sheet(panels, min(COLUMNS, len(panels)))


def mark(image: Image.Image, point: Point, factor: float, text: str) -> Image.Image:
    """Draw a ring, and a text beside it, at a point (x, y) times `factor`, on a copy of an image."""
    image = image.copy()
    x, y, radius = point[0] * factor, point[1] * factor, max(4, max(image.size) / 60)
    draw = ImageDraw.Draw(image)
    for colour, rim, width in (((0, 0, 0), radius + 1, 5), (MARK, radius, 3)):  # a dark rim on both sides of the ring
        draw.ellipse((x - rim, y - rim, x + rim, y + rim), outline=colour, width=width)
    draw.text((x + radius + 2, y - radius), text, fill=MARK)
    return image
