"""Files under construction, and what a killed process leaves of them."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from util.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from util.drafts import draft_of, remove_drafts
from util.output_dir import locked

KILLED = """
import os, signal, sys, torch
from pathlib import Path
from util.checkpoint import save_checkpoint
real = torch.save
def die(state, file):
    real(state, file)
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = die
save_checkpoint({"model": {}}, Path(sys.argv[1]))
"""


def drafts(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".draft")]


def kill_while_saving(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -signal.SIGKILL
    assert len(drafts(path.parent)) == 1


@pytest.mark.parametrize("name", ["checkpoint.pth", "eval/latest.pth"])
@pytest.mark.slow
def test_lock_removes_the_drafts_of_a_killed_run(tmp_path, name):
    kill_while_saving(tmp_path / name)
    newest_checkpoint(tmp_path)  # looking removes nothing
    assert drafts((tmp_path / name).parent)
    with locked(tmp_path):
        assert not drafts((tmp_path / name).parent)


@pytest.mark.slow
def test_saving_removes_the_drafts_of_a_killed_process_in_any_folder(tmp_path):
    kill_while_saving(tmp_path / "eval.pth")
    save_checkpoint({"model": {}}, tmp_path / "eval.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["eval.pth"]


def test_drafts_of_living_processes_and_of_other_machines_are_kept(tmp_path):
    living = draft_of(tmp_path / "a.pth")
    parent = living.with_name(living.name.replace(f".{os.getpid()}.", f".{os.getppid()}."))
    other = living.with_name(living.name.replace("@", "@other-"))
    for path in (living, parent, other):
        path.touch()
    remove_drafts(tmp_path)
    assert living.exists() and parent.exists() and other.exists()
    remove_drafts(tmp_path, locked=True)
    assert not living.exists() and parent.exists() and not other.exists()


def test_a_draft_becomes_the_file(tmp_path):
    save_checkpoint({"model": {"w": torch.ones(1)}}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["model"]["w"] == 1 and not drafts(tmp_path)
