"""COCO detection: images, and their objects as boxes (and masks when asked)."""

import contextlib
import io
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import datasets.transforms as T
from datasets.coco_index import (
    check_against_folder,
    check_classes,
    check_masks,
    check_sizes,
    read_coco_index,
    read_json,
)
from datasets.images import read_image
from datasets.masks import decode_masks

# The published recipe, for a shortest side of 800; other sizes scale it.
TRAIN_SCALES = tuple(range(480, 801, 32))
CROP_SOURCES, CROP_SIDES = (400, 500, 600), (384, 600)
AUGMENTS = ("full", "flip", "none")
NOT_COUNTED = -1  # the epoch of a dataset whose loop does not count them


class CocoDetection(Dataset):
    """A folder of images and a COCO instances file.

    An item is (image, target): after the default transforms a uint8 tensor [3, H, W], and a dict with `boxes` [T, 4],
    `labels` [T] (category ids as they are), `area` [T], `iscrowd` [T], `image_id` [1], `orig_size` and `size` [2]
    (height, width). Crowds are left out, boxes clamped to the image, and those without area dropped. With
    `return_masks` there are `masks` too, bool [T, H, W]; without, no mask is read.

    `transforms` take and return such a pair, with boxes x0 y0 x1 y1 in pixels; None leaves it as it was read. Once
    `set_epoch` has been called (it reaches the workers too), augmentation is drawn from (seed, epoch, index) alone; in
    a loop that never calls it, from Python's `random` as it comes. The files are checked once, here: raises
    FileNotFoundError or ValueError with counts and the first few culprits.
    """

    def __init__(
        self,
        img_folder: str | Path,
        ann_file: str | Path,
        transforms=None,
        return_masks: bool = False,
        num_classes: int | None = None,
        seed: int = 0,
    ):
        self.img_folder, self.ann_file = Path(img_folder), Path(ann_file)
        self.index = read_coco_index(ann_file, with_segmentations=return_masks)
        check_against_folder(self.index, img_folder)
        if return_masks:
            check_masks(self.index)
        self.num_classes = num_classes or self.index.num_classes
        check_classes(self.index, self.num_classes)
        self.transforms, self.return_masks, self.seed = transforms, return_masks, seed
        self._epoch = torch.tensor(NOT_COUNTED).share_memory_()  # one number, seen by every worker

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of another epoch from here on."""
        self._epoch.fill_(epoch)

    @property
    def ids(self) -> list[int]:
        """Image ids in the order of the items."""
        return self.index.image_ids.tolist()

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image, as the annotation file says; ValueError if it does not."""
        check_sizes(self.index)
        return [tuple(size) for size in self.index.sizes.tolist()]

    @property
    def class_names(self) -> dict[int, str]:
        """Category names by id."""
        return self.index.categories

    @cached_property
    def coco(self):
        """The annotation file as pycocotools' COCO, which only the computing of AP needs."""
        return load_coco_api(self.ann_file)

    def __len__(self) -> int:
        return len(self.index.image_ids)

    def __getitem__(self, i: int) -> tuple[Tensor, dict]:
        path = self.img_folder / str(self.index.file_names[i])
        image = read_image(path)
        target = self._target(i, *image.shape[-2:])
        if self.transforms is None:
            return image, target
        epoch = int(self._epoch)
        with T.seeded(self.seed, epoch, i) if epoch != NOT_COUNTED else contextlib.nullcontext():
            return self.transforms(image, target)

    def _target(self, i: int, height: int, width: int) -> dict:
        where = self.index.annotations_of(i)
        corners = torch.from_numpy(self.index.boxes[where].copy()).view(-1, 2, 2)
        corners[:, 1] += corners[:, 0]
        corners = torch.minimum(corners.clamp(min=0), torch.tensor([width, height]))
        crowd = torch.from_numpy(self.index.iscrowd[where])
        keep = (crowd == 0) & (corners[:, 1] > corners[:, 0]).all(1)
        size = torch.tensor([height, width])
        target = {
            "boxes": corners.view(-1, 4)[keep],
            "labels": torch.from_numpy(self.index.labels[where])[keep],
            "image_id": torch.tensor([int(self.index.image_ids[i])]),
            "area": torch.from_numpy(self.index.area[where])[keep],
            "iscrowd": crowd[keep],
            "orig_size": size,
            "size": size.clone(),
        }
        if self.return_masks:
            self._check_size(i, height, width)
            drawn = [self.index.segmentations[where.start + k] for k in keep.nonzero()[:, 0].tolist()]
            name = f"{self.ann_file}: image {self.index.image_ids[i]}"
            target["masks"] = decode_masks(drawn, height, width, name)
        return target

    def _check_size(self, i: int, height: int, width: int) -> None:
        listed = tuple(self.index.sizes[i].tolist())
        if listed != (height, width):
            raise ValueError(
                f"{self.ann_file}: image {self.index.image_ids[i]} is listed as {listed} (height, width), but "
                f"{self.index.file_names[i]} is {(height, width)}: its masks are drawn for another picture"
            )


def load_coco_api(ann_file: str | Path):
    """Read an instances file as pycocotools' COCO."""
    return index_coco(read_json(ann_file))


def index_coco(instances: dict):
    """Make pycocotools' COCO of instances, filling in what COCO's evaluation needs and own files may lack."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = instances
    for record in (*instances["images"], *instances["categories"]):
        record["id"] = int(record["id"])
    annotations = instances["annotations"]
    # The evaluation tells objects apart by their ids, and takes 0 for "not matched".
    ids = [annotation.get("id") for annotation in annotations]
    usable = all(type(i) is int and 0 < i < 2**63 for i in ids) and len(set(ids)) == len(ids)
    for i, annotation in enumerate(annotations, start=1):
        annotation["id"] = annotation["id"] if usable else i
        annotation["image_id"], annotation["category_id"] = int(annotation["image_id"]), int(annotation["category_id"])
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def make_coco_transforms(image_set: str, min_size: int = 800, max_size: int = 1333, augment: str = "full") -> T.Compose:
    """Build the published augmentation for `train`, and the fixed resize for `val`.

    `min_size` is the shortest side at evaluation and the largest drawn in training; the other training sizes keep
    their proportion to it. `augment` is "full", or for data that is meant to be learned as it is "flip" (at the
    evaluation's size) or "none".
    """
    if image_set not in ("train", "val"):
        raise ValueError(f"no transforms for image set {image_set!r}: choose train or val")
    if augment not in AUGMENTS:
        raise ValueError(f"no augmentation {augment!r}: choose {', '.join(AUGMENTS)}")
    scale = min_size / 800
    if image_set == "train" and augment == "full":
        scales = [round(side * scale) for side in TRAIN_SCALES]
        steps = [
            T.RandomHorizontalFlip(),
            T.RandomSelect(
                T.RandomResize(scales, max_size),
                T.Compose(
                    [
                        T.RandomResize([round(side * scale) for side in CROP_SOURCES]),
                        T.RandomSizeCrop(*(round(side * scale) for side in CROP_SIDES)),
                        T.RandomResize(scales, max_size),
                    ]
                ),
            ),
        ]
    else:
        flip = [T.RandomHorizontalFlip()] if image_set == "train" and augment == "flip" else []
        steps = [*flip, T.RandomResize([min_size], max_size)]
    return T.Compose([*steps, T.PILToTensor(), T.RelativeBoxes()])


def build(
    image_set: str,
    coco_path: str | Path | None = None,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    transforms: T.Compose | None = None,
    **options,
) -> CocoDetection:
    """Build the `train` or `val` part of a dataset in COCO's layout, or of an image folder and annotation file.

    COCO's layout is `{image_set}2017/` and `annotations/instances_{image_set}2017.json` under `coco_path`; `images` and
    `annotations` override either. `transforms` are by default the published ones, and `options` CocoDetection's.
    """
    if not (images and annotations):
        if coco_path is None:
            raise ValueError(
                f"where is the data? Give --coco_path, the folder that holds {image_set}2017/ and annotations/, "
                f"or --{image_set}_images and --{image_set}_annotations"
            )
        root = Path(coco_path)
        if not root.is_dir():
            raise FileNotFoundError(f"--coco_path {root}: no such folder")
        images = images or root / f"{image_set}2017"
        annotations = annotations or root / "annotations" / f"instances_{image_set}2017.json"
    return CocoDetection(images, annotations, transforms or make_coco_transforms(image_set), **options)
