"""Datasets by name, and the index for evaluation."""

from torch.utils.data import Dataset, Subset

from datasets import coco, coco_panoptic, shapes
from datasets.coco import build
from util.flags import NEW_FLAGS, with_defaults

__all__ = [
    "DATASETS",
    "build",
    "build_coco",
    "build_dataset",
    "get_coco_api_from_dataset",
]

build_coco = build  # as DETR names it

# Functions `build(image_set, args)`; a dataset of your own is one more row.
DATASETS = {
    "coco": coco.build,
    "coco_panoptic": coco_panoptic.build,
    "shapes": shapes.build,
    "shapes_panoptic": shapes.build,
}


def build_dataset(image_set: str, args) -> Dataset:
    """Build the `train` or `val` part of the dataset that the flags describe.

    `args` is any object with the data's flags as attributes, or a dict of them; those that DETR did not have may be
    missing. Raises ValueError or FileNotFoundError for data that cannot be used.
    """
    args = with_defaults(args, NEW_FLAGS)
    if args.dataset_file not in DATASETS:
        raise ValueError(f"no dataset {args.dataset_file!r}: --dataset_file is one of {', '.join(DATASETS)}")
    return DATASETS[args.dataset_file](image_set, args)


def get_coco_api_from_dataset(dataset: Dataset):
    """Return the pycocotools index of a COCO dataset, or of the dataset that a Subset was taken from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset.coco
