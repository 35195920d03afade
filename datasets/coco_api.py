"""pycocotools' index of an annotation file, as COCO's evaluation takes it."""

import contextlib
import io
from pathlib import Path

from datasets.json_file import read_json


def area_of(record: dict) -> float:
    """Return the area of an annotation, by default that of its box."""
    area = record.get("area")
    width, height = record["bbox"][2:]
    return max(width, 0) * max(height, 0) if area is None else area


def load_coco_api(ann_file: str | Path):
    """Read an instances file as pycocotools' COCO."""
    return index_coco(read_json(ann_file))


def index_coco(instances: dict):
    """Make pycocotools' COCO of instances, and add entries that COCO's evaluation needs where they are missing."""
    from pycocotools.coco import COCO

    coco = COCO()
    annotations = instances.setdefault("annotations", [])
    coco.dataset = instances
    for record in (*instances["images"], *instances["categories"]):
        record["id"] = int(record["id"])
    # The evaluation tells objects apart by their ids, and takes 0 for "not matched".
    ids = [annotation.get("id") for annotation in annotations]
    usable = all(type(i) is int and 0 < i < 2**63 for i in ids) and len(set(ids)) == len(ids)
    for i, annotation in enumerate(annotations, start=1):
        annotation["id"] = annotation["id"] if usable else i
        annotation["image_id"], annotation["category_id"] = int(annotation["image_id"]), int(annotation["category_id"])
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        annotation["area"] = area_of(annotation)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
