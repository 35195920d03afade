"""Read files of torch.save and of safetensors: checksums are verified, and no code in a file runs."""

import argparse
import errno
import pickle
import re
import types
import zipfile
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

PATHS = ("pathlib", "pathlib._local")  # where Pythons have their paths
LARGEST_HEADER = 100_000_000  # bytes, of a safetensors file
NUMBERS, TEXT = "biuf", "U"  # kinds of numpy types: bool, signed, unsigned, floating; text
NOT_CHECKPOINTS = {
    b"<": "a web page: the address or the download was wrong",
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` gets the file itself",
}


class _Dtype:
    """Replaces numpy.dtype while a file is read: numbers and text only; other properties of the type are ignored."""

    def __init__(self, code: str, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in NUMBERS + TEXT:
            raise pickle.UnpicklingError(f"a numpy type {code}")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Replaces numpy.ndarray while a file is read."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, kind, fortran, data = state
        if kind.dtype.kind == TEXT:
            raise pickle.UnpicklingError("an array of text")
        super().__setstate__((version, shape, kind.dtype, fortran, data))


def _new_array(*_) -> _Array:
    return np.empty(0, np.int8).view(_Array)


def _scalar(kind: _Dtype, data: bytes) -> float | int | bool | str:
    return np.frombuffer(data, kind.dtype, count=1)[0].item()


def _plain_dict(*_) -> dict:
    return {}


# Besides tensors and plain Python, checkpoints hold flags, among them paths of any system and Python version, and
# numbers and text of numpy. A class that replaces the one named in a file may do less than it.
ALLOWED = [
    argparse.Namespace,
    types.SimpleNamespace,
    *(frozenset, list, dict, int, float, str),  # the last five name what a defaultdict makes
    (_plain_dict, "collections.defaultdict"),
    *((kind, f"{module}.{kind.__name__}") for kind in (PurePosixPath, PureWindowsPath) for module in PATHS),
    (PosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
    (PureWindowsPath, "pathlib.WindowsPath"),
    (PureWindowsPath, "pathlib._local.WindowsPath"),
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_new_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def load_file(path: str | Path) -> Any:
    """Load a file onto the CPU: tensors, plain Python, and what is in ALLOWED.

    Raises FileNotFoundError; ValueError naming a file that is damaged or holds anything else; and OSError or
    MemoryError where the file cannot be read at the moment.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        check_bits(path)
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_bits(path: Path) -> None:
    """Raise ValueError if a checksum in the file does not match: torch.load does not verify them."""
    try:
        with path.open("rb") as file:
            start = file.read(100).lstrip()
        if not zipfile.is_zipfile(path):  # a file of the format before PyTorch 1.6, or no checkpoint
            damaged = None
        else:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
    except Exception as error:
        raise _reading_error(error, path) from None
    if damaged:
        raise ValueError(f"damaged: the checksum of {damaged} does not match. Take another checkpoint or copy")
    if not start:
        raise ValueError("not a readable checkpoint (the file is empty)")
    for first, what in NOT_CHECKPOINTS.items():
        if start.startswith(first):
            raise ValueError(f"not a readable checkpoint ({what})")


def read(path: Path, mmap: bool = False) -> Any:
    """Load a file with the allow-list, without its checksums; ValueError says what is wrong with its contents."""
    if is_safetensors(path):
        return read_safetensors(path)
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = match.group(1) if match else first_line(error)
        raise ValueError(f"refused, since it holds more than tensors and plain Python ({what})") from None
    except Exception as error:  # damaged bytes can raise anything
        raise _reading_error(error, path) from None


def is_safetensors(path: Path) -> bool:
    """Return whether a file is in the format of safetensors: the length of a header, and the header, in JSON."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= LARGEST_HEADER


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Load a safetensors file; OSError if the package is missing, ValueError if the file is damaged."""
    package = import_safetensors(path)
    try:
        return package.torch.load_file(path)
    except package.SafetensorError as error:
        raise ValueError(
            f"not a readable checkpoint ({first_line(error)}): it is incomplete or damaged, take another copy"
        ) from None
    except Exception as error:
        raise _reading_error(error, path) from None


def import_safetensors(path: Path) -> Any:
    """Return the optional package that reads and writes the file; OSError says how to install it."""
    try:
        import safetensors.torch
    except ImportError:
        raise OSError(f"{path}: safetensors files need a package: pip install safetensors") from None
    return safetensors


def _reading_error(error: Exception, path: Path) -> Exception:
    """Return the error to raise: ValueError if the contents are damaged, others if reading failed for now."""
    if isinstance(error, MemoryError) or "allocate" in str(error):
        return MemoryError(f"{path}: not enough memory to read it")
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: the file holds an invalid offset
        return OSError(error.errno, f"{path} cannot be read at the moment: {error.strerror or error}")
    if "read failed" in str(error):  # torch's message for an error of the system
        return OSError(errno.EIO, f"{path} cannot be read at the moment: {first_line(error)}")
    return ValueError(f"not a readable checkpoint ({first_line(error)})")


def first_line(error: Exception) -> str:
    """Return the first sentence of an error's text, or its type."""
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
