"""Fixtures shared by all tests, and quiet threads."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from models import build_model
from tests.helpers import JOB, TINY, parse, write_coco
from tools import export, export_graph
from util.checkpoint import save_checkpoint
from util.cli import exit_status

torch.set_num_threads(1)  # small tensors: more threads would only wait for each other


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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """One checkpoint with boxes and one with masks, of models that are sure of some objects."""
    folder = tmp_path_factory.mktemp("checkpoints")
    masks = "--num_classes 4 --masks --hidden_dim 128 --nheads 8 --dataset_file coco_panoptic"
    for name, flags in ("boxes", "--num_classes 4"), ("masks", masks):
        torch.manual_seed(0)
        args = parse(flags)
        model = build_model(args)[0]
        detr = getattr(model, "detr", model)
        detr.class_embed.bias.data[3] += 3
        detr.query_embed.weight.data *= 10  # so that the queries differ
        state = {"model": model.state_dict(), "args": vars(args), "class_names": {1: "cat", 3: "dog"}}
        save_checkpoint(state, folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="session")
def exported(checkpoints):
    """A function that exports once for all tests: (model, format, flags) -> (file, exit status, printed text)."""
    files = {}

    def run(model, file_format, *flags):
        key = (model, file_format, *flags)
        if key not in files:
            path = checkpoints / f"{len(files)}{export_graph.SUFFIXES[file_format]}"
            words = ["--checkpoint", f"{checkpoints}/{model}.pth", "--format", file_format, "--output", str(path)]
            printed = io.StringIO()
            with redirect_stdout(printed):
                status = exit_status(lambda: export.main([*words, *flags]))
            files[key] = (path, status, printed.getvalue())
        return files[key]

    return run
