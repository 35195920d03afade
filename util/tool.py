"""How a command-line tool ends: with a status, and one sentence instead of a traceback for what its user can mend."""

import sys
from collections.abc import Callable


def exit_status(main: Callable[[], int | None]) -> int:
    """Run a tool; return its status (0 where it returns None), 2 after printing an error that tells the remedy."""
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
