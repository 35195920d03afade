"""COCO panoptic: segments, both things and stuff, as objects with a class, a box and a mask."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.coco import CocoDetection, build_options, make_coco_transforms, make_target
from datasets.coco_api import index_coco, load_coco_api
from datasets.coco_checks import check_masks, check_sizes
from datasets.coco_index import read_coco_index
from datasets.json_file import report
from datasets.masks import check_colours, check_segment_ids, encode_masks, read_segment_ids
from datasets.panoptic_eval import check_pq_package
from datasets.panoptic_index import PanopticIndex, read_panoptic_index
from util.box_ops import masks_to_boxes
from util.flags import NEW_FLAGS, with_defaults
from util.logger import logger
from util.text import printable

__all__ = ["CocoPanoptic", "build", "make_coco_transforms", "masks_to_boxes"]
SAMPLE = 16  # maps whose channels are checked before training starts
COCO_CLASSES = 250  # outputs of the published models; the largest category id of COCO panoptic is 200


class CocoPanoptic(CocoDetection):
    """A folder of images, a folder of panoptic maps, and a COCO panoptic file.

    An item is CocoDetection's, whose objects are segments, stuff included. With `return_masks`, masks are read from the
    map and boxes are those of the masks; without, maps are not read and boxes come from the file. In both cases
    corners are the coordinates of the outermost pixels, so a segment that is one pixel thin has no area and is dropped;
    crowds are dropped too. AP (of
    the things) is computed against the objects of `instances_file`, or without one against the segments themselves.

    The files are checked once, here, except for the maps' pixels: a map whose ids are not those of the file raises
    ValueError when it is read (tools/check_dataset.py finds it before).
    """

    def __init__(
        self,
        img_folder: str | Path,
        ann_folder: str | Path,
        ann_file: str | Path,
        transforms=None,
        return_masks: bool = True,
        num_classes: int | None = None,
        instances_file: str | Path | None = None,
        **options,
    ):
        self.ann_folder, self.instances_file = Path(ann_folder), instances_file
        super().__init__(img_folder, ann_file, transforms, return_masks, num_classes, **options)

    def _read_index(self):
        index = read_panoptic_index(self.ann_file)
        check_sizes(index)
        self._check_files(index.file_names, self.img_folder)
        self._check_files(index.map_names, self.ann_folder, "panoptic maps")
        if self.return_masks:
            check_pq_package()
            check_colours([self.ann_folder / name for name in index.map_names[:SAMPLE].tolist()])
        return index

    @property
    def thing_classes(self) -> list[int]:
        """Ids of the categories that are things."""
        return list(self.index.things)

    @cached_property
    def coco(self):
        """The things as pycocotools' COCO, for the evaluation."""
        if self.instances_file:
            check_instances(self.instances_file, self.index, self.return_masks)
            return load_coco_api(self.instances_file)
        return index_coco(self._instances())

    def get_height_and_width(self, idx: int) -> tuple[int, int]:
        """Return (height, width) of an image, as listed in the annotation file."""
        return tuple(self.index.sizes[self.index.row_of(self.ids[idx])].tolist())

    def _with_target(self, image: Image.Image | Tensor, image_id: int) -> tuple[Image.Image | Tensor, dict]:
        row = self.index.row_of(image_id)
        where, (height, width) = self.index.annotations_of(row), self.index.sizes[row].tolist()
        if self.return_masks:
            masks = self._masks(row)
            columns = {"boxes": masks_to_boxes(masks), "masks": masks}
        else:
            boxes = torch.from_numpy(self.index.boxes[where].copy())
            boxes[:, 2:] += boxes[:, :2] - 1
            columns = {"boxes": boxes}
        for name in ("labels", "area", "iscrowd"):
            columns[name] = torch.from_numpy(getattr(self.index, name)[where])
        single = columns["iscrowd"] == 0
        columns = {name: column[single] for name, column in columns.items()}
        return image, make_target(torch.tensor([image_id]), (height, width), columns)

    def _masks(self, row: int) -> Tensor:
        """Read the masks of all segments of an image from its map: bool [T, H, W]."""
        path, size = self.ann_folder / str(self.index.map_names[row]), tuple(self.index.sizes[row].tolist())
        painted = read_segment_ids(path)
        if painted.shape != size:
            raise ValueError(f"{printable(path)}: a map of {painted.shape} (height, width) for an image of {size}")
        listed = self.index.segment_ids[self.index.annotations_of(row)]
        masks = painted == listed[:, None, None]
        complete = masks.any((1, 2)).all() and masks.sum() == np.count_nonzero(painted)
        if not complete:
            check_segment_ids(str(path), np.unique(painted).tolist(), listed.tolist())
        return torch.from_numpy(masks)

    def _instances(self) -> dict:
        """Make COCO's instances of the things: boxes from the file and, with `return_masks`, masks from the maps."""
        index = self.index
        logger.info(f"no instances file beside {self.ann_file}: AP is computed against its segments that are things")
        images, annotations = [], []
        for row, image_id in enumerate(index.image_ids.tolist()):
            height, width = index.sizes[row].tolist()
            images.append({"id": image_id, "file_name": str(index.file_names[row]), "height": height, "width": width})
            segments = index.annotations(row)
            codes = encode_masks(self._masks(row)) if self.return_masks else [[] for _ in segments]
            for segment, code in zip(segments, codes, strict=True):
                if segment["category_id"] in index.things:
                    ids = {"id": len(annotations) + 1, "image_id": image_id}
                    annotations.append({**segment, **ids, "segmentation": code})
        categories = [{"id": c, "name": index.categories[c]} for c in index.things]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def check_instances(path: str | Path, panoptic: PanopticIndex, with_masks: bool) -> None:
    """Raise ValueError if an instances file is not of the images and things of a panoptic file."""
    instances = read_coco_index(path, with_segmentations=with_masks)
    beside = f"of {panoptic.path}, which the instances file lacks: their AP could not be computed"
    report(path, [
        (f"images {beside}", np.setdiff1d(panoptic.image_ids, instances.image_ids)),
        (f"thing categories {beside}", sorted(set(panoptic.things) - set(instances.categories))),
        (
            f"categories that are other things in {panoptic.path}",
            [
                f"{i} ({name}, not {panoptic.categories[i]})"
                for i, name in instances.categories.items()
                if i in panoptic.categories and name != panoptic.categories[i]
            ],
        ),
        ("no annotations at all", [] if len(instances.labels) else ["'annotations' is missing or empty"]),
    ])  # fmt: skip
    if with_masks:
        check_masks(instances)


def build(image_set: str, args) -> CocoPanoptic:
    """Build the `train` or `val` part of a dataset in the layout of COCO panoptic.

    Under `--coco_panoptic_path` (default: `--coco_path`) are `panoptic_{image_set}2017/`, the maps, and
    `annotations/panoptic_{image_set}2017.json`; under `--coco_path` are the images, `{image_set}2017/`, and optionally
    `annotations/instances_{image_set}2017.json`, the objects for AP. `--{image_set}_images` and
    `--{image_set}_annotations` override these two. `num_classes` defaults to 250.
    """
    args = with_defaults(args, {**NEW_FLAGS, "coco_path": None, "coco_panoptic_path": None})
    return build_panoptic(image_set, args, args.num_classes or COCO_CLASSES)


def build_panoptic(image_set: str, args, num_classes: int | None) -> CocoPanoptic:
    """Build the dataset as `build` does, for `num_classes` classes (None: from the file); `args` has every flag."""
    if args.coco_path is None:
        raise ValueError(f"where is the data? Give --coco_path, the folder that holds {image_set}2017/")
    root, maps = Path(args.coco_path), Path(args.coco_panoptic_path or args.coco_path)
    for flag, folder in (("--coco_path", root), ("--coco_panoptic_path", maps)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder")
    usual = root / "annotations" / f"instances_{image_set}2017.json"
    return CocoPanoptic(
        getattr(args, f"{image_set}_images", None) or root / f"{image_set}2017",
        maps / f"panoptic_{image_set}2017",
        maps / "annotations" / f"panoptic_{image_set}2017.json",
        instances_file=getattr(args, f"{image_set}_annotations", None) or (usual if usual.is_file() else None),
        **{**build_options(image_set, args), "num_classes": num_classes},
    )
