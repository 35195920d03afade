"""Drafts: temporary files, named `.NAME.PID.RANDOM@HOST.draft`, that are renamed to the final name when complete."""

import os
import re
import secrets
import socket
from pathlib import Path


def draft_of(path: Path) -> Path:
    """Return a new draft's name for a file."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}@{socket.gethostname()}.draft")


def remove_drafts(folder: Path, locked: bool = False) -> None:
    """Remove the drafts that killed processes left in a folder: those of this machine whose process is gone.

    The holder of the folder's lock (`locked`) removes those of other machines too, whose processes it cannot see, and
    those with its own process id, which an earlier process had.
    """
    for draft in folder.glob(".*.draft"):
        match = re.search(r"\.(\d+)\.[0-9a-f]+@(.+)\.draft$", draft.name)
        if match is None or match.group(2) != socket.gethostname():
            obsolete = locked
        else:
            process = int(match.group(1))
            obsolete = not _is_alive(process) or (locked and process == os.getpid())
        if obsolete:
            draft.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process of another user
        return True
    return True
