"""Jobs on a real Slurm, the one that `make test-slurm` starts on this machine."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from tests.helpers import assert_same_weights

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif("DETR_TEST_SLURM" not in os.environ, reason="needs a Slurm: `make test-slurm` starts one"),
]
SECONDS = 300  # a job that takes longer hangs


def command(*words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(flags):
    output = command(sys.executable, "run_with_submitit.py", *flags.split(), "--executor", "slurm", "--nodes", "1")
    return re.search(r"job (\d+)", output).group(1)


def wait_for(what, job, folder):
    deadline = time.monotonic() + SECONDS
    while not what():
        time.sleep(0.1)
        if time.monotonic() > deadline or state_of(job) in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"):
            logs = "".join(path.read_text()[-3000:] for path in folder.glob("*.err"))
            pytest.fail(f"job {job} is {state_of(job)}\n{logs}")


def state_of(job):
    return re.search(r"JobState=(\w+)", command("scontrol", "show", "job", job)).group(1)


def restarts_of(job):
    return int(re.search(r"Restarts=(\d+)", command("scontrol", "show", "job", job)).group(1))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_a_preempted_job_comes_back_and_ends_with_the_same_weights(job_flags, tmp_path):
    whole, preempted = tmp_path / "whole", tmp_path / "preempted"
    job = submit(f"{job_flags} --job_dir {whole}")
    wait_for(lambda: state_of(job) == "COMPLETED", job, whole)

    job = submit(f"{job_flags} --job_dir {preempted}")
    wait_for((preempted / "checkpoint.pth").exists, job, preempted)  # written after each of 16 steps
    command("scancel", "--signal=USR2", job)  # Slurm's warning: the run saves, and has itself requeued
    wait_for(lambda: restarts_of(job) == 1 and state_of(job) == "RUNNING", job, preempted)
    before = (preempted / "checkpoint.pth").stat().st_mtime
    wait_for(lambda: (preempted / "checkpoint.pth").stat().st_mtime > before, job, preempted)
    command("scontrol", "requeue", job)  # Slurm takes the node away itself, with SIGTERM first
    wait_for(lambda: restarts_of(job) == 2 and state_of(job) == "COMPLETED", job, preempted)

    assert_same_weights(whole, preempted)
    assert rows_of(whole) == rows_of(preempted)


def test_tasks_of_a_plain_srun_find_each_other(job_flags, tmp_path):
    words = re.sub("--executor.*--num_workers", "--num_workers", job_flags)
    output = command("srun", "-n2", "--kill-on-bad-exit=1", sys.executable, "main.py", *words.split(),
                   "--epochs", "1", "--output_dir", str(tmp_path / "run"))  # fmt: skip
    assert "distributed: 2 processes" in output and len(rows_of(tmp_path / "run")) == 1


def test_an_interactive_shell_is_a_single_process(job_flags, tmp_path):
    words = re.sub("--executor.*--num_workers", "--num_workers", job_flags)
    output = command("srun", "-n1", sys.executable, "main.py", *words.split(), "--epochs", "1")
    assert "distributed:" not in output and "Epoch: [0]" in output
