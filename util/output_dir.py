"""The folder of a run: its lock, files of earlier runs in it, and `log.txt`."""

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from util.checkpoint import positions
from util.dist import is_main_process
from util.drafts import draft_of, remove_drafts
from util.logger import finite_or_null, logger

PATIENCE = 10  # seconds to wait for the lock: the workers of a killed run keep it for some seconds


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the folder's lock, on the main process; an empty name locks nothing.

    The system releases the lock when its holder dies. Unfinished files of a killed run are removed. Raises ValueError
    if another run has the lock, with its machine and process id.
    """
    if not folder or not is_main_process():
        yield
        return
    folder = Path(folder)
    make_folder(folder)
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.read_text() or "unknown"
        logger.warning(f"{folder} is locked by another run ({holder}); waiting up to {PATIENCE} s for it to end")
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise ValueError(
                f"another run is using {folder} ({holder}): end it first, or choose another --output_dir"
            ) from None
    try:
        path.write_text(f"host {socket.gethostname()}, process {os.getpid()}")
        for place in (folder, folder / "eval"):
            remove_drafts(place, locked=True)
        yield
    finally:
        lock.release()


def make_folder(folder: str | Path) -> None:
    """Make an output folder; raise OSError if it cannot be made, or nothing can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--output_dir {folder} cannot be used ({error.strerror}): make it writable, or choose another"
        ) from error


def files_to_replace(folder: str | Path, resumed: str, start: tuple[int, int], overwrite: bool) -> list[Path]:
    """Return the files of earlier training in the folder that a run replaces: all checkpoints and the log.

    A run that continues from a checkpoint of the folder, at position `start`, replaces only the checkpoints further
    than that, which would mislead a later `--resume auto`. Raises ValueError if there are any and not `overwrite`.
    """
    if not folder or not is_main_process():
        return []
    folder = Path(folder)
    if resumed and Path(resumed).parent.resolve() == folder.resolve():
        files = [path for path, reached in positions(folder).items() if reached > start]
    else:
        files = [path for path in sorted(folder.glob("checkpoint*.pth")) + [folder / "log.txt"] if path.exists()]
    if files and not overwrite:
        raise ValueError(
            f"{folder} holds the results of an earlier run, or of later epochs: {', '.join(f.name for f in files)}. "
            "Continue it with --resume auto, choose another --output_dir, or replace these files with --overwrite"
        )
    return files


def append_row(log_file: Path, row: dict) -> None:
    """Append a row to the log, one JSON object; numbers that are not finite become null."""
    with log_file.open("a") as file:
        file.write(json.dumps(finite_or_null(row), allow_nan=False) + "\n")


def truncate_log(log_file: Path, epoch: int) -> None:
    """Remove incomplete lines and the rows of epochs that will be run again; other lines are kept."""
    if log_file.exists():
        lines = log_file.read_text(errors="surrogateescape").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _epoch_of(line) < epoch]
        if len(kept) < len(lines):
            draft = draft_of(log_file)
            draft.write_text("".join(kept), errors="surrogateescape")
            draft.replace(log_file)


def _epoch_of(line: str) -> int:
    """Return the epoch of a row of the log, or -1 for any other line."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return -1
    return epoch if isinstance(epoch, int) else -1
