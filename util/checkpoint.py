"""Checkpoint files: written atomically, read without running anything that is in them."""

import argparse
import errno
import os
import pickle
import re
import secrets
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor

from util.dist import from_main, is_main_process
from util.download import download
from util.logger import logger

# Besides tensors and plain Python, DETR's files hold the flags, and those of cluster runs a path among them.
ALLOWED = [argparse.Namespace, (PosixPath, "pathlib.PosixPath")]
BEST = "checkpoint_best.pth"


def save_checkpoint(state: dict, *paths: str | Path) -> None:
    """Write a state to one or more files, each of which holds the old state or the new one at any moment.

    The bytes go to a draft (`.NAME.*.draft`) in the same folder, are flushed to the disk, and renamed. Raises OSError,
    naming the file, where that fails.
    """
    for path in map(Path, paths):
        draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.draft")
        try:
            with open(draft, "xb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            raise OSError(
                f"{path} could not be written ({_first_line(error)}); its previous contents are intact. "
                "Free some space, or make the folder writable, and resume"
            ) from error
        finally:
            draft.unlink(missing_ok=True)


def load_checkpoint(path_or_url: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors, plain Python and an argparse Namespace are accepted from the file.

    A URL is downloaded once and cached. Raises FileNotFoundError; ValueError naming a file that is damaged, holds
    anything else, or has no `model`; and OSError or MemoryError where the file cannot be read at the moment.
    """
    name = str(path_or_url)
    is_url = name.startswith(("http://", "https://"))
    path = Path(download(name) if is_url else name)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such checkpoint")
    try:
        _check_bits(path)
        state = _read(path)
        if not isinstance(state, dict) or "model" not in state:
            raise ValueError("no entry 'model'; a checkpoint of this project or of DETR has one")
    except ValueError as error:
        if is_url:
            path.unlink(missing_ok=True)
            raise ValueError(f"{name}: {error}. Its cached copy {path} was removed: try again") from None
        raise ValueError(f"{name}: {error}") from None
    return state


def _check_bits(path: Path) -> None:
    """Raise ValueError if a checksum in the file does not match: torch.load does not verify them."""
    try:
        if not zipfile.is_zipfile(path):  # a file of the format before PyTorch 1.6, or none at all
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise _reading_error(error, path) from None
    if damaged:
        raise ValueError(f"damaged: the checksum of {damaged} does not match. Take another checkpoint or copy")


def _read(path: Path, mmap: bool = False) -> Any:
    """Load a file with the allow-list; ValueError says what is wrong with its contents."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = match.group(1) if match else _first_line(error)
        raise ValueError(f"refused, since it holds more than tensors and plain Python ({what})") from None
    except Exception as error:  # damaged bytes can raise anything
        raise _reading_error(error, path) from None


def _reading_error(error: Exception, path: Path) -> Exception:
    """Return the error to raise: ValueError if the contents are damaged, others if reading failed for now."""
    if isinstance(error, MemoryError) or "allocate" in str(error):
        return MemoryError(f"{path}: not enough memory to read it")
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: an offset in the file points nowhere
        return OSError(error.errno, f"{path} cannot be read at the moment: {error.strerror}")
    return ValueError(f"not a readable checkpoint ({_first_line(error)})")


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinite values."""
    names = [name for name, value in tensors.items() if value.is_floating_point()]
    if not names:
        return []
    flags = torch.stack([tensors[name].isfinite().all() for name in names]).tolist()
    return [name for name, finite in zip(names, flags, strict=True) if not finite]


def load_model(model: torch.nn.Module, state: dict, name: str) -> None:
    """Load `state["model"]` strictly; ValueError says what does not fit, or that values are not finite."""
    own, given = model.state_dict(), state["model"]
    problems = [f"no {key}" for key in own if key not in given] + [
        f"unexpected {key}" for key in given if key not in own
    ]
    problems += [
        f"{key} is {list(given[key].shape)}, the model has {list(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ValueError(
            f"{name} does not fit this model ({len(problems)} entries): {shown}. "
            "Check the model's flags and --num_classes"
        )
    if broken := not_finite(given):
        raise ValueError(f"{name}: {len(broken)} entries hold NaN or infinite values, {broken[0]} among them")
    model.load_state_dict(given)


def count_classes(model_state: dict) -> int | None:
    """Return K, the number of classes of the class head in a model's state dict; None if there is none."""
    heads = [value for name, value in model_state.items() if name.endswith("class_embed.bias")]
    return len(heads[0]) - 1 if len(heads) == 1 else None


def position(state: dict) -> tuple[int, int]:
    """Return how far a checkpoint's training was: the epoch under way, and the images of it that were trained on."""
    epoch = state.get("epoch")
    return (epoch + 1 if isinstance(epoch, int) else 0), state.get("seen", 0)


def positions(folder: str | Path) -> dict[Path, tuple[int, int]]:
    """Return the position of each `checkpoint*.pth` of a folder but the best; skip damaged files with a warning."""
    found = {}
    for path in sorted(Path(folder).glob("checkpoint*.pth")):
        if path.name == BEST:
            continue
        try:
            try:
                state = _read(path, mmap=True)
            except ValueError:  # also files of the format before PyTorch 1.6, which cannot be mapped
                state = _read(path)
            found[path] = position(state)
        except (ValueError, AttributeError) as error:
            logger.warning(f"skipping {path}: {error}")
    return found


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict] | None:
    """Load the checkpoint of a folder that is furthest in training; return its path and contents, or None.

    Damaged files are skipped with a warning. Raises ValueError if there are checkpoints and none can be used, and
    OSError or MemoryError if one cannot be read at the moment: training must not start again over it.
    """
    found = positions(folder)
    for path in sorted(found, key=lambda path: found[path], reverse=True):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            logger.warning(f"skipping a damaged checkpoint: {error}")
    if files := sorted(Path(folder).glob("checkpoint*.pth")):
        names = ", ".join(path.name for path in files)
        raise ValueError(
            f"{folder} holds no checkpoint that --resume auto can use, but {names}: give --resume FILE, choose another "
            "--output_dir, or start again over them with --overwrite and without --resume"
        )
    return None


def load_resumed(resume: str, folder: str | Path) -> tuple[str, dict | None]:
    """Load the checkpoint that `--resume` names (auto: the furthest of the folder); return its name and contents.

    Every process calls it and reads one file once.
    """
    if resume != "auto":
        return resume, load_checkpoint(resume) if resume else None
    found = newest_checkpoint(folder) if is_main_process() else None
    name = from_main(lambda: str(found[0]) if found else "")
    if name and not is_main_process():
        return name, load_checkpoint(name)
    return name, found[1] if found else None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
