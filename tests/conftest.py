"""What several tests need: flags, a small COCO dataset, and quiet threads."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

import main

torch.set_num_threads(1)  # small tensors: more threads would only wait for each other

TINY = (
    "--device cpu --backbone resnet18 --backbone_weights none --hidden_dim 32 --nheads 4 --dim_feedforward 64 "
    "--enc_layers 1 --dec_layers 2 --num_queries 8 --min_size 64 --max_size 96 --num_workers 0"
)

JOB = "--executor local --ngpus 2 --cpus_per_task 1 --mem_gb 2 --num_workers 1 --batch_size 1 --save_every_steps 1"


def parse(flags: str = ""):
    """Flags of a model small enough to train in a test, and more."""
    return argparse.ArgumentParser(parents=[main.get_args_parser()]).parse_args([*TINY.split(), *flags.split()])


def write_coco(root, part, images, annotations, categories=None, sizes=(48, 64)):
    """Write a dataset in COCO's layout: image ids, and annotations as (image id, category id, box, more)."""
    folder = root / f"{part}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(len(images))
    height, width = sizes
    for i in images:
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(height // 6, 0).repeat(width // 8, 1)
        Image.fromarray(pixels).save(folder / f"{i:012}.jpg")
    records = [
        {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, **more}
        for n, (i, c, box, more) in enumerate(annotations, 1)
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "height": height, "width": width} for i in images],
        "annotations": records,
        "categories": categories or [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def coco_root(tmp_path):
    """Four training and three validation images; one of each has no objects, one object is a crowd."""
    objects = [
        (11, 1, [4, 4, 20, 30], {}),
        (11, 3, [30, 10, 25, 25], {}),
        (12, 1, [10, 5, 30, 30], {}),
        (12, 1, [0, 0, 60, 40], {"iscrowd": 1}),
        (14, 3, [5, 20, 40, 20], {}),
    ]
    write_coco(tmp_path / "coco", "train", [11, 12, 13, 14], objects)
    write_coco(tmp_path / "coco", "val", [21, 22, 23], [(i + 10, c, b, m) for i, c, b, m in objects if i < 13])
    return tmp_path / "coco"


@pytest.fixture(scope="session")
def job_flags(tmp_path_factory):
    """Data of 16 images, and the flags of a run of two epochs of 8 steps on two processes."""
    root = tmp_path_factory.mktemp("job")
    rng = np.random.default_rng(0)
    objects = [(i, int(rng.integers(1, 3)), [int(x) for x in rng.integers(4, 24, 4)], {}) for i in range(1, 17)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    write_coco(root / "coco", "train", range(1, 17), objects, categories)
    write_coco(root / "coco", "val", range(1, 5), objects[:4], categories)
    return f"{TINY} {JOB} --coco_path {root}/coco --epochs 2"


def assert_same_weights(a, b):
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (a, b))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
