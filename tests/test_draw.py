"""Where lines and captions end up on a picture."""

import numpy as np
import pytest
from PIL import Image

from tools.draw import class_colour, contact_sheet, draw_boxes, draw_masks, draw_panoptic, fit, titled
from util.text import printable

GREY = Image.new("RGB", (100, 80), (128, 128, 128))
RED, BLUE = (255, 0, 0), (0, 0, 255)


def coloured(picture, colour):
    return (np.asarray(picture) == colour).all(-1)


def test_a_box_is_drawn_along_its_edge_and_not_inside():
    red = coloured(draw_boxes(GREY, [[20, 30, 60, 70]], [""], [RED]), RED)
    rows, columns = np.nonzero(red)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (20, 30, 60, 70)
    assert not red[40:60, 30:50].any()
    assert not coloured(GREY, RED).any()  # the original stays


def test_a_box_past_the_border_is_cut_and_one_of_no_area_leaves_no_line():
    red = coloured(draw_boxes(GREY, [[-50, -50, 500, 500]], [""], [RED]), RED)
    assert red[0].all() and red[-1].all() and red[:, 0].all() and red[:, -1].all()
    assert not coloured(draw_boxes(GREY, [[5, 5, 5, 40]], [""], [RED]), RED).any()


def test_captions_keep_clear_of_each_other_and_inside():
    boxes = [[10, 20, 90, 75], [10, 20, 90, 75]]
    picture = draw_boxes(GREY, boxes, ["mmm", "mmm"], [RED, BLUE])
    papers = [coloured(picture, colour) for colour in (RED, BLUE)]
    assert all(paper.sum() > 100 for paper in papers)
    inside = draw_boxes(GREY, [[95, -10, 99, 5]], ["a long caption"], [RED])
    assert coloured(inside, RED).sum() > 300


def test_dashes_leave_gaps():
    solid, dashed = (coloured(draw_boxes(GREY, [[5, 5, 90, 70]], [""], [RED], [d]), RED).sum() for d in (False, True))
    assert 0.3 * solid < dashed < 0.7 * solid


def test_masks_tint_their_pixels_the_first_on_top():
    masks = np.zeros((2, 80, 100), bool)
    masks[0, :40], masks[1, :60] = True, True
    pixels = np.asarray(draw_masks(GREY, masks, [RED, BLUE]))
    assert pixels[10, 10].tolist() == [191, 64, 64]
    assert pixels[50, 10].tolist() == [64, 64, 191]
    assert pixels[70, 10].tolist() == [128, 128, 128]
    with pytest.raises(ValueError, match="same height and width"):
        draw_masks(GREY, np.zeros((1, 5, 5), bool), [RED])


def test_draw_panoptic_gives_segments_borders_and_names():
    ids = np.zeros((80, 100), int)
    ids[:, 50:] = 7
    picture = draw_panoptic(GREY, ids, [{"id": 7, "category_id": 3}, {"id": 8, "category_id": 3}], {3: "thing"})
    assert np.asarray(picture)[70, 50].min() > 200  # the border
    assert coloured(picture, class_colour(3)).sum() > 50  # the caption's background
    assert np.asarray(picture)[70, 10].tolist() == [128, 128, 128]


@pytest.mark.parametrize("text", ["\x1b[31mred", "b\udce9", "two\nlines"])
def test_captions_and_titles_of_any_text_are_drawn_as_escapes(text):
    escaped = draw_boxes(GREY, [[5, 40, 90, 70]], [printable(text)], [RED])
    assert np.array_equal(draw_boxes(GREY, [[5, 40, 90, 70]], [text], [RED]), escaped)
    assert titled(GREY, text).size == (100, 100)


def test_fit_scales_both_ways():
    assert fit(GREY, 50)[0].size == (50, 40) and fit(GREY, 50)[1] == 0.5
    assert fit(GREY, 400)[0].size == (400, 320)


def test_a_sheet_holds_every_picture_and_refuses_none():
    sheet = contact_sheet([titled(GREY, "a title that is longer than the picture is wide")] * 5, columns=2)
    assert sheet.size == (2 * 100 + 3 * 8, 3 * (80 + 20) + 4 * 8)
    with pytest.raises(ValueError, match="no images"):
        contact_sheet([], 2)


def test_colours_of_neighbouring_classes_differ():
    colours = [np.array(class_colour(label)) for label in range(91)]
    assert min(np.abs(a - b).sum() for a, b in zip(colours[:-1], colours[1:], strict=True)) > 150
