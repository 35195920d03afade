"""tools/benchmark.py measures what it says, on models small enough for a test; no figure of it is asserted."""

import json
import subprocess
import sys

import pytest
import torch

import engine
from tools import benchmark
from tools.benchmark import Detr, Transformers, random_targets
from util.nested_tensor import nested_tensor_from_tensor_list

SMALL = "--models resnet18 --batch 1 --size 64x80 --device cpu --rounds 1"
SETTING = {"model": "resnet50", "device": "cpu", "batch": 2, "size": [[64, 80]], "precision": "float32"}

pytestmark = pytest.mark.slow


def run(flags):
    return benchmark.main(flags.split())


@pytest.mark.parametrize("what", ["forward", "train", "criterion"])
def test_benchmark_of_the_network_gives_time_and_rate(what):
    (row,) = run(f"{what} {SMALL}")
    assert row["what"] == what and row["s"] > 0 and row["model"] == "resnet18" and "ratio" not in row
    assert row["images_per_s"] == pytest.approx(1 / row["s"])


def test_benchmark_of_several_settings_gives_a_row_for_each(monkeypatch):
    compiled = []
    monkeypatch.setattr(engine, "compile_network", compiled.append)
    rows = run(f"forward {SMALL} --batch 1 2 --precision float32 bf16 --compile")
    assert len({(row["precision"], row["compiled"], row["batch"]) for row in rows}) == 8 and len(compiled) == 4


def test_benchmark_of_data_gives_ratios(coco_root, capsys):
    rows = run(f"loader predict index evaluator {SMALL} --coco_path {coco_root}")
    train, val, predicted, index, evaluator = rows
    assert (train["images"], val["images"]) == ("4 train", "2 val") and val["images_per_s"] == 2 / val["s"]
    assert predicted["images_per_s"] == pytest.approx(3 / predicted["s"])
    assert index["ratio"] == index["pycocotools_s"] / index["s"] and index["json_mb"] > 0
    assert evaluator["images"] == 3 and evaluator["ratio"] > 0
    assert capsys.readouterr().out.count("|---") > 15


def test_benchmark_beside_another_tree_measures_both(tmp_path):
    command = [
        sys.executable,
        "tools/benchmark.py",
        "forward",
        *SMALL.split(),
        "--peer",
        ".",
        "--output",
        tmp_path / "o",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "o").read_text())["rows"]
    assert row["ratio"] == pytest.approx(row["peer_s"] / row["s"]) and "| ratio |" in done.stdout


def test_benchmark_beside_another_tree_uses_its_modules(tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit('the other main.py')\n")
    command = [sys.executable, "tools/benchmark.py", "forward", *SMALL.split(), "--peer", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "the other main.py" in done.stderr and "the benchmark failed there" in done.stderr


@pytest.mark.parametrize(("flags", "message"), [
    ("loader --coco_path gone", "--coco_path gone: give a folder"),
    ("forward --peer gone", "neither transformers nor a folder"),
])  # fmt: skip
def test_benchmark_without_its_data_ends_in_a_sentence(flags, message):
    with pytest.raises(SystemExit, match=message):
        run(flags)


def test_detr_and_its_peer_have_the_same_shape():
    pytest.importorskip("transformers", reason="the peer is Hugging Face's transformers, which is not installed")
    ours, theirs = Detr(SETTING), Transformers(SETTING)
    images = nested_tensor_from_tensor_list([torch.rand(3, 64, 80), torch.rand(3, 60, 70)])
    targets = random_targets(SETTING)
    assert theirs.model(**theirs.inputs(images)).logits.shape == ours.model(**ours.inputs(images))["pred_logits"].shape
    assert theirs.loss(theirs.inputs(images), targets).isfinite()
    trained = [sum(p.numel() for p in one.model.parameters() if p.requires_grad) for one in (ours, theirs)]
    assert trained[0] == pytest.approx(trained[1], rel=2e-3)
