"""What the command-line tools share: exit status, one-sentence errors, text that is safe to print."""

import sys
from collections.abc import Callable

from util.logger import configure_logging
from util.text import printable

__all__ = ["exit_status", "printable"]


def exit_status(main: Callable[[], int | None]) -> int:
    """Run a tool and return its exit status: 0 where it returns None, 2 after an error that a user can correct."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack letters of a file name
    configure_logging()
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        print("error:", printable(error, keep="\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
