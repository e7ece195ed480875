"""JSON and JSONL files as rows that are parsed on access.

The file stays on disk and is mapped into memory; what is held is where each record begins and ends. Workers and ranks
on one machine share the mapped pages, and a copy sent to another process opens the file anew.
"""

from __future__ import annotations

import glob
import json
import mmap
import re
from json.decoder import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_WHITE = re.compile(r"[ \t\r\n]*")
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")
_SCANNED_AT_ONCE = 1 << 26  # bytes


class Rows(Protocol):
    """Raw rows by number, what a row is called in messages, and where its relative paths start."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def location(self, index: int) -> str: ...
    def folder(self, index: int) -> Path: ...


class FileRows:
    """The records of one file, by their byte ranges."""

    def __init__(self, path: Path, starts: np.ndarray, ends: np.ndarray, lines: np.ndarray | None):
        self.path, self.starts, self.ends = path, starts, ends
        self.lines = lines  # line numbers from 0, for JSONL
        self._bytes: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._bytes is None:
            self._bytes = _map(self.path)
        text = self._bytes[self.starts[index] : self.ends[index]]
        try:
            return json.loads(text)
        except (JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.location(index)}: not valid JSON: {error}.") from None

    def location(self, index: int) -> str:
        if self.lines is not None:
            return f"{self.path}: line {self.lines[index] + 1}"
        return f"{self.path}: record {index}"

    def folder(self, index: int) -> Path:
        return self.path.parent

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}


class JoinedRows:
    """Several files, one after the other."""

    def __init__(self, files: list[FileRows]):
        self.files = files
        self.ends = np.cumsum([len(rows) for rows in files])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, index: int) -> tuple[FileRows, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.files[number], index - int(self.ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, own = self._find(index)
        return rows[own]

    def location(self, index: int) -> str:
        rows, own = self._find(index)
        return rows.location(own)

    def folder(self, index: int) -> Path:
        rows, own = self._find(index)
        return rows.folder(own)


def open_files(pattern: str) -> Rows:
    """The rows of the file or files that a path, a glob or a {a,b} pattern names, in that order.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that is not a JSON list or JSONL.
    """
    paths = expand(pattern)
    if not paths:
        raise FileNotFoundError(pattern)
    files = [index_file(path) for path in paths]
    return files[0] if len(files) == 1 else JoinedRows(files)


def expand(pattern: str) -> list[Path]:
    """The existing files that a pattern names: braces in the order written, globs in alphabetical order."""
    if Path(pattern).exists():
        return [Path(pattern)]
    if match := _BRACES.search(pattern):
        options = match[1].split(",")
        found = [expand(pattern[: match.start()] + option.strip() + pattern[match.end() :]) for option in options]
        return [path for paths in found for path in paths]
    return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]


def index_file(path: Path) -> FileRows:
    """Where the records of a .json list or a .jsonl file are. Raises ValueError naming the file and line."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a JSON file, and not a data set that datasets' save_to_disk wrote.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _index_lines(path)
    if path.suffix.lower() == ".json":
        return _index_list(path)
    raise ValueError(f"{path}: data files end in .json or .jsonl.")


def _index_lines(path: Path) -> FileRows:
    mapped = _map(path)
    breaks = []
    for start in range(0, len(mapped), _SCANNED_AT_ONCE):
        block = np.frombuffer(mapped[start : start + _SCANNED_AT_ONCE], dtype=np.uint8)
        breaks.append(np.flatnonzero(block == ord("\n")) + start)
    ends = np.append(np.concatenate(breaks), len(mapped)).astype(np.int64)
    starts = np.append(0, ends[:-1] + 1).astype(np.int64)
    if mapped[:3] == b"\xef\xbb\xbf":
        starts[0] = 3
    short = np.flatnonzero(ends - starts < 8)  # only these can be blank in well-formed files
    blank = [k for k in short if not mapped[starts[k] : ends[k]].strip()]
    lines = np.delete(np.arange(len(starts)), blank)
    return FileRows(path, starts[lines], ends[lines], lines)


def _index_list(path: Path) -> FileRows:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from None
    spans = _spans(path, text)
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    if path.stat().st_size != len(text):  # characters and bytes differ
        starts, ends = _in_bytes(text, starts, ends, 3 if path.open("rb").read(3) == b"\xef\xbb\xbf" else 0)
    return FileRows(path, starts, ends, None)


def _spans(path: Path, text: str) -> list[tuple[int, int]]:
    """The character range of every element of a JSON list."""
    decoder, spans = JSONDecoder(), []
    at = _after_white(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(
            f"{path}: a data file is a JSON list of records, and this one starts with {text[at : at + 20]!r}."
        )
    at = _after_white(text, at + 1)
    if text[at : at + 1] == "]":
        raise ValueError(f"{path} is an empty list.")
    while True:
        try:
            _, end = decoder.raw_decode(text, at)
        except JSONDecodeError as error:
            raise ValueError(
                f"{path}: line {error.lineno}, record {len(spans)}: not valid JSON: {error.msg}."
            ) from None
        spans.append((at, end))
        at = _after_white(text, end)
        mark = text[at : at + 1]
        if mark == "]":
            return spans
        if mark != ",":
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}: line {line}: expected ',' or ']' after record {len(spans) - 1}, got {mark!r}.")
        at = _after_white(text, at + 1)


def _after_white(text: str, at: int) -> int:
    match = _WHITE.match(text, at)
    return match.end() if match else at


def _in_bytes(text: str, starts: np.ndarray, ends: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Character ranges as byte ranges of the UTF-8 text behind `offset` bytes."""
    edges = np.stack([starts, ends], axis=1).ravel()
    sizes, before = [], 0
    for edge in edges.tolist():
        sizes.append(len(text[before:edge].encode("utf-8")))
        before = edge
    places = np.cumsum(sizes) + offset
    return places[0::2], places[1::2]


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
