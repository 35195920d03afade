"""COCO detection: images, and their objects as boxes (and masks when asked)."""

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import torch
import torchvision
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import VisionDataset

import datasets.transforms as T
from datasets.coco_api import area_of, load_coco_api
from datasets.coco_api import index_coco as index_coco  # the import path in docs/extending.md
from datasets.coco_checks import check_classes, check_masks, check_sample, check_sizes, warn_of
from datasets.coco_index import read_coco_index
from datasets.files import check_against_folder
from datasets.images import allow_large_images, read_image, read_pixels
from datasets.masks import decode_masks
from util.flags import NEW_FLAGS, with_defaults
from util.text import printable

# The published recipe, for a shortest side of 800; other sizes scale it.
TRAIN_SCALES = tuple(range(480, 801, 32))
CROP_SOURCES, CROP_SIDES = (400, 500, 600), (384, 600)
STRONG_SCALES, STRONG_CROP_SIDES = tuple(range(320, 801, 32)), (256, 600)  # of --augment strong
LEAST_SIDE = 0.6  # shortest side of a crop of --augment crop, as a share of the image's side
AUGMENTS = ("full", "strong", "crop", "flip", "none")
IMAGE_DTYPES = ("float32", "uint8")
ALLOWED = ("large_images", "outside_paths")  # what --allow may name
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbone's weights expect


class CocoDetection(torchvision.datasets.CocoDetection):
    """A folder of images and a COCO instances file.

    An item is (image, target): a PIL image, and a dict with `boxes` [T, 4] (x0 y0 x1 y1 in pixels), `labels` [T]
    (category ids as they are), `area` [T], `iscrowd` [T], `image_id` [1], `orig_size` and `size` [2] (height, width);
    with `return_masks` also `masks`, bool [T, H, W]. Crowds are left out, boxes clamped to the image, and those without
    area dropped. `transforms` take and return such a pair; None leaves it unchanged. With `as_tensor` they get a uint8
    tensor [3, H, W] instead of a PIL image, which is faster. `allow` may name "large_images", beyond PIL's limit, and
    "outside_paths", file names that lead out of the folder.

    Random transforms draw from Python's `random`; the training loader makes them repeatable. The files are checked
    once, here: raises FileNotFoundError, or ValueError with counts and examples. `coco`, pycocotools' index, is built
    when it is first used.
    """

    def __init__(
        self,
        img_folder: str | Path,
        ann_file: str | Path,
        transforms=None,
        return_masks: bool = False,
        num_classes: int | None = None,
        as_tensor: bool = False,
        allow: Collection[str] = (),
    ):
        VisionDataset.__init__(self, img_folder)  # torchvision's own constructor would read the file into dicts
        self.img_folder, self.ann_file = Path(img_folder), Path(ann_file)
        self._transforms, self.return_masks, self.as_tensor = transforms, return_masks, as_tensor
        self.allow = allow
        self.prepare = ConvertCocoPolysToMask(return_masks)
        self.index = self._read_index()
        self.ids = self.index.image_ids.tolist()
        self.num_classes = self.index.num_classes if num_classes is None else num_classes
        check_classes(self.index, self.num_classes)
        check_sample(self.index, self.img_folder)
        warn_of(self.index)

    def _read_index(self):
        index = read_coco_index(self.ann_file, with_segmentations=self.return_masks)
        self._check_files(index.file_names, self.img_folder)
        if self.return_masks:
            check_masks(index)
        return index

    def _check_files(self, names: Iterable[str], folder: Path, what: str = "images") -> None:
        check_against_folder(self.ann_file, names, folder, what, outside="outside_paths" in self.allow)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image, as listed in the annotation file; ValueError if any is missing."""
        check_sizes(self.index)
        return [tuple(self.index.sizes[self.index.row_of(i)].tolist()) for i in self.ids]

    @property
    def class_names(self) -> dict[int, str]:
        """Category names by id."""
        return self.index.categories

    @cached_property
    def coco(self):
        """The annotation file as pycocotools' COCO."""
        return load_coco_api(self.ann_file)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, idx: int) -> tuple[Image.Image | Tensor, dict]:
        if "large_images" in self.allow:
            allow_large_images()  # here, because this may be a worker process
        image_id = self.ids[idx]
        image = self._load_tensor(image_id) if self.as_tensor else self._load_image(image_id)
        self._check_size(image_id, F.get_size(image))
        image, target = self._with_target(image, image_id)
        if self._transforms is None:
            return image, target
        return self._transforms(image, target)

    def _with_target(self, image: Image.Image | Tensor, image_id: int) -> tuple[Image.Image | Tensor, dict]:
        """Return the image with the target that training uses."""
        annotations = self.index.annotations(self.index.row_of(image_id))
        try:
            return self.prepare(image, {"image_id": image_id, "annotations": annotations})
        except ValueError as error:
            raise ValueError(f"{self.ann_file}: {error}") from error

    def _path(self, image_id: int) -> Path:
        return self.img_folder / str(self.index.file_names[self.index.row_of(image_id)])

    def _load_image(self, id: int) -> Image.Image:
        return Image.fromarray(read_pixels(self._path(id)))

    def _load_tensor(self, image_id: int) -> Tensor:
        return read_image(self._path(image_id))

    def _check_size(self, image_id: int, size: list[int]) -> None:
        """Raise ValueError if the file lists another size than the image has: boxes and masks would not fit it."""
        listed, path = self.index.sizes[self.index.row_of(image_id)].tolist(), printable(self._path(image_id))
        if min(listed) > 0 and listed != list(size):
            raise ValueError(
                f"{path} is {size} (height, width), but {self.ann_file} lists image {image_id} as "
                f"{listed}: boxes and masks belong to another version of the image (resized or rotated?)"
            )


class ConvertCocoPolysToMask:
    """Convert COCO's annotations of an image to a target of tensors (see CocoDetection).

    Takes and returns (image, target). The given target is a dict of `image_id` and `annotations`, COCO's records.
    """

    def __init__(self, return_masks: bool = False):
        self.return_masks = return_masks

    def __call__(self, image: Image.Image | Tensor, target: dict) -> tuple[Image.Image | Tensor, dict]:
        height, width = F.get_size(image)
        image_id = torch.as_tensor(target["image_id"]).reshape(1)
        objects = [record for record in target["annotations"] if not record.get("iscrowd")]
        boxes = torch.tensor([record["bbox"] for record in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        columns = {
            "boxes": torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2)),
            "labels": torch.tensor([record["category_id"] for record in objects], dtype=torch.int64),
            "area": torch.tensor([area_of(record) for record in objects], dtype=torch.float32),
            "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
        }
        if self.return_masks:
            codes = [record["segmentation"] for record in objects]
            columns["masks"] = decode_masks(codes, height, width, f"image {image_id.item()}")
        if objects and "keypoints" in objects[0]:
            points = torch.tensor([record["keypoints"] for record in objects], dtype=torch.float32)
            columns["keypoints"] = points.reshape(len(objects), -1, 3)
        return image, make_target(image_id, (height, width), columns)


def make_target(image_id: Tensor, size: tuple[int, int], columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the target of an image of `size` (height, width) from `columns` with a row for each object.

    Objects whose box has no width or no height are dropped.
    """
    boxes = columns["boxes"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    target = {name: column[keep] for name, column in columns.items()}
    return target | {"image_id": image_id, "orig_size": torch.tensor(size), "size": torch.tensor(size)}


def convert_coco_poly_to_mask(segmentations: Iterable, height: int, width: int) -> Tensor:
    """Draw the segmentations of an image: bool [T, height, width]."""
    return decode_masks(segmentations, height, width, "the annotations")


def make_coco_transforms(
    image_set: str, min_size: int = 800, max_size: int = 1333, augment: str = "full", image_dtype: str = "float32"
) -> T.Compose:
    """Build the published augmentation for `train`, and the fixed resize for `val`.

    `min_size` is the shortest side at evaluation and the largest one in training; the other training sizes keep
    their proportion to it. `augment` is "full", "strong" (more sizes and crops, and changes of colour), or, at the
    evaluation's size, "crop" (flips, changes of colour, enlarged crops), "flip" (only flips) or "none". Images come out
    as "float32", normalised with ImageNet's mean and deviation, or as "uint8", which the model normalises itself.
    """
    for value, known in ((image_set, ("train", "val")), (augment, AUGMENTS), (image_dtype, IMAGE_DTYPES)):
        if value not in known:
            raise ValueError(f"no transforms for {value!r}: choose one of {', '.join(known)}")
    if not 1 <= min_size <= max_size:
        raise ValueError(f"min_size {min_size}, max_size {max_size}: at least 1, and max_size not below min_size")
    steps = [T.RandomResize([min_size], max_size)]
    if image_set == "train" and augment == "full":
        steps = [T.RandomHorizontalFlip(), _random_sizes(min_size / 800, max_size, TRAIN_SCALES, CROP_SIDES)]
    elif image_set == "train" and augment == "strong":
        sizes = _random_sizes(min_size / 800, max_size, STRONG_SCALES, STRONG_CROP_SIDES)
        steps = [T.RandomHorizontalFlip(), T.RandomColours(), sizes]
    elif image_set == "train" and augment == "crop":
        # Colours come last: the image is smaller then.
        steps = [T.RandomHorizontalFlip(), T.RandomResizedCrop(LEAST_SIDE, min_size, max_size), T.RandomColours()]
    elif image_set == "train" and augment == "flip":
        steps = [T.RandomHorizontalFlip(), *steps]
    last = [T.RelativeBoxes()] if image_dtype == "uint8" else [T.ToTensor(), T.Normalize(MEAN, STD)]
    return T.Compose([T.PILToTensor(), *steps, *last])


def _random_sizes(scale: float, max_size: int, scales: Iterable[int], crop_sides: Iterable[int]) -> T.RandomSelect:
    """Build the paper's random resize, half of the time after a random crop; `scale` multiplies all sizes."""
    resize = T.RandomResize([round(side * scale) for side in scales], max_size)
    crop = [
        T.RandomResize([round(side * scale) for side in CROP_SOURCES]),
        T.RandomSizeCrop(*(round(side * scale) for side in crop_sides)),
    ]
    return T.RandomSelect(resize, T.Compose([*crop, resize]))


def build_options(image_set: str, args) -> dict:
    """Return the arguments of CocoDetection that flags set; `args` has all of NEW_FLAGS."""
    return {
        "transforms": make_coco_transforms(image_set, args.min_size, args.max_size, args.augment, args.image_dtype),
        "return_masks": args.masks,
        "num_classes": args.num_classes,
        "as_tensor": True,
        "allow": args.allow or (),
    }


def build(image_set: str, args) -> CocoDetection:
    """Build the `train` or `val` part of a dataset in COCO's layout, or of an image folder and annotation file.

    COCO's layout is `{image_set}2017/` and `annotations/instances_{image_set}2017.json` under `--coco_path`;
    `--{image_set}_images` and `--{image_set}_annotations` override either.
    """
    args = with_defaults(args, {**NEW_FLAGS, "coco_path": None})
    images = getattr(args, f"{image_set}_images", None)
    annotations = getattr(args, f"{image_set}_annotations", None)
    if not (images and annotations):
        if args.coco_path is None:
            raise ValueError(
                f"where is the data? Give --coco_path, the folder that holds {image_set}2017/ and annotations/, "
                f"or --{image_set}_images and --{image_set}_annotations"
            )
        root = Path(args.coco_path)
        if not root.is_dir():
            raise FileNotFoundError(f"--coco_path {root}: no such folder")
        images = images or root / f"{image_set}2017"
        annotations = annotations or root / "annotations" / f"instances_{image_set}2017.json"
    return CocoDetection(images, annotations, **build_options(image_set, args))
