"""A signal ends a run at any stage, and what was trained is not lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
import torch

from tests.helpers import TINY, write_coco

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

# The function that is entered at the stage, the call of it at which the signal comes (0: the first), and the signal.
STAGES = {
    "indexing": ("datasets.coco.CocoDetection.__init__", 0, SIGINT),
    "building the model": ("models.detr.DETR.__init__", 0, SIGTERM),
    "first step": ("models.detr.DETR.forward", 0, SIGINT),
    "mid-epoch": ("models.detr.DETR.forward", 1, SIGTERM),
    "saving after the last step": ("util.checkpoint.save_checkpoint", 0, SIGTERM),
    "evaluation": ("datasets.coco_eval.CocoEvaluator.update", 0, SIGINT),
    "evaluation, swallowed by Python": ("datasets.coco_eval.CocoEvaluator.update", 0, SIGINT),
    "drawing": ("util.plot_utils.draw_curves", 0, SIGTERM),
    "saving the finished epoch": ("util.checkpoint.save_checkpoint", 1, SIGINT),
    "evaluation of the last epoch": ("datasets.coco_eval.CocoEvaluator.update", 1, SIGTERM),
}
PROGRAM = """
import gc, importlib, os, signal, sys
name, call, number, swallow, *flags = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell begins without it
module, *path, last = name.split(".")
for part in path:
    try:
        module = importlib.import_module(f"{module}.{part}") if isinstance(module, str) else getattr(module, part)
    except ImportError:
        module = getattr(importlib.import_module(module), part)
    module = module.__name__ if type(module).__name__ == "module" else module
owner = importlib.import_module(module) if isinstance(module, str) else module
original, calls = getattr(owner, last), []
class Swallower:
    def __del__(self):
        os.kill(os.getpid(), int(number))
        for _ in range(100): pass
def signalled(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(call) + 1:
        Swallower() if swallow == "yes" else os.kill(os.getpid(), int(number))
    return original(*args, **kwargs)
import main
for owner_of_name in [owner, *sys.modules.values()]:  # also where `from ... import` has copied it
    if getattr(owner_of_name, last, None) is original:
        setattr(owner_of_name, last, signalled)
main.main(main.parse_args(main.argparse.ArgumentParser(parents=[main.get_args_parser()]), flags))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("signals") / "coco"
    for part, ids in (("train", [1, 2, 3, 4]), ("val", [1, 2])):
        write_coco(root, part, ids, [(i, 1, [4, 4, 20, 30], {}) for i in ids])
    return root


def run(data, folder, stage="", name="main.main", call=99, number=SIGTERM):
    flags = f"{TINY} --coco_path {data} --output_dir {folder} --epochs 2 --batch_size 2 --resume auto --augment flip"
    swallow = "yes" if "swallowed" in stage else "no"
    words = [sys.executable, "-c", PROGRAM, name, str(call), str(int(number)), swallow, *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run(data, folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


@pytest.mark.parametrize("stage", STAGES)
def test_signal_ends_the_run_and_a_resumed_one_has_the_same_weights(stage, data, uninterrupted, tmp_path):
    number = STAGES[stage][2]
    done = run(data, tmp_path, stage, *STAGES[stage])
    assert done.returncode == 128 + number, done.stdout + done.stderr
    assert "swallowed" in stage or "Traceback" not in done.stderr
    assert re.search(f"{number.name}: (exiting|finishing this step)", done.stderr)
    before_training = stage in ("indexing", "building the model")
    assert (tmp_path / "checkpoint.pth").exists() == (not before_training)
    done = run(data, tmp_path)
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(weights[name], value) for name, value in uninterrupted.items())
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]
