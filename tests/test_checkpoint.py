import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from util.checkpoint import load_checkpoint, load_model, newest_checkpoint, save_checkpoint


def test_what_is_saved_comes_back(tmp_path):
    state = {"model": {"a": torch.ones(2)}, "epoch": 3, "args": {"lr": 1e-4, "resume": None}}
    save_checkpoint(state, tmp_path / "one.pth", tmp_path / "two.pth")
    for name in ("one.pth", "two.pth"):
        loaded = load_checkpoint(tmp_path / name)
        assert (
            loaded["epoch"] == 3
            and loaded["args"] == state["args"]
            and torch.equal(loaded["model"]["a"], torch.ones(2))
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.pth", "two.pth"]


def test_a_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    save_checkpoint({"model": {}, "epoch": 1}, tmp_path / "c.pth")

    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint({"model": {}, "epoch": 2}, tmp_path / "c.pth")
    assert load_checkpoint(tmp_path / "c.pth")["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize("folder", ["absent", "read-only", "full"])
def test_what_cannot_be_written_is_named(tmp_path, monkeypatch, folder):
    path = tmp_path / folder / "c.pth"
    if folder != "absent":
        path.parent.mkdir()
        save_checkpoint({"model": {}, "epoch": 1}, path)

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system") if folder == "read-only" else RuntimeError("write failed: pos 0")

    if folder == "read-only":
        monkeypatch.setattr("util.checkpoint.tempfile.mkstemp", refuse)  # root may write anywhere
    elif folder == "full":
        monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(OSError, match=f"{folder}/c.pth could not be written .*resume"):
        save_checkpoint({"model": {}, "epoch": 2}, path)
    if folder != "absent":
        assert load_checkpoint(path)["epoch"] == 1 and len(list(path.parent.iterdir())) == 1


def test_official_files_with_a_namespace_load(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "official.pth")
    assert load_checkpoint(tmp_path / "official.pth")["args"].lr == 1e-4


def test_so_do_those_of_a_cluster_whose_flags_hold_a_path(tmp_path):
    folder = Path("/checkpoint/me/experiments/17")
    torch.save({"model": {}, "args": argparse.Namespace(output_dir=folder)}, tmp_path / "submitit.pth")
    assert load_checkpoint(tmp_path / "submitit.pth")["args"].output_dir == folder


class Hostile:
    """Runs a command when a careless loader unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_file_is_refused_and_does_nothing(tmp_path):
    torch.save({"model": {}, "args": Hostile(tmp_path / "owned")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth: refused.*\(\w+.mkdir\)"):
        load_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content, words", [
    (b"", "not a readable checkpoint"), (b"garbage", "refused|not a readable"), (None, "not a readable checkpoint"),
])  # fmt: skip
def test_a_broken_file_is_named(tmp_path, content, words):
    path = tmp_path / "broken.pth"
    if content is None:  # cut short
        torch.save({"model": {"a": torch.ones(1000)}}, path)
        content = path.read_bytes()[:-500]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.pth: ({words})"):
        load_checkpoint(path)


def test_a_file_without_a_model_and_one_that_is_absent(tmp_path):
    torch.save({"weights": 1}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no entry 'model'"):
        load_checkpoint(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_checkpoint(tmp_path / "absent.pth")


FETCH = """
import sys, time, torch
def slow(url, target, digest):
    print("downloading", flush=True)
    time.sleep(1)
    torch.save({"model": {}}, target)
torch.hub.download_url_to_file = slow
from util.checkpoint import load_checkpoint
load_checkpoint("https://nowhere.example/weights.pth")
"""


@pytest.mark.slow
def test_one_process_downloads_and_the_others_wait(tmp_path):
    env = os.environ | {"TORCH_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)
    ]
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert "".join(said).split() == ["downloading"]


def test_what_does_not_fit_the_model_is_told():
    with pytest.raises(
        ValueError, match=r"given.pth .*3 entries.*no bias; unexpected extra; weight is \[3, 2\].*\[2, 3\]"
    ):
        load_model(nn.Linear(3, 2), {"model": {"weight": torch.ones(3, 2), "extra": torch.ones(1)}}, "given.pth")


def test_the_newest_checkpoint_that_loads(tmp_path, monkeypatch):
    from util import checkpoint

    said = []
    monkeypatch.setattr(checkpoint.logger, "warning", said.append)
    assert newest_checkpoint(tmp_path) is None
    for age, name in enumerate(["checkpoint_best.pth", "checkpoint.pth", "checkpoint0007.pth"]):
        save_checkpoint({"model": {}}, tmp_path / name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert newest_checkpoint(tmp_path).name == "checkpoint.pth"
    (tmp_path / "checkpoint.pth").write_bytes(b"cut short")
    assert newest_checkpoint(tmp_path).name == "checkpoint0007.pth"
    assert "checkpoint.pth" in said[0]
