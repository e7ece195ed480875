"""Questions with their truths, from a task's data: each asked alone, with its pictures.

Two kinds of rows are read, from JSON, JSONL or Hugging Face data sets:

    LLaVA conversations (or any form dmllm.data.sources reads): every turn is one question and the reply its truth;
        pictures of earlier turns are shown too, earlier words are not
    {"question": "...", "answers": ["...", ...] or "answer": "...", "image": "...", "kind": "..."}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dmllm.data.builtin import chance, make
from dmllm.data.packing import split_turns
from dmllm.data.sources import DataSource, Source, open_source
from dmllm.data.sources.records import read_row
from dmllm.evaluation.config import TaskConfig
from dmllm.evaluation.metrics import METRICS, Metric
from dmllm.types import Message, Part

ONE_KIND = "all"  # the kind of questions whose data names none


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to ask."""

    id: str
    """task/record/turn, unique in a suite and the same in every run."""
    task: str
    kind: str
    text: str
    """As in the data, before the prompt template."""
    truths: tuple[str, ...]
    messages: tuple[Message, ...]
    """What the model is asked, last of all by the user: pictures and the templated text."""
    location: str
    """File and record, for messages."""
    decode: dict[str, Any]
    """Decode settings that the suite gives this question."""
    metric: str

    @property
    def images(self) -> list[Any]:
        """Its pictures: paths, bytes or data URLs."""
        return [part.get("image") for m in self.messages for part in m["content"] if part["type"] == "image"]


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record of which no question could be made."""

    id: str
    task: str
    location: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task whose data has been read."""

    config: TaskConfig
    items: list[Question | BadRecord]
    data: str
    sha256: str | None
    """Of the data file; None for several files or a Hugging Face data set."""
    chance: dict[str, float]
    """Score of guessing by kind, as far as known."""

    @property
    def questions_sha256(self) -> str:
        """Digest of what is asked and what is true: two evaluations with the same one can be compared."""
        told = [(i.id, i.kind, i.text, i.truths) if isinstance(i, Question) else (i.id,) for i in self.items]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def read_task(config: TaskConfig, *, decode: dict[str, Any], folder: Path, on_error: Literal["raise", "skip"]) -> Task:
    """The questions of a task, in the order of its data.

    Args:
        decode: the suite's decode settings, under the task's.
        folder: where a built-in data set is made (`folder/NAME-SPLIT-NUM-SEED`).
        on_error: skip keeps a record that cannot be asked as a `BadRecord`.

    Raises:
        ValueError: no such data; no question is left; or (on_error raise) a record that cannot be asked.
    """
    if config.builtin is not None:
        options = [f"{key}_{value}" for key, value in sorted(config.options.items())]
        made = folder / "-".join(map(str, (config.builtin, config.split, config.num, config.seed, *options)))
        make(config.builtin, made, num=config.num, split=config.split, seed=config.seed, **config.options)
        path, guessing = str(made / "data.json"), chance(config.builtin)
    else:
        assert config.data is not None
        path, guessing = config.data, {}
    source = open_source(DataSource(json_path=path, image_folder=config.image_folder, name=config.name))
    items: list[Question | BadRecord] = []
    asked = 0
    for item in _items(config, source, decode):
        if isinstance(item, BadRecord) and on_error == "raise":
            raise ValueError(f"{item.error} (on_error: skip counts such records and goes on)")
        items.append(item)
        asked += isinstance(item, Question)
        if asked == config.limit:
            break
    if not asked:
        seen = "no record of it could be read" if items else f"no question is of kind {config.kinds}"
        raise ValueError(f"Task {config.name!r} asks nothing of {path}: {seen}.")
    exact = {item.kind for item in items if isinstance(item, Question) and item.metric == "exact_match"}
    guessing = {kind: score for kind, score in guessing.items() if kind in exact} | config.chance
    return Task(config=config, items=items, data=path, sha256=sha256_of(Path(path)), chance=guessing)


def sha256_of(path: Path) -> str | None:
    """The digest of a file's bytes, None for what is not one file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _items(config: TaskConfig, source: Source, decode: dict[str, Any]) -> Iterator[Question | BadRecord]:
    for index in range(len(source)):
        where = f"{config.name}/{index}"
        try:
            pairs = list(_pairs(source, index))
            questions = [
                _question(config, f"{where}/{turn}", source.location(index), decode, *pair)
                for turn, pair in enumerate(pairs)
                if config.kinds is None or _kind(pair[0]) in config.kinds
            ]
        except ValueError as error:
            text, location = str(error), source.location(index)
            text = text if text.startswith(location) else f"{location}: {text}"
            yield BadRecord(id=where, task=config.name, location=location, error=text)
            continue
        yield from questions


def _pairs(source: Source, index: int) -> Iterator[tuple[list[Message], tuple[str, ...]]]:
    """What is asked, with all its pictures, and its truths."""
    row = source.rows[index]
    if isinstance(row, dict) and "question" in row:
        asked = {"role": "user", "content": _text(row["question"], "question"), "kind": row.get("kind", ONE_KIND)}
        listed = {key: row[key] for key in ("image", "images") if key in row}
        folder = source.image_folder or source.rows.folder(index)
        yield read_row({"messages": [asked], **listed}, "messages", folder), _truths(row)
        return
    for conversation in split_turns(source[index].messages, "each", torch.Generator()):
        *asked, reply = conversation
        if not asked or asked[-1]["role"] != "user":
            raise ValueError("an answer without a question before it.")
        yield asked, ("".join(part.get("text", "") for part in reply["content"]),)


def _truths(row: dict[str, Any]) -> tuple[str, ...]:
    """The answers of a row, as texts or as VQAv2's {"answer": text}."""
    given = row["answers"] if row.get("answers") is not None else row.get("answer")
    listed = given if isinstance(given, list) else [given]
    if given is None or not listed:
        raise ValueError("a question needs 'answers': [...] or 'answer'.")
    return tuple(_text(a["answer"] if isinstance(a, dict) and "answer" in a else a, "answer") for a in listed)


def _text(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the {name} is {value!r:.60}, not a text or a number.")
    return str(value)


def _question(
    config: TaskConfig, name: str, location: str, decode: dict[str, Any], asked: list[Message], truths: tuple[str, ...]
) -> Question:
    kind = _kind(asked)
    metric: Metric = METRICS.load(config.metric_name(kind))
    if metric.each is not None:
        metric.each("", truths)  # raises for truths that the metric cannot score
    last: Message = {"role": "user", "content": templated(config.prompt, asked[-1]["content"])}
    return Question(
        id=name,
        task=config.name,
        kind=kind,
        text="".join(part.get("text", "") for part in asked[-1]["content"]).strip(),
        truths=truths,
        messages=(*asked[:-1], last),
        location=location,
        decode={**decode, **config.decode, **config.decode_by_kind.get(kind, {})},
        metric=config.metric_name(kind),
    )


def _kind(asked: list[Message]) -> str:
    return str(asked[-1].get("kind", ONE_KIND))


def templated(prompt: str, content: list[Part]) -> list[Part]:
    """The parts with the template's words before the first and after the last text; pictures keep their places."""
    before, _, after = prompt.partition("{question}")
    texts = [i for i, part in enumerate(content) if part["type"] == "text"]
    if not texts:
        raise ValueError("the question has no text.")
    parts: list[Part] = [{**part} for part in content]
    parts[texts[0]]["text"] = before + parts[texts[0]].get("text", "")
    parts[texts[-1]]["text"] = parts[texts[-1]].get("text", "") + after
    return parts
