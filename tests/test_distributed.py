"""Two processes on this machine, over gloo: what they compute together is what one computes alone."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main
from tests.helpers import TINY, assert_same_weights, parse

pytestmark = pytest.mark.distributed


def launch(words: list[str], processes: int = 2, **environment) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=240, env=env)


def run_together(flags: str, processes: int = 2) -> str:
    done = launch(["main.py", *TINY.split(), *flags.split()], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("warn|unused|mismatch", done.stderr, re.IGNORECASE), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, flags without batch size, and a checkpoint trained by two processes."""
    from tests.helpers import write_coco

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
    assert len(torch.load(root / "two" / "checkpoint.pth", weights_only=True)["processes"]) == 2


@pytest.mark.parametrize("processes", [2, 4])
def test_every_image_is_evaluated_once_also_when_a_process_has_none(trained, tmp_path, processes):
    root, flags = trained
    flags = f"{flags} --eval --resume {root}/two/checkpoint.pth --batch_size 1"
    main.main(parse(f"{flags} --output_dir {tmp_path}/one"))
    run_together(f"{flags} --output_dir {tmp_path}/many", processes)
    rows = [json.loads((tmp_path / name / "predictions_bbox.json").read_text()) for name in ("one", "many")]
    assert rows[0] == rows[1] and len({row["image_id"] for row in rows[0]}) == 3
    curves = [torch.load(tmp_path / name / "eval.pth", weights_only=True) for name in ("one", "many")]
    assert torch.equal(curves[0]["precision"], curves[1]["precision"])


@pytest.mark.parametrize("counts", ["equal", "unequal"])
def test_two_processes_train_with_the_losses_of_one(tmp_path, counts):
    def losses(processes, batch_size):
        out = tmp_path / f"{processes}.json"
        done = launch(["-m", "tests.train_fixed", str(out), str(batch_size), counts], processes)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text())

    one, two = losses(1, 2), losses(2, 1)
    assert len(one) == 3 and one[0]["loss"] > one[-1]["loss"]
    if counts == "unequal":  # the boxes' losses are over all objects of all processes; the class loss is not
        one, two = ([{k: v for k, v in rows[0].items() if "bbox" in k or "giou" in k}] for rows in (one, two))
    for a, b in zip(one, two, strict=True):
        assert a and a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name


def test_segments_are_evaluated_alike_by_one_process_and_by_two(tmp_path):
    flags = (
        f"--dataset_file shapes_panoptic --coco_path {tmp_path}/shapes --shapes_train 2 --shapes_val 5 --masks --eval "
    )
    flags += "--shapes_size 64 --shapes_classes 2 --hidden_dim 128 --nheads 8 --batch_size 1 --num_queries 12 --seed 5"
    found = {}
    run_together(f"{flags.replace('--eval', '--epochs 1')} --output_dir {tmp_path}/run", 1)
    for processes in (1, 2):
        output = run_together(
            f"{flags} --resume {tmp_path}/run/checkpoint.pth --output_dir {tmp_path}/{processes}", processes
        )
        found[processes] = [line for line in output.splitlines() if re.match(r" Average |(All|Things|Stuff)\b", line)]
        for name in ("predictions_segm.json", "predictions_bbox.json", "panoptic_eval/predictions.json"):
            found[processes].append(json.loads((tmp_path / str(processes) / name).read_text()))
    assert len(found[1]) == 24 + 3 + 3 and found[1] == found[2]


def test_log_lines_show_the_mean_of_all_processes(trained):
    """Of one step each, in log lines of two processes and of one with the same images."""
    root, flags = trained
    output = {
        n: run_together(f"{flags} --epochs 1 --batch_size {2 // n} --print_freq 1 --augment none", n) for n in (1, 2)
    }
    assert len(re.findall(r"Epoch: \[0\]  \[", output[2])) == 2
    printed = {n: re.search(r"cardinality_error_unscaled: ([\d.]+)", text).group(1) for n, text in output.items()}
    assert printed[1] == printed[2]


def test_an_error_in_one_process_ends_the_other_without_a_launcher():
    """Slurm's variables, as `srun` sets them: the other's next collective call fails."""
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_NTASKS": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train_fixed", "nowhere", "1", "fail"],
            env=env | {"SLURM_PROCID": str(rank)}, text=True, stderr=subprocess.PIPE,
        ) for rank in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert all(process.returncode for process in ranks)
    assert "ZeroDivisionError: the second process is broken" in errors[1] and "RuntimeError" in errors[0]
    done = launch(["-m", "tests.train_fixed", "nowhere", "1", "fail"])
    assert done.returncode and "ZeroDivisionError: the second process is broken" in done.stderr


DIE = """
import os, signal, sys
import engine, main
from tests.helpers import parse

norm, steps = engine.gradient_norm, []

def gradient_norm(model):
    steps.append(1)
    if len(steps) == 4 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return norm(model)

engine.gradient_norm = gradient_norm
main.main(parse(" ".join(sys.argv[2:])))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_within_a_minute(trained, tmp_path, rank):
    root, flags = trained
    (tmp_path / "die.py").write_text(DIE)
    words = [str(tmp_path / "die.py"), str(rank), *flags.split(), "--batch_size", "1", "--epochs", "9"]
    start = time.monotonic()
    done = launch([*words, "--output_dir", str(tmp_path / "run")], PYTHONPATH=str(Path(main.__file__).parent))
    assert done.returncode and "SIGKILL" in done.stderr and time.monotonic() - start < 60
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    position = state["epoch"], state["seen"]
    assert position == ((0, 4) if rank == 1 else (0, 0))  # the main process saves when another one dies


FAIL = """
import os, signal, sys
import datasets, engine, main
from tests.helpers import parse

how, second = sys.argv[1], os.environ["RANK"] == "1"
norm, build, steps = engine.gradient_norm, datasets.build_dataset, []

def gradient_norm(model):
    steps.append(1)
    if len(steps) == 3 and second and how == "error":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if len(steps) == 3 and second and how == "nan":
        next(model.parameters()).grad.fill_(float("nan"))
    if len(steps) == 3 and second and how == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    return norm(model)

def build_dataset(part, args):
    if second and how == "data":
        raise FileNotFoundError("the second machine has no such folder")
    return build(part, args)

engine.gradient_norm, datasets.build_dataset = gradient_norm, build_dataset
main.main(parse(" ".join(sys.argv[2:])))
"""


@pytest.mark.parametrize("how, words", [
    ("error", "RuntimeError: CUDA error"), ("nan", "FloatingPointError: .*not finite"),
    ("data", "FileNotFoundError: the second machine has no such folder"),
    ("signal", "stopped by a signal after 2 of 4 images of epoch 1"),
])  # fmt: skip
def test_what_ends_one_process_alone_ends_the_run_with_its_reason(trained, tmp_path, how, words):
    _, flags = trained
    (tmp_path / "fail.py").write_text(FAIL)
    words_of_run = f"{flags} --batch_size 1 --print_freq 1 --save_every_steps 1 --output_dir {tmp_path}/run"
    done = launch([str(tmp_path / "fail.py"), how, *words_of_run.split()], PYTHONPATH=os.getcwd())
    assert done.returncode and re.search(words, done.stdout + done.stderr), done.stderr[-3000:]
    if how != "data":
        state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
        assert all(value.isfinite().all() for value in state["model"].values())
        assert (state["epoch"], state["seen"]) == (0, 2)  # the main process had its gradients and finished the step


SEEN = """
import os, signal, sys
import datasets.coco, engine, main
from tests.helpers import parse

seen, stop = sys.argv[1], int(sys.argv[2])
norm, steps, get = engine.gradient_norm, [], datasets.coco.CocoDetection.__getitem__

def gradient_norm(model):
    steps.append(1)
    if len(steps) == stop and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return norm(model)

def getitem(self, index):
    if "train2017" in str(self.img_folder):
        with open(seen, "a") as file:
            file.write(f"{index}\\n")
    return get(self, index)

engine.gradient_norm, datasets.coco.CocoDetection.__getitem__ = gradient_norm, getitem
main.main(parse(" ".join(sys.argv[3:])))
"""


def test_an_epoch_continued_by_other_numbers_of_processes_trains_on_every_image_once(tmp_path):
    from tests.helpers import write_coco

    write_coco(tmp_path / "coco", "train", range(1, 25), [(i, 1, [4, 4, 20, 30], {}) for i in range(1, 25)])
    write_coco(tmp_path / "coco", "val", [1], [(1, 1, [4, 4, 20, 30], {})])
    (tmp_path / "run.py").write_text(SEEN)
    seen = tmp_path / "seen"
    flags = f"--coco_path {tmp_path}/coco --output_dir {tmp_path}/run --epochs 1 --resume auto --print_freq 1"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    alone = [sys.executable, str(tmp_path / "run.py"), str(seen)]
    assert subprocess.run([*alone, "4", *flags.split(), "--batch_size", "2"], env=env).returncode == 128 + 15
    assert len(seen.read_text().split()) == 8
    words = [str(tmp_path / "run.py"), str(seen), "3", *flags.split(), "--batch_size", "1"]
    assert launch(words, 2, PYTHONPATH=os.getcwd()).returncode
    assert len(seen.read_text().split()) == 14
    assert subprocess.run([*alone, "0", *flags.split(), "--batch_size", "2"], env=env).returncode == 0
    assert sorted(map(int, seen.read_text().split())) == list(range(24))


def test_another_number_of_processes_goes_on_and_says_so(trained, tmp_path):
    root, flags = trained
    (tmp_path / "run").mkdir()
    shutil.copy(root / "two" / "checkpoint.pth", tmp_path / "run")
    output = run_together(f"{flags} --epochs 3 --batch_size 1 --output_dir {tmp_path}/run --resume auto", 1)
    assert "written by 2 processes, now there are 1" in output
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [2]


def test_two_machines_recover_from_the_loss_of_a_process(trained, tmp_path):
    """Two launchers meet over the loopback; one of their processes is killed, and all go on from the last save."""
    root, flags = trained
    free = socket.create_server(("127.0.0.1", 0))
    meet = f"127.0.0.1:{free.getsockname()[1]}"
    free.close()
    words = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --max-restarts 3 --local-addr 127.0.0.1 "
    words += f"--rdzv-backend c10d --rdzv-endpoint {meet} --rdzv-id {root.name} main.py {TINY} {flags} --batch_size 1 "
    words += f"--epochs 2 --save_every_steps 1 --resume auto --output_dir {tmp_path}/run"
    logs = [open(tmp_path / f"{node}.log", "w") for node in (0, 1)]
    # Without the second, the launchers' store keeps the addresses of processes that are gone (PyTorch 2.15).
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launchers = [subprocess.Popen([sys.executable, *words.split()], stdout=log, stderr=log, env=env) for log in logs]
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pth").exists():
        assert time.monotonic() < deadline and not any(launcher.poll() for launcher in launchers)
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(launchers[1].pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    for launcher, log in zip(launchers, logs, strict=True):
        assert launcher.wait(240) == 0, Path(log.name).read_text()[-3000:]
        log.close()
    assert "weights from" in (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    assert_same_weights(root / "two", tmp_path / "run")


def test_extra_losses_with_a_process_that_has_no_objects_do_not_hang(tmp_path):
    from tests.helpers import write_coco

    write_coco(tmp_path / "coco", "train", [11, 12], [(11, 1, [4, 4, 20, 30], {})])
    write_coco(tmp_path / "coco", "val", [11], [(11, 1, [4, 4, 20, 30], {})])
    flags = f"--coco_path {tmp_path}/coco --epochs 2 --batch_size 1 --output_dir {tmp_path}/out"
    run_together(f"{flags} --denoising_groups 2 --encoder_loss_coef 1 --ema_decay 0.9 --lr_schedule linear")
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert len(rows) == 2 and rows[1]["train_dn_loss_ce"] > 0 and rows[1]["train_enc_loss_ce"] > 0
