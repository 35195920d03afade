"""The folder of a run: its lock, what is in the way, and the log."""

import json
import os
import signal
import subprocess
import sys

import pytest

from util import output_dir
from util.checkpoint import save_checkpoint
from util.output_dir import append_row, files_to_replace, locked, truncate_log

HOLD = "import sys, time\nfrom util.output_dir import locked\n"
HOLD += "with locked(sys.argv[1]):\n    print('locked', flush=True)\n    time.sleep(100)"


@pytest.mark.slow
def test_lock_held_by_another_process_is_refused_with_its_id_and_released_at_its_death(tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir, "PATIENCE", 0.2)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"another run is using .*, process {other.pid}\\)"), locked(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_lock_removes_the_drafts_of_a_killed_run(tmp_path):
    (tmp_path / "eval").mkdir()
    for name in (".checkpoint.pth.1-ab.draft", "eval/.latest.pth.1-ab.draft", "mine.draft"):
        (tmp_path / name).touch()
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.rglob("*draft")) == ["mine.draft"]


def test_files_to_replace_of_a_new_run_are_all_checkpoints_and_the_log(tmp_path):
    assert files_to_replace(tmp_path, "", (0, 0), False) == []
    for name in ("checkpoint.pth", "checkpoint_best.pth", "log.txt", "notes.txt"):
        (tmp_path / name).touch()
    for resumed in ("", str(tmp_path.parent / "other.pth")):
        names = [path.name for path in files_to_replace(tmp_path, resumed, (9, 0), True)]
        assert names == ["checkpoint.pth", "checkpoint_best.pth", "log.txt"]
    with pytest.raises(ValueError, match="checkpoint.pth, checkpoint_best.pth, log.txt.*--overwrite"):
        files_to_replace(tmp_path, "", (0, 0), False)


def test_files_to_replace_of_a_resumed_run_are_the_checkpoints_ahead_of_it(tmp_path):
    for name, epoch in (("checkpoint0001.pth", 1), ("checkpoint0003.pth", 3), ("checkpoint.pth", 4)):
        save_checkpoint({"model": {}, "epoch": epoch}, tmp_path / name)
    (tmp_path / "log.txt").touch()
    ahead = files_to_replace(tmp_path, str(tmp_path / "checkpoint0001.pth"), (2, 0), True)
    assert [path.name for path in ahead] == ["checkpoint.pth", "checkpoint0003.pth"]
    assert files_to_replace(tmp_path, str(tmp_path / "checkpoint.pth"), (5, 0), False) == []


def test_files_to_replace_through_a_symbolic_link_of_the_folder_are_the_same(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_checkpoint({"model": {}, "epoch": 4}, tmp_path / "real" / "checkpoint.pth")
    assert files_to_replace(tmp_path / "link", str(tmp_path / "real" / "checkpoint.pth"), (5, 0), True) == []


def test_lock_through_a_symbolic_link_of_the_folder_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir, "PATIENCE", 0.2)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (
        locked(tmp_path / "real"),
        pytest.raises(ValueError, match="another run is using .*link"),
        locked(tmp_path / "link"),
    ):
        pass


@pytest.mark.parametrize("name", ["file", "/proc/x"])
def test_lock_of_a_folder_that_cannot_be_made_names_it(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--output_dir .*(file|/proc/x) cannot be used .*choose another"):
        with locked(tmp_path / name):
            pass


def test_truncate_log_keeps_earlier_epochs_and_foreign_lines(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b'a note \xff\n{"epoch": 0}\n[1]\n{"epoch": "x"}\n{"epoch": 1}\n{"epoch": 2')
    truncate_log(log, 1)
    assert log.read_bytes() == b'a note \xff\n{"epoch": 0}\n[1]\n{"epoch": "x"}\n' and list(tmp_path.iterdir()) == [log]


def test_append_row_writes_json_whatever_the_numbers(tmp_path):
    append_row(tmp_path / "log.txt", {"epoch": 0, "train_loss": float("nan"), "test": [float("inf"), 1.0]})
    assert json.loads((tmp_path / "log.txt").read_text()) == {"epoch": 0, "train_loss": None, "test": [None, 1.0]}
