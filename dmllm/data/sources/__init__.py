"""Where records come from: LLaVA conversations, messages with images, OpenAI content parts, Hugging Face datasets.

JSON and JSONL files are indexed by byte offsets and mapped into memory: a record is parsed when it is asked for,
nothing is held but the index, and processes on one machine share the file's pages. Errors name the file and the record
(JSON, counted from 0) or the line (JSONL, counted from 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmllm.data.packing import Turns
from dmllm.data.sources.files import Rows, expand, open_files
from dmllm.data.sources.huggingface import is_saved_dataset, open_dataset
from dmllm.data.sources.records import Format, read_row
from dmllm.types import Record


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One entry of a data configuration, LLaVA-NeXT's keys and a few optional ones."""

    json_path: str
    """A .json or .jsonl file, several by glob or {a,b}; a folder of datasets' save_to_disk; or hf:HUB_NAME."""
    sampling_strategy: str = "all"
    """all, or first|end|random:N or :N% of the records; random is seeded."""
    image_folder: str | None = None
    """Where relative image paths start; None: beside the JSON file."""
    name: str | None = None
    """What the data set is called in reports; None: the file's name, or its folder's when the file is data.json."""
    weight: float | None = None
    """Share of the mixture, relative to the others; None for all: every record once an epoch."""
    format: Format = "auto"
    """auto: told by the keys; llava: conversations; messages: messages with images; openai: content parts."""
    turns: Turns | None = None
    """Which turns become documents; None: as the processor is configured."""
    split: str = "train"
    """Hugging Face datasets only: the split."""
    subset: str | None = None
    """Hugging Face datasets only: the configuration's name on the hub."""

    def __post_init__(self) -> None:
        if self.weight is not None and not self.weight > 0:
            raise ValueError(
                f"{self.json_path}: weight={self.weight} must be greater than 0; remove the entry instead."
            )
        if self.format not in ("auto", "llava", "messages", "openai"):
            raise ValueError(f"{self.json_path}: format={self.format!r}; use auto, llava, messages or openai.")

    @property
    def label(self) -> str:
        """The name used in reports."""
        path = Path(self.json_path.removeprefix("hf:"))
        return self.name or (path.parent.name if path.stem == "data" and path.parent.name else path.stem)


class Source(Sequence[Record]):
    """The records of one data set, read when they are asked for."""

    def __init__(self, entry: DataSource, rows: Rows, image_folder: Path | None):
        self.entry, self.rows, self.image_folder = entry, rows, image_folder
        self.name = entry.label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        """Raises ValueError naming the file and record if the row is damaged or of another form."""
        try:
            row = self.rows[index]
            folder = self.image_folder or self.rows.folder(index)
            messages = read_row(row, self.entry.format, folder)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            where = self.location(index)
            text = str(error) if not isinstance(error, KeyError) else f"the key {error} is missing"
            raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
        return Record(
            messages=messages, source=self.name, location=self.rows.location(index), id=str(row.get("id", ""))
        )

    def location(self, index: int) -> str:
        """What record `index` is called in messages."""
        return self.rows.location(index)


def open_source(entry: DataSource, base: Path | None = None) -> Source:
    """The records of a data source; relative paths start at the working directory, else at `base`.

    Raises:
        ValueError: there is no such file or data set, or it is not readable as one.
    """
    folder = None
    if entry.image_folder is not None:
        folder = _found(entry.image_folder, base)
        if not folder.is_dir():
            raise ValueError(f"image_folder {entry.image_folder} is not a folder, {_tried(base)}.")
    if entry.json_path.startswith("hf:"):
        name = entry.json_path.removeprefix("hf:")
        return Source(entry, open_dataset(name, entry.split, entry.subset), folder)
    path = _found(entry.json_path, base)
    if is_saved_dataset(path):
        return Source(entry, open_dataset(path, entry.split, entry.subset), folder)
    try:
        return Source(entry, open_files(str(path)), folder)
    except FileNotFoundError:
        raise ValueError(f"json_path {entry.json_path}: there is no such file, {_tried(base)}.") from None


def _found(path: str, base: Path | None) -> Path:
    """The path from the working directory if something is there, else from `base`."""
    if base is None or Path(path).is_absolute() or expand(path):
        return Path(path)
    return base / path


def _tried(base: Path | None) -> str:
    return f"seen from {Path.cwd()}" + (f" or from {base.resolve()}" if base is not None else "")
