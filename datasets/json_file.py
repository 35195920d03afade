"""Reading annotation files: JSON parsed record by record, and one report of all problems in a file."""

import json
import re
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from util.text import printable

SHOWN = 5  # examples named for each problem in a report
_to_text = json.JSONEncoder(separators=(",", ":")).encode
_skip_space = re.compile(r"[ \t\n\r]*").match


class JsonColumn:
    """One JSON value per annotation, kept as text in a single array and parsed on access."""

    def __init__(self):
        self.text, self.ends = bytearray(), array("q", [0])

    def append(self, value) -> None:
        """Add the value of the next annotation."""
        self.text += _to_text(value).encode()
        self.ends.append(len(self.text))

    def seal(self, order: np.ndarray) -> "JsonColumn":
        """Finish writing; `self[k]` is now the value appended as number `order[k]`."""
        ends = np.asarray(self.ends)
        self.begin, self.end = ends[:-1][order], ends[1:][order]
        self.text = np.frombuffer(bytes(self.text), np.uint8)
        del self.ends
        return self

    def empty(self) -> np.ndarray:
        """Return a bool array: where the value is null, [] or {}."""
        return self.end - self.begin <= len("null")

    def is_list(self) -> np.ndarray:
        """Return a bool array: where the value is a list."""
        return self.text[self.begin] == ord("[") if len(self.begin) else np.zeros(0, bool)

    def __getitem__(self, k: int):
        return json.loads(self.text[self.begin[k] : self.end[k]].tobytes())


def read_json(path: str | Path):
    """Parse a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises FileNotFoundError, or ValueError naming a file that is not JSON.
    """
    return _parsed(path, json.loads)


def write_json(path: str | Path, value) -> None:
    """Write a JSON file; ValueError for numbers that JSON does not have (NaN and infinities)."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from None
    Path(path).write_text(text)


def read_records(path: str | Path, readers: Mapping[str, Callable]) -> set[str]:
    """Parse a JSON object and pass each record of its top-level lists to a reader, one at a time.

    `readers` holds a function for each list to read; all other content is skipped. Records are not kept, so the memory
    needed is the size of the file. Returns the names of the lists found. Raises FileNotFoundError or ValueError.
    """
    return _parsed(path, lambda text: _walk(text, readers))


def _parsed(path: str | Path, parse: Callable):
    text = _read_text(path)
    try:
        return parse(text)
    except RecursionError:
        raise ValueError(f"{path}: not a JSON file that can be read (nested too deeply)") from None
    except ValueError as error:  # JSONDecodeError is one; so is the error for a number of thousands of digits
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def _read_text(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file") from None
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def _walk(text: str, readers: Mapping[str, Callable]) -> set[str]:
    parse, found = json.JSONDecoder().raw_decode, set()
    at = _skip_space(text).end()
    if text[at : at + 1] != "{":
        parse(text, at)  # raises for text that is not JSON
        return found
    at = _skip_space(text, at + 1).end()
    while text[at : at + 1] != "}":
        name, at = parse(text, at)
        at = _expect(":", text, at)
        if isinstance(name, str) and name in readers and text[at : at + 1] == "[":
            if name in found:
                raise ValueError(f"the list {name!r} occurs twice")
            found.add(name)
            at = _walk_list(text, at, readers[name])
        else:
            _, at = parse(text, at)
        at = _separator("}", text, at)
    return found


def _walk_list(text: str, at: int, read: Callable) -> int:
    """Pass each element of the list that starts at `at` to `read`; return the position after the list."""
    parse = json.JSONDecoder().raw_decode
    at = _skip_space(text, at + 1).end()
    while text[at : at + 1] != "]":
        record, at = parse(text, at)
        read(record)
        if text[at : at + 3] == ", {":  # the usual case, without a function call for each record
            at += 2
        else:
            at = _separator("]", text, at)
    return at + 1


def _separator(closing: str, text: str, at: int) -> int:
    """Return the position of the next element, or of the closing bracket."""
    if text[at : at + 1] not in (",", closing):
        at = _skip_space(text, at).end()
    return at if text[at : at + 1] == closing else _expect(",", text, at)


def _expect(mark: str, text: str, at: int) -> int:
    if text[at : at + 1] != mark:
        at = _skip_space(text, at).end()
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"expected {mark!r}", text, at)
    return _skip_space(text, at + 1).end()


def report(path: str | Path, problems: Iterable[tuple[str, Iterable]]) -> None:
    """Raise one ValueError that lists every kind of problem found, with its count and first examples.

    `problems` are pairs of a description and the examples; a pair without examples is left out.
    """
    lines = []
    for what, examples in problems:
        examples = list(examples)
        if examples:
            more = ", ..." if len(examples) > SHOWN else ""
            lines.append(f"{len(examples)} {what}: {', '.join(map(printable, examples[:SHOWN]))}{more}")
    if lines:
        between = " " if len(lines) == 1 else "\n  "
        raise ValueError(between.join([f"{path} cannot be used:", *lines]))


def is_whole(value) -> bool:
    """Return whether a JSON value is a whole number: 1 and 1.0 are, 1.5 and "1" are not."""
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def whole(value) -> int:
    """Convert an id or a count to int; ValueError for anything that is not a whole number."""
    if type(value) is int:  # the usual case: files have millions of them
        return value
    if not is_whole(value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def shortened(record) -> str:
    """Return the beginning of a record's text."""
    text = repr(record)
    return text if len(text) <= 120 else text[:117] + "..."
