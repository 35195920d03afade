"""The fork's dataset: COCO annotations with a quality for each object, and transforms of its own."""

from pathlib import Path

import torch

import datasets.transforms as T
from datasets.coco import CocoDetection


class QualityDetection(CocoDetection):
    """COCO objects and, for each, how well it can be seen."""

    def __getitem__(self, idx):
        image, target = super().__getitem__(idx)
        records = self.coco.loadAnns(self.coco.getAnnIds(imgIds=int(target["image_id"]), iscrowd=False))
        target["quality"] = torch.tensor([record.get("quality", 1.0) for record in records])
        return image, target


def make_transforms(image_set):
    """Build the fork's transforms, in DETR's style."""
    normalize = T.Compose([T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    return T.Compose([T.RandomResize([64], max_size=96), normalize])


def build(image_set, args):
    """Build the `train` or `val` part."""
    root = Path(args.coco_path)
    annotations = root / "annotations" / f"instances_{image_set}2017.json"
    return QualityDetection(
        root / f"{image_set}2017", annotations, transforms=make_transforms(image_set), return_masks=args.masks
    )
