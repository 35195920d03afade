"""What the command lines share: readable help, errors in one sentence, and the exit status."""

import argparse
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from util.text import printable

PROJECT = Path(__file__).resolve().parent.parent


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and the lines of the description (the examples) as they are written."""


def command_line(description: str | None, flags: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return a parser of the flags of another one, with a description and readable help."""
    return argparse.ArgumentParser(
        description=description, usage="%(prog)s [flags]", parents=[flags], formatter_class=HelpFormatter
    )


def exit_status(main: Callable[[], int | None]) -> int:
    """Run a program and return its exit status: 0 where it returns None, 2 after an error that a user can correct."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack letters of a file name
    try:
        from util.logger import configure_logging  # here: it imports PyTorch, and flags are read without

        configure_logging()
        return main() or 0
    except (ValueError, OSError, FloatingPointError) as error:
        if not _is_for_users(error):
            raise
        print("error:", printable(error, keep="\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _is_for_users(error: Exception) -> bool:
    """Return whether the message alone is enough: of a file, or raised on purpose by this project.

    Anything else, such as a ValueError of "not enough values to unpack", is a fault of the code: it needs a traceback.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised_here = PROJECT in Path(last.filename).parents and (last.line or "").startswith("raise")
    return isinstance(error, OSError) or raised_here


def train() -> None:
    """Run main.py as a script: the command `detr-train` of an installed project."""
    runpy.run_module("main", run_name="__main__", alter_sys=True)


def predict() -> None:
    """Run tools/predict.py as a script: the command `detr-predict`."""
    runpy.run_module("tools.predict", run_name="__main__", alter_sys=True)
