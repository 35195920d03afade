"""Prediction by tiles: every object of a large image once, where it is, and images of any size."""

import json

import pytest
import torch
from scipy import ndimage

from models import build_model
from tests.helpers import parse
from tools import predict
from tools.predictor import Detections, Predictor
from tools.tiles import TiledPredictor, cut_boxes, drop_covered, merge, tile_places, tile_starts
from util.checkpoint import save_checkpoint
from util.cli import exit_status

COLOURS = {1: (255, 0, 0), 2: (0, 255, 0)}  # class: colour of its squares
SIDE = 30


class SquareFinder:
    """Finds the squares of each colour exactly, and pieces of squares with a higher score than whole ones."""

    def __init__(self, masks=False):
        self.masks, self.postprocessors, self.class_names, self.tiles = masks, {}, {1: "red", 2: "green"}, []

    def predict_batch(self, images, threshold=None):
        self.tiles.append([list(image.shape[1:]) for image in images])
        return [self.find(image) for image in images]

    def find(self, image):
        boxes, labels, scores, masks = [], [], [], []
        for label, colour in COLOURS.items():
            regions, _ = ndimage.label((image == torch.tensor(colour)[:, None, None]).all(0).numpy())
            for n, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
                boxes.append([columns.start, rows.start, columns.stop, rows.stop])
                labels.append(label)
                scores.append(1 - (rows.stop - rows.start) * (columns.stop - columns.start) / 2000)
                masks.append(torch.from_numpy(regions == n))
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        masks = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.bool)
        scores, order = torch.tensor(scores).sort(descending=True)
        labels = torch.tensor(labels, dtype=torch.int64)[order]
        return Detections(image, scores, labels, boxes[order], self.class_names, masks[order] if self.masks else None)


def squares(height, width, corners):
    """A grey image with squares at `corners` (x, y, class), and the sorted list of (class, box)."""
    image, truth = torch.full((3, height, width), 90, dtype=torch.uint8), []
    for x, y, label in corners:
        image[:, y : y + SIDE, x : x + SIDE] = torch.tensor(COLOURS[label], dtype=torch.uint8)[:, None, None]
        truth.append((label, [x, y, x + SIDE, y + SIDE]))
    return image, sorted(truth)


def answers(found):
    return sorted((int(label), box) for label, box in zip(found.labels, found.boxes.tolist(), strict=True))


def large_image():
    """Squares inside tiles, on the borders of tiles of 800 pixels (overlap 0.2), and at the image's edges."""
    borders_x, borders_y = [640, 800, 1280, 1440, 1920, 2080, 2200], [640, 800, 1200]
    corners = [(x - 7, 100, 1) for x in borders_x] + [(x - 23, 700, 2) for x in borders_x]
    corners += [(300, y - 15, 2) for y in borders_y] + [(x - 10, y - 20, 1) for x in borders_x for y in borders_y]
    corners += [(0, 0, 1), (2970, 0, 2), (0, 1970, 1), (2970, 1970, 1), (1000, 1500, 1), (1031, 1500, 1)]
    return squares(2000, 3000, corners)


@pytest.mark.parametrize(("tile", "overlap"), [(800, 0.2), (500, 0.5), (1999, 0.1), (3000, 0.2), (5000, 0.2)])
@pytest.mark.slow
def test_tiles_of_a_large_image_find_every_small_object_once(tile, overlap):
    image, truth = large_image()
    found = TiledPredictor(SquareFinder(), tile, overlap, batch_size=3)(image)
    assert answers(found) == truth and found.image is image
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_tiles_move_masks_to_the_whole_image():
    image, truth = squares(90, 130, [(5, 5, 1), (50, 20, 2), (95, 55, 1)])
    found = TiledPredictor(SquareFinder(masks=True), 64, 0.6)(image)
    assert answers(found) == truth and found.masks.shape == (3, 90, 130)
    for mask, (x0, y0, x1, y1) in zip(found.masks, found.boxes.int().tolist(), strict=True):
        assert mask.sum() == SIDE**2 and mask[y0:y1, x0:x1].all()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 50, 64, 100])
@pytest.mark.parametrize("overlap", [0, 0.2, 0.5, 0.9])
def test_tile_starts_cover_the_side_without_reaching_beyond_it(length, overlap):
    starts = tile_starts(length, 32, overlap)
    assert starts == sorted(set(starts)) and starts[0] == 0 and starts[-1] == max(length - 32, 0)
    steps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert all(step <= round(32 * (1 - overlap)) for step in steps)


def test_tiles_lie_in_rows():
    assert tile_places(40, 50, 32, 0.5) == [(0, 0, 32, 32), (16, 0, 48, 32), (18, 0, 50, 32),
                                            (0, 8, 32, 40), (16, 8, 48, 40), (18, 8, 50, 40)]  # fmt: skip
    assert tile_places(8, 9, 32, 0.5) == [(0, 0, 9, 8)]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 200), (200, 1), (64, 64), (150, 150)])
@pytest.mark.parametrize("overlap", [0, 0.9])
def test_tiles_of_an_image_without_objects_find_nothing(height, width, overlap):
    finder = SquareFinder(masks=True)
    found = TiledPredictor(finder, 64, overlap, batch_size=2)(squares(height, width, [])[0])
    assert len(found) == 0 and found.boxes.shape == (0, 4) and found.masks.shape == (0, height, width)
    shapes = [shape for batch in finder.tiles for shape in batch]
    assert max(map(len, finder.tiles)) <= 2 and all(h <= 64 and w <= 64 for h, w in shapes)


def test_tiles_without_overlap_find_an_object_on_a_border_in_pieces():
    image, truth = squares(64, 128, [(10, 10, 1), (50, 20, 2)])
    found = TiledPredictor(SquareFinder(), 64, 0)(image)
    assert answers(found) == [truth[0], (2, [50, 20, 64, 50]), (2, [64, 20, 80, 50])]


def test_cut_boxes_are_dropped_only_for_a_larger_box_of_their_class_in_another_tile():
    boxes = torch.tensor([[0, 0, 100, 100], [90, 0, 100, 50], [90, 0, 100, 50], [90, 0, 100, 50], [60, 0, 140, 100]])
    labels, tiles = torch.tensor([1, 1, 2, 1, 1]), torch.tensor([0, 1, 1, 0, 1])
    cut = torch.tensor([False, True, True, False, True])
    kept = drop_covered(boxes.float(), labels, cut, tiles)
    assert sorted(kept.tolist()) == [0, 2, 3, 4]  # 4 is half covered, 3 is not cut, 2 is of another class
    assert sorted(drop_covered(boxes.float(), labels, cut, torch.zeros(5)).tolist()) == [0, 1, 2, 3, 4]


def test_two_cut_boxes_of_one_object_do_not_drop_each_other():
    boxes = torch.tensor([[0.0, 0, 100, 10], [10, 0, 110, 10]])
    kept = drop_covered(boxes, torch.tensor([1, 1]), torch.tensor([True, True]), torch.tensor([0, 1]))
    assert len(kept) == 1


def test_a_box_in_a_dropped_box_only_stays():
    boxes = torch.tensor([[0.0, 0, 100, 10], [20, 0, 110, 10], [80, 0, 112, 10]])  # the last: 0.62 in the first
    labels, cut = torch.tensor([1, 1, 1]), torch.tensor([False, True, True])
    assert sorted(drop_covered(boxes, labels, cut, torch.tensor([0, 1, 2])).tolist()) == [0, 2]


def test_boxes_are_cut_by_inner_borders_only():
    sides = [
        [0.0, 20, 30, 40],
        [20, 0, 40, 30],
        [70, 20, 100, 40],
        [20, 70, 40, 100],
    ]  # at the left, top, right, bottom
    boxes = torch.tensor([*sides, [20, 20, 40, 40]])
    assert cut_boxes(boxes, (0, 0, 100, 100), 150, 150).tolist() == [False, False, True, True, False]
    assert cut_boxes(boxes, (50, 50, 150, 150), 150, 150).tolist() == [True, True, False, False, False]
    assert not cut_boxes(boxes, (0, 0, 100, 100), 100, 100).any()


def test_merged_boxes_of_other_classes_stay():
    image = torch.zeros(3, 32, 60, dtype=torch.uint8)
    places = tile_places(32, 60, 32, 0.2)
    box = torch.tensor([[29.0, 5, 31, 9]])  # in the overlap of both tiles, seen as another class in each
    found = [
        Detections(image, torch.tensor([0.9]), torch.tensor([k]), box - torch.tensor([place[0], 0, place[0], 0]), {})
        for k, place in enumerate(places[:2])
    ]
    assert len(merge(image, found, places[:2])) == 2
    found[1].labels[:] = 0
    found[1].scores[:] = 0.95
    assert merge(image, found, places[:2]).scores.tolist() == pytest.approx([0.95])


def test_tiles_with_numbers_that_are_not_finite_are_an_error_of_their_image():
    finder = SquareFinder()
    finder.find = lambda image: Detections(image, torch.ones(1), torch.ones(1), torch.full((1, 4), torch.nan), {})
    (answer,) = predict.predict_each(TiledPredictor(finder, 32), [torch.zeros(3, 50, 50, dtype=torch.uint8)], 0)
    assert "not finite" in answer


def run(*flags):
    return exit_status(lambda: predict.main([*map(str, flags), "--device", "cpu"]))


def write_checkpoint(path, flags):
    torch.manual_seed(0)
    args = parse(f"--num_classes 4 {flags}")
    save_checkpoint({"model": build_model(args)[0].state_dict(), "args": vars(args)}, path)
    return path


@pytest.mark.slow
def test_predict_with_tiles_of_a_mask_model_writes_boxes_and_masks(coco_root, tmp_path):
    path = write_checkpoint(tmp_path / "masks.pth", "--masks --hidden_dim 128 --nheads 8 --dim_feedforward 64")
    flags = (coco_root / "val2017", "--checkpoint", path, "--threshold", 0)
    assert run(*flags, "--tile", 32, "--overlap", 0.5, "--output", tmp_path / "a", "--batch_size", 4) == 0
    records = json.loads((tmp_path / "a" / "predictions.json").read_text())
    assert {record["image_id"] for record in records} == {21, 22, 23}
    assert all(record["segmentation"]["size"] == [48, 64] for record in records)
    assert run(*flags, "--tile", 64, "--output", tmp_path / "b") == run(*flags, "--output", tmp_path / "c") == 0
    one, plain = ((tmp_path / name / "predictions.json").read_text() for name in "bc")
    assert one == plain  # an image that is not larger than a tile


@pytest.mark.parametrize(("flags", "message"), [
    ("--tile 0", "--tile 0: at least 32 pixels"), ("--tile -800", "--tile -800: at least"),
    ("--tile 64 --overlap 0.95", "--overlap 0.95: a share of the tile between 0 and 0.9"),
    ("--tile 64 --overlap -0.1", "--overlap -0.1"), ("--tile 64 --overlap nan", "--overlap nan"),
])  # fmt: skip
def test_predict_with_meaningless_tiles_is_refused(flags, message, capsys):
    assert run("x.jpg", "--checkpoint", "x.pth", *flags.split()) == 2
    assert message in capsys.readouterr().err


def test_tiles_of_a_panoptic_model_are_refused():
    finder = SquareFinder()
    finder.postprocessors = {"panoptic": None}
    with pytest.raises(ValueError, match="cannot be merged: predict with this model without --tile"):
        TiledPredictor(finder, 64)


def test_tiled_predictor_takes_what_a_predictor_takes(coco_root, tmp_path):
    predictor = Predictor.from_checkpoint(write_checkpoint(tmp_path / "x.pth", ""), "cpu")
    found = TiledPredictor(predictor, 32)(coco_root / "val2017" / "000000000021.jpg", threshold=0)
    assert len(found) > 0 and found.image.shape == (3, 48, 64)
