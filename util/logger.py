"""The project's logger, and where its lines go."""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from util.text import printable

logger = logging.getLogger("detr")


class _StdoutHandler(logging.StreamHandler):
    """Print to standard output, above a progress bar if there is one.

    An output that is closed (`| head`) or on a full disk must not end a training: after the first error, all further
    output of the process is discarded. Control characters are printed as escapes: class and file names come from data.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            short = getattr(record, "short", None) if sys.stdout.isatty() else None
            tqdm.write(printable(short or self.format(record), keep="\n\t"), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError) as error:
            _discard_stdout()
            _write_stderr(f"standard output cannot be written ({error}): further log lines are lost\n")


def _discard_stdout() -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)


def _write_stderr(text: str) -> None:
    try:
        os.write(2, text.encode())
    except OSError:
        pass


def configure_logging() -> None:
    """Print the project's log lines on standard output. Programs call it at their start; a library never does."""
    if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
        logger.addHandler(_StdoutHandler())
        logger.setLevel(logging.INFO)


class _FileHandler(logging.FileHandler):
    """Append to a file; after the first error (a full disk) nothing more is written."""

    def handleError(self, record: logging.LogRecord) -> None:
        logger.removeHandler(self)
        logger.warning(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]}): it misses the lines from here on")


@contextmanager
def log_file(path: str | Path | None) -> Iterator[None]:
    """Append all log lines to a file too, with their time; None: to no file."""
    if path is None:
        yield
        return
    handler = _FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    except Exception:
        handler.handle(logger.makeRecord("detr", logging.ERROR, "", 0, "the run ends in an error", (), sys.exc_info()))
        raise
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def set_verbose(verbose: bool) -> None:
    """Log everything, or only warnings and errors (on processes other than the main one)."""
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def finite_or_null(value: Any) -> Any:
    """Replace numbers that JSON does not have (NaN, infinities) by None, at any depth of dicts and lists."""
    if isinstance(value, dict):
        return {name: finite_or_null(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
