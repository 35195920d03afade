"""Checkpoint files: they appear whole, and load without running anything that is in them."""

import argparse
import hashlib
import os
import pickle
import re
import socket
import tempfile
from pathlib import Path, PosixPath
from typing import Any

import torch
from filelock import FileLock

from util.logger import logger

# Beside tensors and plain Python, what DETR's files hold: the flags, and in those of a cluster's runs a path.
ALLOWED = [argparse.Namespace, (PosixPath, "pathlib.PosixPath")]
SILENCE = 30  # seconds after which an address that says nothing is given up


def save_checkpoint(state: dict, *paths: str | Path) -> None:
    """Write a state to one or more files, each of which holds the old state or the new one at any moment.

    The bytes go to a temporary name in the same folder, are flushed to the disk, and renamed. Raises OSError, naming
    the file, where that fails.
    """
    for path in map(Path, paths):
        draft = ""
        try:
            handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(draft, 0o644)
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:  # the second is how torch tells of a full disk
            raise OSError(
                f"{path} could not be written ({_first_line(error)}); what it held before is whole. "
                "Make room, or make the folder writable, and resume"
            ) from error
        finally:
            if draft:
                Path(draft).unlink(missing_ok=True)


def load_checkpoint(path_or_url: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors, plain Python and an argparse Namespace are accepted from the file.

    A URL is downloaded once and kept in torch.hub's cache; a hash in its name is checked. Raises FileNotFoundError, or
    ValueError naming a file that is broken, holds anything else, or has no `model` in it.
    """
    name = str(path_or_url)
    path = _download(name) if name.startswith(("http://", "https://")) else name
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{name}: refused, since it holds more than tensors and plain Python "
            f"({culprit.group(1) if culprit else _first_line(error)})"
        ) from None
    except Exception as error:  # bytes that are no checkpoint can break the reader in any way
        raise ValueError(f"{name}: not a readable checkpoint ({_first_line(error)})") from None
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{name}: no entry 'model' in it; a checkpoint of this project or of DETR has one")
    return state


def load_model(model: torch.nn.Module, state: dict, name: str) -> None:
    """Load `state["model"]` strictly; ValueError says what does not fit."""
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
    model.load_state_dict(given)


def count_classes(model_state: dict) -> int | None:
    """Read K off the class head in a model's state dict; None if there is none."""
    heads = [value for name, value in model_state.items() if name.endswith("class_embed.bias")]
    return len(heads[0]) - 1 if len(heads) == 1 else None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest `checkpoint*.pth` of a folder that loads, or None; say which ones were passed over.

    What a killed process left of an unfinished one is removed.
    """
    for draft in Path(folder).glob(".checkpoint*.pth.*"):
        draft.unlink(missing_ok=True)
    files = [path for path in Path(folder).glob("checkpoint*.pth") if path.name != "checkpoint_best.pth"]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            load_checkpoint(path)
        except ValueError as error:
            logger.warning(f"passing over a broken checkpoint: {error}")
        else:
            return path
    return None


def _download(url: str) -> str:
    """Bring a file into torch.hub's cache, unless it is there; of several processes one does, and the others wait."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = torch.hub.HASH_REGEX.search(target.name)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            patience = socket.getdefaulttimeout()
            socket.setdefaulttimeout(SILENCE)  # torch.hub itself would wait for ever
            try:
                torch.hub.download_url_to_file(url, str(target), digest.group(1) if digest else None)
            except (OSError, RuntimeError) as error:
                raise OSError(
                    f"{url} could not be downloaded ({error}). Fetch it by other means, say "
                    f"`curl -L -C - -o {target} {url}`, or give a local file"
                ) from error
            finally:
                socket.setdefaulttimeout(patience)
        elif digest and not sha256(target).startswith(digest.group(1)):  # brought by hand, and not whole
            raise ValueError(f"{target}: its contents do not have the hash in its name: complete it, or remove it")
    return str(target)


def sha256(path: str | Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
