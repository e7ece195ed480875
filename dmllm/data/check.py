"""Look data over before training on it: every record is read, every image decoded, every problem listed.

With a processor, every record also becomes an example, so that lengths are in tokens and what does not fit is found;
without one, lengths are in words and characters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmllm.data.images import MAX_PIXELS, load_image
from dmllm.data.loader import example_seed
from dmllm.data.mixture import DataConfig, load_mixture
from dmllm.data.pictures import draw_samples
from dmllm.data.processor import Processor
from dmllm.data.sources import Source
from dmllm.types import IGNORE, Record

SEED = 0
NO_LIMIT = 1 << 30


@dataclass
class DataSetReport:
    """What one data set holds."""

    name: str
    path: str
    records: int  # in its files
    used: int  # kept by its sampling strategy
    text_only: int = 0
    images: int = 0
    answers: int = 0
    cut: int = 0  # examples longer than the processor's max_length
    bad: int = 0  # records that cannot be used
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def measure(self, name: str, value: int) -> None:
        """Note one record's length."""
        self.lengths.setdefault(name, []).append(value)

    def lines(self) -> list[str]:
        """The report, readable."""
        kept = "" if self.used == self.records else f", {self.used} used"
        lines = [
            f"{self.name}: {self.records} records{kept} ({self.path})",
            f"  {self.images} images, {self.answers} answers, {self.text_only} records without image, "
            f"{self.bad} that cannot be used",
        ]
        for name, values in self.lengths.items():
            low, half, most, top = np.percentile(values, [0, 50, 95, 100], method="nearest")
            lines.append(f"  {name}: {low} at least, {half} in the middle, {most} at 95 %, {top} at most")
        if self.cut:
            lines.append(f"  {self.cut} records are longer than max_length and lose their last turns or words")
        if self.kinds:
            lines.append("  kinds: " + ", ".join(f"{kind} {count}" for kind, count in self.kinds.most_common()))
        return lines


@dataclass(frozen=True)
class Report:
    """What was found: one part a data set, every problem with its file and record, and the picture of samples."""

    datasets: list[DataSetReport]
    problems: list[str]
    picture: Path | None = None

    def lines(self) -> list[str]:
        """The report, readable, for a command line."""
        lines = [line for part in self.datasets for line in part.lines()]
        lines += [f"problem: {problem}" for problem in self.problems] or ["no problems"]
        if self.picture is not None:
            lines.append(f"samples: {self.picture}")
        return lines


def check(
    config: DataConfig | str | Path,
    processor: Processor | None = None,
    *,
    samples: int = 3,
    out: str | Path | None = None,
) -> Report:
    """Read everything that a data configuration names.

    Args:
        config: a configuration, or its YAML file.
        processor: of the model that will learn from it.
        samples: records to draw into one picture.
        out: the picture's .png file, or the folder for it (samples.png); None draws none.

    Raises:
        ValueError: the configuration itself is unusable, e.g. a missing file; problems of records are in the report.
    """
    mixture = load_mixture(config, seed=SEED)
    unlimited = None
    if processor is not None:
        free = replace(processor.config, max_length=NO_LIMIT)
        unlimited = Processor(processor.tokenizer, free, processor.special, processor.chat_template)
    parts, problems, sound = [], [], []
    for source, chosen in zip(mixture.sources, mixture.chosen, strict=True):
        part = DataSetReport(name=source.name, path=source.entry.json_path, records=len(source), used=len(chosen))
        good = []
        for number in chosen.tolist():
            found = _look(source, number, part, processor, unlimited)
            part.bad += bool(found)
            problems += found
            if not found and len(good) < samples:
                good.append(number)
        parts.append(part)
        sound += [(place, source, number) for place, number in enumerate(good)]
    shown = [source[number] for _, source, number in sorted(sound, key=lambda entry: entry[0])[:samples]]
    picture = None
    if out is not None and shown:
        picture = Path(out) if Path(out).suffix.lower() == ".png" else Path(out) / "samples.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_samples(shown).save(picture)
    return Report(parts, problems, picture)


def _look(
    source: Source, number: int, part: DataSetReport, processor: Processor | None, unlimited: Processor | None
) -> list[str]:
    """Note one record in the report of its data set; returns its problems."""
    try:
        record = source[number]
    except ValueError as error:
        return [str(error)]
    _count(record, part)
    limit = MAX_PIXELS if processor is None else processor.config.max_pixels
    problems = []
    images = [p.get("image") for m in record.messages for p in m["content"] if p["type"] == "image"]
    part.images += len(images)
    part.text_only += not images
    for image in images:
        try:
            load_image(image, limit)
        except ValueError as error:
            problems.append(f"{record.location}: {error}")
    answers = [m for m in record.messages if m["role"] == "assistant"]
    if not answers:
        problems.append(f"{record.location}: no assistant turn, so there is nothing to learn from.")
    if problems or processor is None or unlimited is None:
        return problems
    generator = torch.Generator().manual_seed(example_seed(SEED, number))
    try:
        example = unlimited.example(record, generator=generator, turns=source.entry.turns)
        part.measure("tokens of an example", len(example))
        part.measure("labelled tokens of an example", int((example.labels != IGNORE).sum()))
        if len(example) > processor.config.max_length:
            part.cut += 1
            processor.example(record, generator=generator, turns=source.entry.turns)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _count(record: Record, part: DataSetReport) -> None:
    words: dict[str, Any] = {"user": 0, "assistant": 0}
    characters = 0
    for message in record.messages:
        text = " ".join(p.get("text", "") for p in message["content"])
        characters += len(text)
        if message["role"] in words:
            words[message["role"]] += len(text.split())
        part.answers += message["role"] == "assistant"
        if kind := message.get("kind"):
            part.kinds[str(kind)] += 1
    part.measure("words asked", words["user"])
    part.measure("words answered", words["assistant"])
    part.measure("characters", characters)
