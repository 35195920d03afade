"""Check that the files named in annotations are in their folder, and suggest similar names for missing ones."""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from datasets.json_file import SHOWN, report
from util.text import printable


class Listings:
    """The names of the files in folders, each folder read once: faster than one system call per file."""

    def __init__(self):
        self.read: dict[str, set[str]] = {}

    def __getitem__(self, folder: str) -> set[str]:
        if folder not in self.read:
            try:
                with os.scandir(folder) as entries:
                    self.read[folder] = {entry.name for entry in entries if not entry.is_dir()}
            except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a zero byte
                self.read[folder] = set()
        return self.read[folder]


def check_against_folder(
    annotations: str | Path, names: Iterable[str], folder: str | Path, what: str = "images", outside: bool = False
) -> None:
    """Raise ValueError if files that an annotation file names are not in the folder.

    Names that lead out of the folder (absolute ones, and those with `..`) are refused unless `outside`. Raises
    FileNotFoundError if there is no such folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder of {what} (annotations: {annotations})")
    listings, leaving, absent = Listings(), [], []
    for name in map(str, names):
        if not outside and leads_outside(name):
            leaving.append(name)
            continue
        parent, base = os.path.split(os.path.join(folder, name))
        if base not in listings[parent]:
            absent.append(name)
    absent[:SHOWN] = [_with_hint(name, folder, listings) for name in absent[:SHOWN]]
    report(annotations, [
        (f"{what} outside {folder} (read only with --allow outside_paths)", leaving),
        (f"{what} that are not in {folder}", absent),
    ])  # fmt: skip


def leads_outside(name: str) -> bool:
    """Return whether a file name, in the spelling of any system, may lead out of the folder it is relative to."""
    if ".." not in name and name[:1] not in ("/", "\\") and name[1:2] != ":":  # the usual case
        return False
    path = PureWindowsPath(name)  # it knows both kinds of slash
    return ".." in path.parts or bool(path.anchor)


def inside(folder: str | Path, name: str, outside: bool = False) -> Path:
    """Return the path of a file named in data; ValueError if it leads out of the folder, unless `outside`."""
    if not outside and leads_outside(name):
        raise ValueError(f"{printable(name)} lies outside {folder}: it is read only with --allow outside_paths")
    return Path(folder) / name


def _with_hint(name: str, folder: str | Path, listings: Listings) -> str:
    """Return the name of a missing file, with that of an existing file which may be meant."""
    decoded = unquote(name.replace("\\", "/"))
    for similar in (decoded, os.path.basename(decoded)):
        parent, base = os.path.split(os.path.join(folder, similar))
        for form in (_plain, lambda name: os.path.splitext(_plain(name))[0]):
            found = sorted(there for there in listings[parent] if form(there) == form(base))
            if found and base:
                return f"{name} (did you mean {os.path.relpath(os.path.join(parent, found[0]), folder)}?)"
    return name


def _plain(name: str) -> str:
    """Return a file name without differences of case, of Unicode form, or of spaces at its ends."""
    return unicodedata.normalize("NFC", name).casefold().strip()
