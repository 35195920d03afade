"""Jobs: what is asked of Slurm, and a job on this machine that is interrupted and comes back."""

import json
import os
import signal
import subprocess
import time

import pytest
import submitit

import run_with_submitit
from tests.helpers import assert_same_weights

pytestmark = pytest.mark.distributed


def job_of(flags):
    """Submit as the command line does, but do not wait."""
    jobs = []

    class Executor(submitit.AutoExecutor):
        def submit(self, *args):
            jobs.append(super().submit(*args))
            jobs[0].results, waited = (lambda: None), jobs[0].results
            jobs[0].wait_for_it = waited
            return jobs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submitit, "AutoExecutor", Executor)
        patch.setattr(run_with_submitit, "follow", lambda job: None)
        run_with_submitit.main(run_with_submitit.parse_args(flags.split()))
    return jobs[0]


def test_the_reference_command_line_is_understood():
    args = run_with_submitit.parse_args("--timeout 3000 --coco_path x --batch_size 4".split())
    assert (args.ngpus, args.nodes, args.timeout, args.batch_size) == (8, 4, 3000, 4)
    assert args.job_dir == "./jobs/%j"


def test_main_passes_the_flags_to_slurm(monkeypatch, tmp_path, capsys):
    asked = {}

    class Job:
        job_id, paths = 7, submitit.core.utils.JobPaths(tmp_path, "7", 0)

    class Executor:
        def __init__(self, **how):
            asked.update(how)

        def update_parameters(self, **what):
            asked.update(what)

        def submit(self, _):
            return Job

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    words = f"--job_dir {tmp_path}/%j --nodes 2 --ngpus 4 --partition p --account a --qos q --constraint volta32gb"
    run_with_submitit.main(run_with_submitit.parse_args([*words.split(), "--comment", "c", "--mem_gb", "9"]))
    assert asked["cluster"] == "slurm" and asked["slurm_max_num_timeout"] >= 100
    assert (asked["nodes"], asked["tasks_per_node"], asked["gpus_per_node"], asked["mem_gb"]) == (2, 4, 4, 9)
    assert [asked[f"slurm_{name}"] for name in ("partition", "account", "qos", "constraint", "comment")] == [
        "p", "a", "q", "volta32gb", "c",
    ]  # fmt: skip
    assert f"{tmp_path}/7" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--job_dir"):
        run_with_submitit.main(run_with_submitit.parse_args(["--output_dir", "x"]))
    with pytest.raises(ValueError, match="--batch_size 0"):
        run_with_submitit.main(run_with_submitit.parse_args(["--batch_size", "0"]))


def test_an_interrupted_job_comes_back_and_ends_with_the_same_weights(job_flags, tmp_path):
    whole = job_of(f"{job_flags} --job_dir {tmp_path}/whole")
    whole.wait_for_it()
    job = job_of(f"{job_flags} --job_dir {tmp_path}/interrupted")
    deadline = time.monotonic() + 120
    while not (tmp_path / "interrupted" / "checkpoint.pth").exists():  # written after every step
        assert time.monotonic() < deadline and not job.done(), job.stderr()
        time.sleep(0.05)
    tasks = subprocess.run(["pgrep", "-P", str(job._process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(tasks[1]), signal.SIGUSR2)  # one of two gets the signal, and both stop after the same step
    job.wait_for_it()
    assert "stopped by a signal after" in job.stdout() and "weights from" in job.stdout()
    assert_same_weights(tmp_path / "whole", tmp_path / "interrupted")
    rows = [(tmp_path / name / "log.txt").read_text() for name in ("whole", "interrupted")]
    assert [json.loads(line) for line in rows[0].splitlines()] == [json.loads(line) for line in rows[1].splitlines()]


def test_local_job_shows_its_log_and_leaves_no_folder_named_after_the_placeholder(job_flags, tmp_path, capsys):
    flags = f"{job_flags} --job_dir {tmp_path}/%j --epochs 1".replace("--ngpus 2", "--ngpus 1")
    run_with_submitit.main(run_with_submitit.parse_args(flags.split()))
    assert "Epoch: [0]" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert folder.name.isdigit() and (folder / "checkpoint.pth").exists()


def test_shared_folder_and_init_file_are_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_with_submitit.get_shared_folder() == tmp_path / "jobs"
    first, second = run_with_submitit.get_init_file(), run_with_submitit.get_init_file()
    assert first.parent == tmp_path / "jobs" and first != second and not first.exists()
