"""Two processes on this machine, over gloo: what they compute together is what one computes alone."""

import json
import subprocess
import sys

import pytest
import torch

import main
from tests.conftest import TINY, parse


def run_together(flags: str, processes: int = 2) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, "main.py", *TINY.split(), *flags.split()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, flags without batch size, and a checkpoint trained by two processes."""
    from tests.conftest import write_coco

    root = tmp_path_factory.mktemp("together")
    objects = [(i, c, [4 * i - 40, 4, 20, 30], {}) for i in (11, 12, 13, 14) for c in (1, 3)]
    write_coco(root / "coco", "train", [11, 12, 13, 14], objects)
    write_coco(root / "coco", "val", [11, 12, 13], [o for o in objects if o[0] < 14])
    flags = f"--coco_path {root}/coco --epochs 2 --dropout 0"
    run_together(f"{flags} --batch_size 1 --output_dir {root}/two")
    return root, flags


def test_two_processes_leave_one_run_behind(trained):
    root, _ = trained
    rows = [json.loads(line) for line in (root / "two" / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and len(rows[0]["test_coco_eval_bbox"]) == 12
    assert len(torch.load(root / "two" / "checkpoint.pth", weights_only=True)["rng"]) == 2


@pytest.mark.parametrize("processes", [2, 4])
def test_every_image_is_judged_once_also_when_a_process_has_none(trained, tmp_path, processes):
    root, flags = trained
    flags = f"{flags} --eval --resume {root}/two/checkpoint.pth --batch_size 1"
    main.main(parse(f"{flags} --output_dir {tmp_path}/one"))
    run_together(f"{flags} --output_dir {tmp_path}/many", processes)
    rows = [json.loads((tmp_path / name / "predictions_bbox.json").read_text()) for name in ("one", "many")]
    assert rows[0] == rows[1] and len({row["image_id"] for row in rows[0]}) == 3
    curves = [torch.load(tmp_path / name / "eval.pth", weights_only=True) for name in ("one", "many")]
    assert torch.equal(curves[0]["precision"], curves[1]["precision"])
