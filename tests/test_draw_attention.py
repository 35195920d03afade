"""Where attention ends up on a picture: beside the objects, without the padding, from the cell of a point."""

import numpy as np
import torch
from PIL import Image

from tools.draw_attention import MARK, Attention, draw_attention, heat, mark, outside

GREY = Image.new("RGB", (90, 60), (128, 128, 128))


def bright(picture):
    """The pixels that are more yellow than blue: those of large weights."""
    red, _, blue = np.asarray(picture).astype(int).transpose(2, 0, 1)
    return red > blue + 40


def test_heat_is_bright_at_the_cell_that_is_attended():
    weights = torch.zeros(2, 3)
    weights[1, 2] = 0.4  # the lower right cell: the maximum, and thus the brightest colour
    rows, columns = np.nonzero(bright(heat(GREY, weights, (1, 1))))
    assert rows.min() > 30 and columns.min() > 50 and rows.max() == 59 and columns.max() == 89


def test_heat_leaves_out_the_padding():
    weights = torch.zeros(2, 4)
    weights[:, 1] = 0.4  # the image covers the left half of four columns, so this is the image's right half
    rows, columns = np.nonzero(bright(heat(GREY, weights, (1, 0.5))))
    assert columns.min() > 30 and columns.max() == 89 and rows.max() == 59
    # Of 1.5 columns of cells, the centre of the second lies at the image's right edge.
    _, columns = np.nonzero(bright(heat(GREY, weights, (1, 0.375))))
    assert columns.min() > 62 and columns.max() == 89
    assert not bright(heat(GREY, torch.zeros(2, 4), (1, 1))).any()


def test_attention_from_a_point_is_that_of_its_cell():
    cells = torch.arange(8.0)[:, None, None].expand(8, 2, 4)
    attention = Attention(torch.zeros(0, 2, 4), cells, (1, 0.5))  # the image covers 2 x 2 of 2 x 4 cells
    for point, cell in (((0, 0), 0), ((89.9, 0), 1), ((0, 59), 4), ((46, 31), 5), ((44, 29), 0)):
        assert attention.from_point(point, GREY.size)[0, 0] == cell


def test_points_outside_an_image_are_found():
    points = [(0, 0), (89.5, 59.5), (90, 0), (0, 60), (-1, 5), (float("nan"), 5)]
    assert (
        outside(points, torch.zeros(3, 60, 90))[:3] == points[2:5] and len(outside(points, torch.zeros(3, 60, 90))) == 4
    )


def test_draw_attention_has_a_panel_for_each_object_and_point():
    objects = torch.zeros(2, 2, 3)
    objects[0, 0, 0] = objects[1, 1, 2] = 1
    cells = torch.zeros(6, 2, 3)
    cells[:, 0, 2] = 1
    boxes = torch.tensor([[5.0, 5, 30, 30], [50.0, 30, 80, 55]])
    look = (boxes, ["cat 0.90", "dog 0.80"], [(0, 0, 255), (0, 255, 0)])
    alone = draw_attention(GREY, Attention(objects, cells, (1, 1)), *look)
    sheet = draw_attention(GREY, Attention(objects, cells, (1, 1)), *look, [(10, 10)])
    assert (alone.width, sheet.width) == (3 * 368 + 8, 4 * 368 + 8) and sheet.height == 240 + 20 + 16
    panels = [np.asarray(sheet)[28:268, 8 + k * 368 : 368 + k * 368] for k in range(4)]
    centres = [np.argwhere(bright(panel)).mean(0) for panel in panels[1:]]
    assert centres[0][0] < 100 and centres[0][1] < 150 and centres[1][0] > 140 and centres[1][1] > 210
    assert centres[2][0] < 140 and centres[2][1] > 210
    ringed = [(panel == MARK).all(-1).any() for panel in panels]
    assert ringed == [True, False, False, True]
    assert (np.asarray(mark(GREY, (10, 10), 1, "")) != np.asarray(GREY)).any()
