"""COCO panoptic: every pixel's segment, things and stuff alike, as objects with a class, a box and a mask."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets import transforms as T
from datasets.coco import NOT_COUNTED, CocoDetection, index_coco, load_coco_api, make_coco_transforms
from datasets.coco_index import check_against_folder, check_classes
from datasets.masks import check_segment_ids, encode_masks, read_segment_ids
from datasets.panoptic_index import read_panoptic_index
from util.box_ops import masks_to_boxes
from util.logger import logger

COCO_CLASSES = 250  # what the published models have room for; the ids go to 200


class CocoPanoptic(CocoDetection):
    """A folder of images, a folder of panoptic maps, and a COCO panoptic file.

    An item is CocoDetection's, whose objects are segments, stuff included. With `return_masks`, masks are read from the
    map and boxes are those of the masks; without, the maps stay closed and boxes come from the file. Either way corners
    are coordinates of outermost pixels, so that a segment one pixel thin has no area and is dropped, like crowds are.
    AP (of the things) is judged by the objects of `instances_file`, or without one by the segments themselves.

    Files are checked here, once, except for what is in the maps: a map whose ids are not those of the file raises
    ValueError when it is read.
    """

    def __init__(
        self,
        img_folder: str | Path,
        ann_folder: str | Path,
        ann_file: str | Path,
        transforms=None,
        return_masks: bool = True,
        num_classes: int | None = None,
        seed: int = 0,
        instances_file: str | Path | None = None,
    ):
        self.img_folder, self.ann_folder, self.ann_file = Path(img_folder), Path(ann_folder), Path(ann_file)
        self.instances_file = instances_file
        self.index = read_panoptic_index(ann_file)
        check_against_folder(self.index, img_folder)
        check_against_folder(self.index, ann_folder, self.index.map_names, "panoptic maps")
        self.num_classes = num_classes or self.index.num_classes
        check_classes(self.index, self.num_classes)
        self.transforms, self.return_masks, self.seed = transforms, return_masks, seed
        self._epoch = torch.tensor(NOT_COUNTED).share_memory_()

    @property
    def thing_classes(self) -> list[int]:
        """Ids of the categories that are things."""
        return list(self.index.things)

    @cached_property
    def coco(self):
        """The things as pycocotools' COCO, which only the computing of AP needs."""
        if self.instances_file:
            return load_coco_api(self.instances_file)
        return index_coco(self._instances())

    def _target(self, i: int, height: int, width: int) -> dict:
        where = self.index.annotations_of(i)
        crowd = torch.from_numpy(self.index.iscrowd[where])
        if self.return_masks:
            masks = self._masks(i, height, width)
            boxes = masks_to_boxes(masks)
        else:
            boxes = torch.from_numpy(self.index.boxes[where].copy())
            boxes[:, 2:] += boxes[:, :2] - 1
        keep = (crowd == 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        size = torch.tensor([height, width])
        target = {
            "boxes": boxes[keep],
            "labels": torch.from_numpy(self.index.labels[where])[keep],
            "image_id": torch.tensor([int(self.index.image_ids[i])]),
            "area": torch.from_numpy(self.index.area[where])[keep],
            "iscrowd": crowd[keep],
            "orig_size": size,
            "size": size.clone(),
        }
        return target | ({"masks": masks[keep]} if self.return_masks else {})

    def _masks(self, i: int, height: int, width: int) -> Tensor:
        """Read the masks of all segments of image i from its map: bool [T, H, W]."""
        path = self.ann_folder / str(self.index.map_names[i])
        painted = read_segment_ids(path)
        if painted.shape != (height, width):
            raise ValueError(f"{path}: a map of {painted.shape} (height, width) for an image of {(height, width)}")
        listed = self.index.segment_ids[self.index.annotations_of(i)]
        masks = painted == listed[:, None, None]
        complete = masks.any((1, 2)).all() and masks.sum() == np.count_nonzero(painted)
        if not complete:
            check_segment_ids(str(path), np.unique(painted).tolist(), listed.tolist())
        return torch.from_numpy(masks)

    def _instances(self) -> dict:
        """Make COCO's instances of the things: boxes from the file and, if there are to be masks, from the maps."""
        index = self.index
        logger.info(f"no instances file beside {self.ann_file}: AP is judged by its segments that are things")
        annotations = []
        for i, (image_id, (height, width)) in enumerate(
            zip(index.image_ids.tolist(), index.sizes.tolist(), strict=True)
        ):
            where = index.annotations_of(i)
            codes = (
                encode_masks(self._masks(i, height, width)) if self.return_masks else [[]] * (where.stop - where.start)
            )
            for k, code in zip(range(where.start, where.stop), codes, strict=True):
                if int(index.labels[k]) in index.things:
                    record = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(index.labels[k])}
                    record |= {"bbox": index.boxes[k].tolist(), "area": float(index.area[k])}
                    annotations.append(record | {"iscrowd": int(index.iscrowd[k]), "segmentation": code})
        images = [
            {"id": image_id, "file_name": str(name), "height": height, "width": width}
            for image_id, name, (height, width) in zip(
                index.image_ids.tolist(), index.file_names, index.sizes.tolist(), strict=True
            )
        ]
        categories = [{"id": c, "name": index.categories[c]} for c in index.things]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def build(
    image_set: str,
    coco_path: str | Path | None = None,
    panoptic_path: str | Path | None = None,
    images: str | Path | None = None,
    instances: str | Path | None = None,
    transforms: T.Compose | None = None,
    **options,
) -> CocoPanoptic:
    """Build the `train` or `val` part of a dataset in the layout of COCO panoptic.

    Under `panoptic_path` (default: `coco_path`) are `panoptic_{image_set}2017/`, the maps, and
    `annotations/panoptic_{image_set}2017.json`; under `coco_path` are the images, `{image_set}2017/`, and maybe
    `annotations/instances_{image_set}2017.json`, whose objects AP is judged by. `images` and `instances` override
    these two. `transforms` are by default the published ones, and `options` CocoPanoptic's; `num_classes` defaults to
    250.
    """
    if coco_path is None:
        raise ValueError(f"where is the data? Give --coco_path, the folder that holds {image_set}2017/")
    root, maps = Path(coco_path), Path(panoptic_path or coco_path)
    for flag, folder in (("--coco_path", root), ("--coco_panoptic_path", maps)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder")
    usual = root / "annotations" / f"instances_{image_set}2017.json"
    options["num_classes"] = options.get("num_classes") or COCO_CLASSES
    return CocoPanoptic(
        images or root / f"{image_set}2017",
        maps / f"panoptic_{image_set}2017",
        maps / "annotations" / f"panoptic_{image_set}2017.json",
        transforms or make_coco_transforms(image_set),
        instances_file=instances or (usual if usual.is_file() else None),
        **options,
    )
