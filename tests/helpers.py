"""Helpers shared by tests: flags of a tiny model, a small COCO dataset, and comparisons."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main
from models import build_model
from util.huggingface import to_huggingface
from util.huggingface_config import config_of, processor_of
from util.recipes import parse_args

TINY = (
    "--device cpu --backbone resnet18 --backbone_weights none --hidden_dim 32 --nheads 4 --dim_feedforward 64 "
    "--enc_layers 1 --dec_layers 2 --num_queries 8 --min_size 64 --max_size 96 --num_workers 0"
)

JOB = "--executor local --ngpus 2 --cpus_per_task 1 --mem_gb 2 --num_workers 1 --batch_size 1 --save_every_steps 1"

PANOPTIC_CATEGORIES = [
    {"id": 1, "name": "cat", "isthing": 1},
    {"id": 2, "name": "dog", "isthing": 1},
    {"id": 7, "name": "sky", "isthing": 0},
]


def parse(flags: str = ""):
    """Flags of a model small enough to train in a test, and more."""
    parser = argparse.ArgumentParser(parents=[main.get_args_parser()])
    return parse_args(parser, [*TINY.split(), *flags.split()])


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


def assert_same_weights(a, b):
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (a, b))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def write_panoptic(root, maps, part="val"):
    """Write maps {image id: (ids [H, W], {segment id: (category, crowd)})} with images of noise, in COCO's layout."""
    for folder in (f"{part}2017", f"panoptic_{part}2017", "annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id, (ids, classes) in maps.items():
        ids = np.asarray(ids)
        noise = np.random.default_rng(image_id).integers(0, 256, (*ids.shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{part}2017" / f"{image_id}.jpg")
        colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
        Image.fromarray(colours).save(root / f"panoptic_{part}2017" / f"{image_id}.png")
        segments = []
        for segment, (category, crowd) in classes.items():
            rows, columns = np.nonzero(ids == segment)
            x, y = int(columns.min()), int(rows.min())
            box = [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]
            segments.append({"id": segment, "category_id": category, "iscrowd": crowd, "bbox": box, "area": len(rows)})
        height, width = ids.shape
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width})
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": PANOPTIC_CATEGORIES}
    (root / "annotations" / f"panoptic_{part}2017.json").write_text(json.dumps(content))


def matching_scene(queries=5, sizes=(3, 0, 2), layers=2, classes=4, seed=0):
    """Build random logits [L, B, Q, K+1], boxes [L, B, Q, 4] and targets to match them with."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, len(sizes), queries, classes + 1, generator=generator)
    boxes = torch.rand(layers, len(sizes), queries, 4, generator=generator) * 0.3 + 0.2
    targets = [
        {"labels": torch.randint(0, classes, (n,), generator=generator),
         "boxes": torch.rand(n, 4, generator=generator) * 0.3 + 0.2}
        for n in sizes
    ]  # fmt: skip
    return logits, boxes, targets


def layers_of(logits, boxes):
    """Logits and boxes [L, B, Q, ...] -> the outputs of each decoder layer."""
    return [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]


def loader_of(images_per_step=2):
    """What build_run needs of a data loader."""
    return SimpleNamespace(batch_sampler=SimpleNamespace(images_per_step=images_per_step))


def small_state(flags=""):
    """Build the checkpoint of a tiny model with 4 classes."""
    torch.manual_seed(0)
    args = parse(f"{flags} --num_classes 4")
    return {"model": build_model(args)[0].state_dict(), "args": vars(args), "class_names": {1: "cat", 3: "dog"}}


def write_transformers_folder(state, folder, layout="timm", classes=4):
    """Write a folder of transformers with pytorch_model.bin, which needs no other package."""
    folder.mkdir()
    config = config_of(state["args"], classes, state["class_names"], layout == "transformers")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_of(state["args"])))
    torch.save(to_huggingface(state["model"], layout), folder / "pytorch_model.bin")
    return folder


def needs_onnx():
    """Skip the test where the packages of ONNX files are not installed."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"needs {name}: pip install -r requirements-export.txt")
