"""Predict large images tile by tile, so that small objects are not lost when the image is resized.

from tools.tiles import TiledPredictor
found = TiledPredictor(Predictor.from_checkpoint("checkpoint.pth"), tile=800)("large.png", threshold=0.5)
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from tools.predictor import Detections, ImageLike, Predictor, as_tensor

SMALLEST_TILE = 32  # pixels; one cell of the network's features
LARGEST_OVERLAP = 0.9  # of a tile's side; the number of tiles grows as 1 / (1 - overlap)^2
DUPLICATE_IOU = 0.5  # boxes of one class that overlap more are one object
COVERED = 0.7  # share of a cut box that lies in another box: then both are one object
BORDER = 0.01  # of a tile's side: boxes that end this close to an inner border of their tile are cut by it


class TiledPredictor:
    """A predictor that cuts each image into overlapping tiles, predicts these, and merges the detections.

    `tile` is the side of a tile in pixels, `overlap` the share of it that neighbours have in common, and `batch_size`
    the number of tiles in one forward pass. Raises ValueError for other values, and for panoptic models.
    """

    def __init__(self, predictor: Predictor, tile: int, overlap: float = 0.2, batch_size: int = 1):
        check_tiling(tile, overlap)
        if "panoptic" in predictor.postprocessors:
            raise ValueError("panoptic maps of tiles cannot be merged: predict with this model without --tile")
        self.predictor, self.tile, self.overlap, self.batch_size = predictor, tile, overlap, batch_size
        self.class_names = predictor.class_names

    def __call__(self, image: ImageLike, threshold: float | None = None) -> Detections:
        """Detect the objects of one image; see `Predictor`. An image that is not larger than a tile is one tile."""
        image = as_tensor(image)
        places = tile_places(image.shape[1], image.shape[2], self.tile, self.overlap)
        if len(places) == 1:
            return self.predictor.predict_batch([image], threshold)[0]
        found: list[Detections] = []
        for k in range(0, len(places), self.batch_size):
            tiles = [image[:, y0:y1, x0:x1] for x0, y0, x1, y1 in places[k : k + self.batch_size]]
            found += self.predictor.predict_batch(tiles, threshold)
        return merge(image, found, places)

    def predict_batch(self, images: Sequence[ImageLike], threshold: float | None = None) -> list[Detections]:
        """Detect the objects of several images, one image after the other."""
        return [self(image, threshold) for image in images]


def check_tiling(tile: int, overlap: float) -> None:
    """Raise ValueError for tiles that make no sense."""
    if tile < SMALLEST_TILE:
        raise ValueError(f"--tile {tile}: at least {SMALLEST_TILE} pixels")
    if not 0 <= overlap <= LARGEST_OVERLAP:
        raise ValueError(f"--overlap {overlap}: a share of the tile between 0 and {LARGEST_OVERLAP}")


def tile_places(height: int, width: int, tile: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Return the tiles (x0, y0, x1, y1) that cover an image, row by row; none reaches beyond the image."""
    rows, columns = (tile_starts(length, tile, overlap) for length in (height, width))
    return [(x, y, min(x + tile, width), min(y + tile, height)) for y in rows for x in columns]


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Return where the tiles along one side begin; the last one is moved inside, so it may overlap more."""
    if length <= tile:
        return [0]
    step = max(round(tile * (1 - overlap)), 1)
    return [*range(0, length - tile, step), length - tile]


def merge(image: Tensor, found: Sequence[Detections], places: Sequence[tuple[int, int, int, int]]) -> Detections:
    """Merge the detections of an image's tiles at `places`: boxes and masks in the image's pixels, each object once."""
    height, width = image.shape[1:]
    pairs = list(zip(found, places, strict=True))
    boxes = torch.cat([each.boxes + torch.tensor(place[:2]).repeat(2) for each, place in pairs])
    scores, labels = torch.cat([each.scores for each in found]), torch.cat([each.labels for each in found])
    cut = torch.cat([cut_boxes(each.boxes, place, height, width) for each, place in pairs])
    tiles = torch.arange(len(found)).repeat_interleave(torch.tensor([len(each) for each in found]))
    whole = drop_covered(boxes, labels, cut, tiles)
    # In double precision: `batched_nms` may move the boxes of each class far apart.
    keep = whole[batched_nms(boxes[whole].double(), scores[whole].double(), labels[whole], DUPLICATE_IOU)]
    masks = None if found[0].masks is None else place_masks(found, places, keep, height, width)
    return Detections(image, scores[keep], labels[keep], boxes[keep], found[0].class_names, masks)


def cut_boxes(boxes: Tensor, place: tuple[int, int, int, int], height: int, width: int) -> Tensor:
    """Return which boxes [N, 4], in pixels of the tile at `place`, reach a border of it that lies inside the image."""
    x0, y0, x1, y1 = place
    near_x, near_y = BORDER * (x1 - x0), BORDER * (y1 - y0)
    left, top, right, bottom = boxes.unbind(1)
    cut = torch.zeros(len(boxes), dtype=torch.bool)
    if x0 > 0:
        cut |= left <= near_x
    if y0 > 0:
        cut |= top <= near_y
    if x1 < width:
        cut |= right >= x1 - x0 - near_x
    if y1 < height:
        cut |= bottom >= y1 - y0 - near_y
    return cut


def drop_covered(boxes: Tensor, labels: Tensor, cut: Tensor, tiles: Tensor) -> Tensor:
    """Return the indices of all boxes but `cut` ones that lie mostly in a larger box of their class of another tile.

    An object that a tile's border cuts is whole in the neighbour, if it is not larger than the overlap. IoU does not
    show that a small piece and the whole are one object, and the piece may have the higher score. `tiles` [N] are the
    numbers of the boxes' tiles: in one tile, a small object on a large one is a second object.
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    order = areas.argsort(descending=True, stable=True)
    boxes, labels, cut, tiles, areas = (each[order] for each in (boxes, labels, cut, tiles, areas))
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for k in cut.nonzero()[:, 0].tolist():  # from the largest: the boxes that cover a dropped one are kept themselves
        low, high = boxes[:k, :2].maximum(boxes[k, :2]), boxes[:k, 2:].minimum(boxes[k, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        same = kept[:k] & (labels[:k] == labels[k]) & (tiles[:k] != tiles[k])
        kept[k] = not (same & (shared >= COVERED * areas[k])).any()
    return order[kept]


def place_masks(
    found: Sequence[Detections], places: Sequence[tuple[int, int, int, int]], keep: Tensor, height: int, width: int
) -> Tensor:
    """Return the masks of the detections `keep`, counted over all tiles, in the image: bool [len(keep), H, W]."""
    masks = torch.zeros(len(keep), height, width, dtype=torch.bool)
    origins = [(each.masks[n], place) for each, place in zip(found, places, strict=True) for n in range(len(each))]
    for row, k in enumerate(keep.tolist()):
        mask, (x0, y0, x1, y1) = origins[k]
        masks[row, y0:y1, x0:x1] = mask
    return masks
