"""The benchmark measures what it says, on models small enough for a test; no figure of it is asserted."""

import json
import subprocess
import sys

import pytest
import torch

import engine
from tools import benchmark, benchmark_data
from tools.benchmark_sides import Ours, Transformers, some_targets
from tools.gauges import count_flops

SMALL = "--models resnet18 --batch 1 --size 64x80 --device cpu --rounds 1 --queries 5"


@pytest.mark.parametrize("what, column", [
    ("forward", "gflops"), ("train", "images_per_s"), ("split", "backward"), ("criterion", "s"), ("cost", "axis"),
    ("graphs", "graphs"),
])  # fmt: skip
def test_every_measurement_gives_its_figures(what, column, monkeypatch):
    monkeypatch.setattr(engine, "compile_network", lambda model: model.compile(backend="eager"))  # in seconds
    rows = list(benchmark.run(benchmark.parse_args([what, *SMALL.split()]), Ours))
    assert rows and all(column in row and row["what"] == what for row in rows)
    assert all(row["s"] > 0 for row in rows if "s" in row)


def test_the_data_is_measured_beside_the_usual_way(coco_root, monkeypatch):
    for name, value in {"IMAGES": 30, "ANNOTATIONS": 70, "SCENES": (9, 3, 5)}.items():
        monkeypatch.setattr(benchmark_data, name, value)
    flags = ["loader", "index", "evaluator", "--rounds", "1", "--coco_path", str(coco_root)]
    train, val, usual, arrays, judged = benchmark.run(benchmark.parse_args(flags), Ours)
    assert train["images"].endswith("train") and val["ratio"] > 0
    assert usual["index"] == "pycocotools" and arrays["s"] > 0 and "worker_grows_gb" in arrays
    assert judged["numbers_off_by"] < 1e-12 and judged["ratio"] == pytest.approx(judged["pycocotools_s"] / judged["s"])


def test_images_are_counted_from_the_file_to_training_and_to_detections(coco_root):
    flags = ["feed", "predict", *SMALL.split(), "--workers", "0", "1", "--coco_path", str(coco_root)]
    alone, helped, found = benchmark.run(benchmark.parse_args(flags), Ours)
    assert (alone["workers"], helped["workers"]) == (0, 1) and min(alone["images_per_s"], helped["images_per_s"]) > 0
    assert found["images_per_s"] == pytest.approx(3 / found["s"])  # all three validation images


def test_flops_are_those_of_the_layers():
    linear = torch.nn.Linear(30, 20)
    assert count_flops(lambda: linear(torch.rand(7, 30))) == 2 * 7 * 30 * 20


def test_another_tree_is_measured_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "tools/benchmark.py", "forward", *SMALL.split(), "--peer", ".", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert row["ratio"] == pytest.approx(row["peer_s"] / row["s"])
    assert "| ratio |" in (tmp_path / "benchmark.md").read_text() and "| ratio |" in done.stdout


def test_another_tree_brings_its_own_modules(tmp_path):
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "__init__.py").write_text("")
    (tmp_path / "main.py").write_text("import util\nraise SystemExit(util.__file__)\n")
    command = [sys.executable, "tools/benchmark.py", "forward", *SMALL.split(), "--peer", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and str(tmp_path / "util") in done.stderr and "did not run there" in done.stderr


@pytest.mark.parametrize("flags, words", [
    ("loader --coco_path gone", "--coco_path is gone"), ("forward --peer gone", "neither transformers nor a folder"),
])  # fmt: skip
def test_what_is_not_there_is_said(flags, words):
    done = subprocess.run([sys.executable, "tools/benchmark.py", *flags.split()], capture_output=True, text=True)
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr


def test_what_needs_a_gpu_says_so():
    with pytest.raises(SystemExit, match="--device cuda"):
        list(benchmark.run(benchmark.parse_args(["syncs", *SMALL.split()]), Ours))
    if not torch.cuda.is_available():
        pytest.skip("the count of syncs itself needs a GPU")
    (row,) = benchmark.run(benchmark.parse_args(["syncs", *SMALL.replace("cpu", "cuda").split()]), Ours)
    assert row["syncs_per_step"] <= 3


def test_the_peer_computes_the_same_loss():
    pytest.importorskip("transformers", reason="the peer is Hugging Face's transformers, which is not installed")
    torch.manual_seed(0)
    ours, theirs = Ours("resnet50", 10, "cpu"), Transformers("resnet50", 10, "cpu")
    layers = [{"pred_logits": torch.randn(2, 10, 92), "pred_boxes": torch.rand(2, 10, 4) * 0.4 + 0.3} for _ in range(6)]
    outputs = {**layers[-1], "aux_outputs": layers[:-1]}
    targets = some_targets(2, "cpu")
    assert ours.criterion_only(outputs, targets).item() == pytest.approx(
        theirs.criterion_only(outputs, targets).item(), rel=1e-4
    )
