"""Datasets by name, and what all of them share: default flags, the number of classes, the index for evaluation."""

from torch.utils.data import Dataset, Subset

from datasets import coco, coco_panoptic, shapes
from datasets.coco import build
from util.flags import with_defaults

__all__ = [
    "DATASETS",
    "NEW_FLAGS",
    "build",
    "build_coco",
    "build_dataset",
    "get_coco_api_from_dataset",
    "num_classes_of",
]

build_coco = build  # as DETR names it

# Functions `build(image_set, args)`; a dataset of your own is one more row.
DATASETS = {
    "coco": coco.build,
    "coco_panoptic": coco_panoptic.build,
    "shapes": shapes.build,
    "shapes_panoptic": shapes.build,
}

# The flags that DETR did not have. A caller whose `args` lacks one gets its default.
NEW_FLAGS = {**coco.NEW_FLAGS, **shapes.NEW_FLAGS}
COCO_CLASSES = 91  # the largest category id of COCO's objects + 1


def build_dataset(image_set: str, args) -> Dataset:
    """Build the `train` or `val` part of the dataset that the flags describe.

    `args` is any object with the data's flags as attributes, or a dict of them; those that DETR did not have may be
    missing. Raises ValueError or FileNotFoundError for data that cannot be used.
    """
    args = with_defaults(args, NEW_FLAGS)
    if args.dataset_file not in DATASETS:
        raise ValueError(f"no dataset {args.dataset_file!r}: --dataset_file is one of {', '.join(DATASETS)}")
    return DATASETS[args.dataset_file](image_set, args)


def num_classes_of(
    flag: int | None = None, checkpoint: int | None = None, dataset: Dataset | None = None, dataset_file: str = "coco"
) -> int:
    """Return the number of classes: of the flag, else of the checkpoint, else of the dataset, else of COCO's data."""
    if flag or checkpoint:
        return flag or checkpoint
    if dataset is not None:
        return dataset.num_classes
    return coco_panoptic.COCO_CLASSES if dataset_file == "coco_panoptic" else COCO_CLASSES


def get_coco_api_from_dataset(dataset: Dataset):
    """Return the pycocotools index of a COCO dataset, or of the dataset that a Subset was taken from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset.coco
