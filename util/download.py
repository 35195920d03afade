"""Downloads, cached by address and checked."""

import glob
import hashlib
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock

from util.logger import logger

SIGNALS = [getattr(signal, f"SIG{name}") for name in ("TERM", "HUP", "USR1", "USR2") if hasattr(signal, f"SIG{name}")]
SILENCE = 30  # seconds without data after which a download is given up


def download(url: str) -> str:
    """Return the path of a URL's file in torch.hub's cache; of several processes one downloads, the others wait.

    A hash in the name (`-0123abcd.pth`) is checked. Other files are cached under a name that depends on the whole URL.
    """
    target = Path(torch.hub.get_dir()) / "checkpoints" / _cached_name(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = torch.hub.HASH_REGEX.search(target.name)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            if url.startswith("http://") and not digest:
                logger.warning(f"{url}: neither the connection nor the file can be verified (no https, no hash)")
            _fetch(url, target, digest.group(1) if digest else None)
        elif digest and not sha256(target).startswith(digest.group(1)):  # put there by hand, incomplete
            raise ValueError(f"{target}: its contents do not have the hash in its name: complete it, or remove it")
    return str(target)


def _cached_name(url: str) -> str:
    name = unquote(urlsplit(url).path).replace("\\", "/").rsplit("/", 1)[-1]
    if torch.hub.HASH_REGEX.search(name):
        return name
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{name}"


def _fetch(url: str, target: Path, digest: str | None) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)  # torch.hub itself would wait forever
    try:
        for partial in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):  # of a process that was killed
            partial.unlink(missing_ok=True)
        with _signals_raise():
            torch.hub.download_url_to_file(url, str(target), digest)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{url} could not be downloaded ({error}). Download it by other means, for example "
            f"`curl -L -C - -o {target} {url}`, or give a local file"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let signals end the process by an exception, so that a partial file is removed; Ctrl-C does it anyway."""

    def leave(number: int, _) -> None:
        raise SystemExit(128 + number)

    fatal = []
    if threading.current_thread() is threading.main_thread():  # Python allows it in no other thread
        fatal = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in fatal:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in fatal:
            signal.signal(number, signal.SIG_DFL)


def sha256(path: str | Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
