"""Checkpoint files: written atomically, and read without running code from them."""

import os
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.dist import from_main, is_main_process
from util.download import download
from util.drafts import draft_of, remove_drafts
from util.huggingface import is_huggingface
from util.huggingface_config import WEIGHTS_FILES, read_model
from util.logger import logger
from util.safe_load import check_bits, first_line, read

OTHER_NAMES = ("state_dict", "model_state_dict")  # of the entry `model`, in other programs
COMPILED = "_orig_mod."  # in names of what torch.compile wrapped
PREFIXES = ("module.", COMPILED, "model.")  # of the names in a model that is distributed, compiled or an attribute
BATCH_COUNT = ".num_batches_tracked"
CRITERION = "criterion."  # prefix of the loss, where a module with model and loss was saved
BEST = "checkpoint_best.pth"


def save_checkpoint(state: dict, *paths: str | Path) -> None:
    """Write a state to one or more files, each of which holds the old state or the new one at any moment.

    The bytes go to a temporary file (`util.drafts`) in the same folder, which is flushed to the disk and renamed.
    Raises OSError, naming the file, where that fails.
    """
    for path in map(Path, paths):
        draft = draft_of(path)
        try:
            remove_drafts(path.parent)
            with open(draft, "xb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            raise OSError(
                f"{path} could not be written ({first_line(error)}); its previous contents are intact. "
                "Free some space, or make the folder writable, and resume"
            ) from error
        finally:
            draft.unlink(missing_ok=True)


def load_checkpoint(path_or_url: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU as a dict with `model`, its state dict. No code in the file runs (`safe_load`).

    A URL is downloaded once and cached. Accepted too are a bare state dict, the entry `state_dict`, names with the
    prefixes of DistributedDataParallel and torch.compile, safetensors files, and models of Hugging Face's transformers:
    a folder, or a file with config.json beside it. What was converted is logged. Raises FileNotFoundError; ValueError
    naming a file that is damaged, or holds anything else; and OSError or MemoryError where the file cannot be read at
    the moment.
    """
    name = str(path_or_url)
    is_url = name.startswith(("http://", "https://"))
    path = Path(download(name) if is_url else name)
    is_folder = path.is_dir()
    path = _weights_of(path) if is_folder else path
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such checkpoint")
    try:
        check_bits(path)
        state = as_checkpoint(read(path), name)
    except ValueError as error:
        if is_url:
            path.unlink(missing_ok=True)
            raise ValueError(f"{name}: {error}. Its cached copy {path} was removed: try again") from None
        raise ValueError(f"{path if is_folder else name}: {error}") from None
    if is_folder or is_huggingface(state["model"]):
        if is_url:
            raise ValueError(f"{name} is a model of transformers: download its whole folder, and give that")
        return read_model(state["model"], path.parent, name)
    return state


def _weights_of(folder: Path) -> Path:
    """Return the file of the weights in a folder of transformers."""
    for file in WEIGHTS_FILES:
        if (folder / file).is_file():
            return folder / file
    raise FileNotFoundError(
        f"{folder} is a folder without {' or '.join(WEIGHTS_FILES)}, so no model of transformers: name a file in it"
    )


def as_checkpoint(state: Any, name: str = "checkpoint") -> dict[str, Any]:
    """Return the contents of a checkpoint file with the entry `model`, under the names of the bare model.

    `name` is the file, for the log.
    """
    if not isinstance(state, dict):
        raise ValueError(f"holds a {type(state).__name__}; a checkpoint is a dict with an entry 'model'")
    done = []
    if "model" not in state:
        if found := [entry for entry in OTHER_NAMES if isinstance(state.get(entry), dict)]:
            state = {**state, "model": state[found[0]]}
            done.append(f"entry {found[0]!r} taken as the model")
        elif _is_state_dict(state):
            state = {"model": state}
        else:
            raise ValueError("no entry 'model'; a checkpoint of this project or of DETR has one")
    weights = state["model"]
    if weights != {} and not _is_state_dict(weights):
        raise ValueError("its entry 'model' is no state dict (names and tensors): save model.state_dict()")
    if any(key.startswith(CRITERION) for key in weights) and not all(key.startswith(CRITERION) for key in weights):
        weights = {key: value for key, value in weights.items() if not key.startswith(CRITERION)}
        done.append(f"{CRITERION}* left out")
    while prefix := next((p for p in PREFIXES if weights and all(key.startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        done.append(f"prefix {prefix!r} removed")
    if any(COMPILED in key for key in weights):  # of parts that were compiled
        weights = {key.replace(COMPILED, ""): value for key, value in weights.items()}
        done.append(f"{COMPILED!r} removed from names")
    if done:
        logger.info(f"{name}: {', '.join(done)}")
    return {**state, "model": weights}


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinite values."""
    names = [name for name, value in tensors.items() if value.is_floating_point()]
    if not names:
        return []
    flags = torch.stack([tensors[name].isfinite().all() for name in names]).tolist()
    return [name for name, finite in zip(names, flags, strict=True) if not finite]


def load_model(model: torch.nn.Module, state: dict, name: str) -> None:
    """Load `state["model"]` strictly; ValueError says what does not fit, or that values are not finite."""
    own = model.state_dict()
    # A backbone that was saved before its norms were frozen counts batches, which have no effect.
    given = {key: value for key, value in state["model"].items() if key in own or not key.endswith(BATCH_COUNT)}
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
    """Return a checkpoint's position in training: the current epoch, and how many of its images were trained on."""
    epoch, seen = state.get("epoch"), state.get("seen")
    return (int(epoch) + 1 if isinstance(epoch, Integral) else 0), (int(seen) if isinstance(seen, Integral) else 0)


def positions(folder: str | Path) -> dict[Path, tuple[int, int]]:
    """Return the position of each `checkpoint*.pth` of a folder but the best; skip damaged files with a warning."""
    found = {}
    for path in sorted(Path(folder).glob("checkpoint*.pth")):
        if path.name == BEST:
            continue
        try:
            try:
                state = read(path, mmap=True)
            except ValueError:  # also files of the format before PyTorch 1.6, which cannot be mapped
                state = read(path)
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
