"""Datasets by name, and the index for evaluation."""

from torch.utils.data import Dataset, Subset

from datasets import coco, coco_panoptic, shapes
from datasets.coco import build
from datasets.coco_checks import compare_categories, warn_of_few_images
from util.checkpoint import count_classes
from util.flags import NEW_FLAGS, with_defaults, with_values

__all__ = [
    "DATASETS",
    "build",
    "build_coco",
    "build_dataset",
    "build_datasets",
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


def build_datasets(args, checkpoint: dict | None) -> tuple[Dataset | None, Dataset, int]:
    """Build the training set (None for --eval) and the validation set; return them and the number of classes.

    The number is --num_classes, else the checkpoint's, else that of the annotations.
    """
    num_classes = args.num_classes or (count_classes(checkpoint["model"]) if checkpoint else None)
    train_set = None
    if not args.eval:
        train_set = build_dataset("train", with_values(args, num_classes=num_classes))
        num_classes = num_classes or train_set.num_classes
    val_set = build_dataset("val", with_values(args, num_classes=num_classes))
    if train_set:
        if not (checkpoint or args.finetune or args.frozen_weights):
            warn_of_few_images(len(train_set), args.recipe)
        compare_categories(train_set.class_names, "the training data", val_set.class_names, "the validation data")
    return train_set, val_set, num_classes or val_set.num_classes


def get_coco_api_from_dataset(dataset: Dataset):
    """Return the pycocotools index of a COCO dataset, or of the dataset that a Subset was taken from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset.coco
