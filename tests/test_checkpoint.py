import argparse
import collections
import os
import signal
import subprocess
import sys
import types
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from torch import nn

from util import download
from util.checkpoint import load_checkpoint, load_model, newest_checkpoint, save_checkpoint
from util.plot_utils import plot_precision_recall
from util.safe_load import load_file


def test_save_then_load_gives_the_same_state(tmp_path):
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


def test_save_checkpoint_that_fails_leaves_the_old_file_intact(tmp_path, monkeypatch):
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
def test_save_checkpoint_that_fails_names_the_file(tmp_path, monkeypatch, folder):
    path = tmp_path / folder / "c.pth"
    if folder != "absent":
        path.parent.mkdir()
        save_checkpoint({"model": {}, "epoch": 1}, path)

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system") if folder == "read-only" else RuntimeError("write failed: pos 0")

    if folder == "read-only":
        monkeypatch.setattr("builtins.open", refuse)  # root may write anywhere
    elif folder == "full":
        monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(OSError, match=f"{folder}/c.pth could not be written .*resume"):
        save_checkpoint({"model": {}, "epoch": 2}, path)
    monkeypatch.undo()
    if folder != "absent":
        assert load_checkpoint(path)["epoch"] == 1 and len(list(path.parent.iterdir())) == 1


def test_official_files_with_a_namespace_load(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "official.pth")
    assert load_checkpoint(tmp_path / "official.pth")["args"].lr == 1e-4


def test_official_files_with_a_path_among_the_flags_load(tmp_path):
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
from util.plot_utils import plot_precision_recall
from util.safe_load import load_file
load_checkpoint("https://nowhere.example/weights.pth")
"""


@pytest.mark.slow
def test_one_process_downloads_and_the_others_wait(tmp_path):
    env = os.environ | {"TORCH_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert "".join(outputs).split() == ["downloading"]


def test_load_model_with_other_shapes_names_them():
    with pytest.raises(
        ValueError, match=r"given.pth .*3 entries.*no bias; unexpected extra; weight is \[3, 2\].*\[2, 3\]"
    ):
        load_model(nn.Linear(3, 2), {"model": {"weight": torch.ones(3, 2), "extra": torch.ones(1)}}, "given.pth")


def save(path, epoch, seen=0):
    save_checkpoint({"model": {"w": torch.zeros(100)}, "epoch": epoch, "seen": seen}, path)


def test_newest_checkpoint_goes_by_the_position_inside_the_files(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path / "checkpoint_best.pth", 9)
    save(tmp_path / "checkpoint.pth", 4, 20)
    save(tmp_path / "checkpoint0007.pth", 4)  # written last
    path, state = newest_checkpoint(tmp_path)
    assert path.name == "checkpoint.pth" and state["seen"] == 20
    (tmp_path / "checkpoint.pth").write_bytes(b"cut short")
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint0007.pth"
    assert "checkpoint.pth" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_newest_checkpoint_with_a_damaged_file_takes_the_next(tmp_path, damage):
    save(tmp_path / "checkpoint0001.pth", 1)
    save(tmp_path / "checkpoint.pth", 2)
    content = bytearray((tmp_path / "checkpoint.pth").read_bytes())
    if damage == "cut":
        content = content[:-300]
    else:
        content[content.index(bytes(400)) + 100] ^= 1  # in the middle of the tensor's zeros
    (tmp_path / "checkpoint.pth").write_bytes(content)
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint0001.pth"
    if damage == "bit":
        with pytest.raises(ValueError, match="checkpoint.pth: damaged: the checksum of .* does not match"):
            load_checkpoint(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), MemoryError("x"), RuntimeError("can't allocate")])
def test_newest_checkpoint_that_cannot_be_read_now_stops_the_run(tmp_path, monkeypatch, error):
    save(tmp_path / "checkpoint0001.pth", 1)
    save(tmp_path / "checkpoint.pth", 2)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises((OSError, MemoryError)):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("name, content", [("checkpoint.pth", b"cut"), ("checkpoint_best.pth", None)])
def test_newest_checkpoint_where_none_is_usable_refuses(tmp_path, name, content):
    save(tmp_path / name, 2)
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"holds no checkpoint that --resume auto can use, but {name}"):
        newest_checkpoint(tmp_path)


def test_save_checkpoint_respects_umask(tmp_path):
    before = os.umask(0o077)
    save(tmp_path / "private.pth", 1)
    os.umask(0o022)
    save(tmp_path / "shared.pth", 1)
    os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode)[-3:] for name in ("private.pth", "shared.pth")] == ["600", "644"]


def test_load_model_with_weights_that_are_not_finite_is_refused():
    state = {"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}
    with pytest.raises(ValueError, match="given.pth: 1 entries hold NaN or infinite values, weight"):
        load_model(nn.Linear(3, 2), {"model": state}, "given.pth")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder, served as https://host/..., and the cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    files = {}

    def fetch(url, target, digest):
        Path(target).write_bytes(files[url])

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    return files


def test_load_checkpoint_from_two_urls_of_one_name_gives_two_files(server, tmp_path):
    for number, name in enumerate("ab"):
        torch.save({"model": {"w": torch.tensor(number)}}, tmp_path / "x.pth")
        server[f"https://host/{name}/checkpoint.pth"] = (tmp_path / "x.pth").read_bytes()
    assert [int(load_checkpoint(url)["model"]["w"]) for url in server] == [0, 1]


def test_load_checkpoint_from_a_truncated_download_removes_it(server, tmp_path):
    torch.save({"model": {"w": torch.zeros(1000)}}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    server["https://host/x.pth"] = whole[:2000]
    with pytest.raises(ValueError, match=r"https://host/x.pth: not a readable.*cached copy .*_x.pth was removed"):
        load_checkpoint("https://host/x.pth")
    server["https://host/x.pth"] = whole
    assert len(load_checkpoint("https://host/x.pth")["model"]["w"]) == 1000


def test_download_over_http_without_a_hash_warns(server, tmp_path, caplog):
    server.update({"http://host/x.pth": b"1", "https://host/y.pth": b"2", "http://host/z-0123456789.pth": b"3"})
    for url in server:
        download.download(url)
    assert [record.args or record.message for record in caplog.records if "verified" in record.message] == [
        "http://host/x.pth: neither the connection nor the file can be verified (no https, no hash)"
    ]


def foreign(module, name, *arguments):
    """An object that pickles as a call of a class that this system may lack."""
    kind = type(name, (), {"__reduce__": lambda self: (type(self), arguments)})
    kind.__module__ = module
    sys.modules.setdefault(module, types.ModuleType(module))
    return kind


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name, parts, text", [
    ("WindowsPath", ("C:\\", "runs"), "C:\\runs"), ("PosixPath", ("/", "runs"), "/runs"),
])  # fmt: skip
def test_load_checkpoint_with_paths_of_other_systems_gives_their_text(tmp_path, monkeypatch, module, name, parts, text):
    kind = foreign(module, name, *parts)
    monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
    torch.save({"model": {}, "args": argparse.Namespace(output_dir=kind())}, tmp_path / "x.pth")
    monkeypatch.undo()
    assert str(load_checkpoint(tmp_path / "x.pth")["args"].output_dir) == text


def test_load_checkpoint_with_numpy_numbers_gives_their_values(tmp_path):
    numbers = {
        "ap": np.float64(0.42),
        "epoch": np.int32(7),
        "yes": np.bool_(True),
        "curve": np.arange(6.0).reshape(2, 3),
    }
    swapped = np.arange(3, dtype=">i4")
    torch.save({"model": {}, **numbers, "swapped": swapped}, tmp_path / "x.pth")
    loaded = load_checkpoint(tmp_path / "x.pth")
    assert (loaded["ap"], loaded["epoch"], loaded["yes"]) == (0.42, 7, True)
    assert np.array_equal(loaded["curve"], numbers["curve"]) and np.array_equal(loaded["swapped"], swapped)


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["text"]), np.zeros(2, [("a", "O"), ("b", "i4")])])
def test_load_checkpoint_with_numpy_objects_is_refused(tmp_path, value):
    torch.save({"model": {}, "extra": value}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth: (refused|not a readable)"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model_state_dict": state},
    lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
    lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
])  # fmt: skip
def test_load_checkpoint_in_the_spellings_of_other_programs_gives_the_models_names(tmp_path, wrap):
    torch.save(wrap(nn.Linear(2, 3).state_dict()), tmp_path / "x.pth")
    assert list(load_checkpoint(tmp_path / "x.pth")["model"]) == ["weight", "bias"]


@pytest.mark.parametrize("wrap, logged", [
    (lambda state: {"state_dict": state}, "entry 'state_dict' taken as the model"),
    (lambda state: {"model": {f"module.{name}": value for name, value in state.items()}}, "prefix 'module.' removed"),
    (lambda state: {f"0._orig_mod.{name}": value for name, value in state.items()}, "'_orig_mod.' removed from names"),
    (lambda state: {"state_dict": {"criterion.empty_weight": torch.ones(2)}
                    | {f"model.0.{name}": value for name, value in state.items()}},
     "entry 'state_dict' taken as the model, criterion.* left out, prefix 'model.' removed"),
])  # fmt: skip
def test_load_checkpoint_that_renames_logs_it_in_one_line(tmp_path, caplog, wrap, logged):
    caplog.set_level("INFO", "detr")
    torch.save(wrap(nn.Linear(2, 3).state_dict()), tmp_path / "x.pth")
    names = [name.removeprefix("0.") for name in load_checkpoint(tmp_path / "x.pth")["model"]]
    assert names == ["weight", "bias"] and caplog.messages == [f"{tmp_path}/x.pth: {logged}"]


def test_load_checkpoint_with_a_plain_file_logs_nothing(tmp_path, caplog):
    caplog.set_level("INFO", "detr")
    torch.save({"model": nn.Linear(2, 3).state_dict()}, tmp_path / "x.pth")
    load_checkpoint(tmp_path / "x.pth")
    assert not caplog.messages


@pytest.mark.parametrize("value, read", [
    (collections.defaultdict(list, a=[1]), {"a": [1]}), (frozenset([1]), frozenset([1])), (np.str_("text"), "text"),
    (types.SimpleNamespace(lr=1), types.SimpleNamespace(lr=1)), (PurePosixPath("/runs"), PurePosixPath("/runs")),
    (PureWindowsPath("C:/runs"), PureWindowsPath("C:/runs")),
])  # fmt: skip
def test_load_checkpoint_with_plain_data_among_the_flags_gives_it(tmp_path, value, read):
    torch.save({"model": {}, "args": argparse.Namespace(value=value)}, tmp_path / "x.pth")
    found = load_checkpoint(tmp_path / "x.pth")["args"].value
    assert found == read and type(found) is type(read)


def test_load_model_ignores_counts_of_batches_for_a_frozen_norm():
    state = nn.Linear(3, 2).state_dict() | {"bn1.num_batches_tracked": torch.tensor(7)}
    model = nn.Linear(3, 2)
    load_model(model, {"model": state}, "given.pth")
    assert torch.equal(model.weight, state["weight"])


@pytest.mark.parametrize("content", [[1], None, {}, {"model": [1]}, {"model": None}, {"model": {"a": 1}},
                                     {"model": {1: torch.ones(1)}}, {1: torch.ones(1)}, torch.ones(2)])  # fmt: skip
def test_load_checkpoint_with_other_contents_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth: (holds a|no entry 'model'|its entry 'model' is no state dict)"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"\n <!DOCTYPE html>404", "a web page"), (b"version https://git-lfs.github.com/spec/v1", "LFS"),
])  # fmt: skip
@pytest.mark.parametrize("load", [load_checkpoint, load_file, lambda file: plot_precision_recall([file])])
def test_files_that_are_no_checkpoint_are_named_for_what_they_are(tmp_path, content, words, load):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.pth: .*{words}"):
        load(tmp_path / "x.pth")


def test_reading_error_inside_torch_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path / "checkpoint0001.pth", 1)
    save(tmp_path / "checkpoint.pth", 2)

    def fail(*_, **__):
        raise RuntimeError("PytorchStreamReader failed reading file data/0: file read failed")

    monkeypatch.setattr(torch, "load", fail)
    for load in (lambda: newest_checkpoint(tmp_path), lambda: load_checkpoint(tmp_path / "checkpoint.pth")):
        with pytest.raises(OSError, match="cannot be read at the moment"):
            load()


def test_plot_of_a_file_without_curves_is_refused(tmp_path):
    save(tmp_path / "x.pth", 1)
    with pytest.raises(ValueError, match="x.pth: not precision curves"):
        plot_precision_recall([tmp_path / "x.pth"])


PARTIAL = """
import os, signal, sys, time, torch
from pathlib import Path, PurePosixPath, PureWindowsPath
def slow(url, target, digest):
    partial = Path(f"{target}.0123.partial")
    try:
        partial.write_text("x")
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(20)
    finally:
        partial.unlink()
torch.hub.download_url_to_file = slow
from util.checkpoint import load_checkpoint
load_checkpoint("https://nowhere.example/weights.pth")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGKILL"])
@pytest.mark.slow
def test_download_that_a_signal_ends_leaves_nothing_partial(tmp_path, name):
    env = os.environ | {"TORCH_HOME": str(tmp_path)}
    number = getattr(signal, name)
    done = subprocess.run([sys.executable, "-c", PARTIAL, str(int(number))], env=env, capture_output=True)
    assert done.returncode != 0
    left = [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir() if path.name.endswith(".partial")]
    assert len(left) == (name == "SIGKILL")


def test_download_removes_what_a_killed_one_left(server, tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pth")
    server["https://host/x.pth"] = (tmp_path / "x.pth").read_bytes()
    target = Path(download.download("https://host/x.pth"))
    target.unlink()
    for name in (f"{target.name}.0123.partial", "other.pth.0123.partial"):
        (target.parent / name).touch()
    download.download("https://host/x.pth")
    assert [path.name for path in target.parent.glob("*.partial")] == ["other.pth.0123.partial"]
