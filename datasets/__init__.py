"""A dataset by name."""

import argparse

from torch.utils.data import Dataset, Subset

from datasets import coco, coco_panoptic, shapes

DATASETS = {
    "coco": coco.build,
    "shapes": shapes.build,
    "coco_panoptic": coco_panoptic.build,
    "shapes_panoptic": shapes.build,
}

# The flags that DETR did not have. A caller whose `args` knows only the old ones gets these.
NEW_FLAGS = {
    "num_classes": None,
    "min_size": 800,
    "max_size": 1333,
    "augment": "full",
    "train_images": None,
    "train_annotations": None,
    "val_images": None,
    "val_annotations": None,
    "shapes_train": 4000,
    "shapes_val": 250,
    "shapes_size": 192,
    "shapes_classes": 4,
    "shapes_seed": 0,
}


def build_dataset(image_set: str, args) -> Dataset:
    """Build the `train` or `val` part of the dataset that the flags describe.

    `args` is any object with the data's flags as attributes, or a dict of them; those DETR did not have may be missing.
    Raises ValueError or FileNotFoundError for data that cannot be used.
    """
    args = argparse.Namespace(**args) if isinstance(args, dict) else args
    flag = {name: getattr(args, name, default) for name, default in NEW_FLAGS.items()}
    if args.dataset_file not in DATASETS:
        raise ValueError(f"no dataset {args.dataset_file!r}: --dataset_file is one of {', '.join(DATASETS)}")
    transforms = coco.make_coco_transforms(image_set, flag["min_size"], flag["max_size"], flag["augment"])
    options = {"transforms": transforms, "num_classes": flag["num_classes"]}
    options |= {"return_masks": args.masks, "seed": getattr(args, "seed", 42)}
    if args.dataset_file.startswith("shapes"):
        counts = {"train": flag["shapes_train"], "val": flag["shapes_val"]}
        scene = (flag["shapes_size"], flag["shapes_classes"], flag["shapes_seed"])
        panoptic = args.dataset_file == "shapes_panoptic"
        return shapes.build(image_set, args.coco_path, counts, *scene, panoptic, **options)
    images, annotations = flag[f"{image_set}_images"], flag[f"{image_set}_annotations"]
    if args.dataset_file == "coco_panoptic":
        maps = args.coco_panoptic_path
        return coco_panoptic.build(image_set, args.coco_path, maps, images=images, instances=annotations, **options)
    return coco.build(image_set, args.coco_path, images=images, annotations=annotations, **options)


def get_coco_api_from_dataset(dataset: Dataset):
    """Return the pycocotools index of a COCO dataset, or of the dataset a Subset was taken from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset.coco
