"""tools/convergence.py: whole runs of two variants, an interrupted bench, and flags that cannot be used."""

import json
import subprocess

import pytest

from tests.helpers import TINY
from tools import convergence
from tools.convergence import parse_variants


def bench(output, *variants, common="", seeds=(0, 1)):
    flags = ["--output", str(output), "--common", common, "--seeds", *map(str, seeds)]
    for variant in variants:
        flags += ["--variant", variant]
    convergence.main(convergence.get_args_parser().parse_args(flags))


@pytest.mark.slow
def test_bench_compares_variants_over_seeds_and_continues(tmp_path, monkeypatch, capsys):
    common = f"{TINY} --dataset_file shapes --coco_path {tmp_path}/shapes --shapes_train 4 --shapes_val 4"
    variants = ("plain=--epochs 1", "fast=--epochs 2 --query_init local")
    bench(tmp_path, *variants, common=common, seeds=(0,))
    monkeypatch.setattr(subprocess, "run", None)  # what is trained is not trained again
    bench(tmp_path, *variants, common=common, seeds=(0,))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["plain"]["0"]["epochs"] == [1] and results["fast"]["0"]["epochs"] == [1, 2]
    for run in (results["plain"]["0"], results["fast"]["0"]):
        assert len(run["AP"]) == len(run["AP50"]) == len(run["boxes_per_object"]) == len(run["epochs"])
        assert run["minutes_per_epoch"] > 0
    assert (tmp_path / "ap.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("fast, seed 0: AP 0.") == 2


def test_bench_names_the_log_of_a_run_that_failed(tmp_path):
    with pytest.raises(ValueError, match=r"exit status 2; see .*plain-0/output.log"):
        bench(tmp_path, "plain=--no_such_flag", seeds=(0,))
    assert "--no_such_flag" in (tmp_path / "plain-0" / "output.log").read_text()


@pytest.mark.parametrize("texts", [["plain"], ["=--epochs 1"], ["a/b=--epochs 1"], ["a=", "a=--epochs 1"]])
def test_bench_refuses_variants_without_a_name_of_their_own(texts):
    with pytest.raises(ValueError, match="give NAME=FLAGS"):
        parse_variants(texts)
