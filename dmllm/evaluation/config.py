"""What an evaluation asks: a suite of tasks, in YAML as in eval/suites/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dmllm.evaluation.metrics import METRICS

OTHER_KINDS = "default"


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Questions, mostly about pictures, and how their answers are scored. Give `data` or `builtin`."""

    name: str
    """Names the task in results; unique in a suite."""
    data: str | None = None
    """LLaVA JSON / JSONL (each human/gpt pair is asked alone), or rows of question, answer or answers, image, kind."""
    image_folder: str | None = None
    """Where relative image paths start; without it, at the data file's folder."""
    builtin: str | None = None
    """scenes, digits or stories: made on disk in the output folder first."""
    num: int = 200
    """Pictures of a built-in data set."""
    seed: int = 0
    """Seed of a built-in data set."""
    split: Literal["train", "val", "test"] = "test"
    """Split of a built-in data set."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a built-in data set, e.g. size."""
    prompt: str = "{question}"
    """What the model is asked; {question} stands for the question, line breaks are kept."""
    metric: str | dict[str, str] = "exact_match"
    """A metric's name, or question kind -> metric; the kind "default" stands for all not named."""
    kinds: list[str] | None = None
    """Ask only these kinds of question; null asks all."""
    limit: int | None = None
    """Ask only the first so many questions; null asks all."""
    decode: dict[str, Any] = field(default_factory=dict)
    """Decode settings of this task, over the suite's."""
    decode_by_kind: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Decode settings of single kinds, over the task's: long canvases only where answers are long."""
    chance: dict[str, float] = field(default_factory=dict)
    """Score of guessing by kind, for the report; built-in data sets bring their own."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.builtin is None):
            raise ValueError(f"Task {self.name!r} needs either data: FILE or builtin: scenes|digits|stories, not both.")
        if "{question}" not in self.prompt:
            raise ValueError(f"Task {self.name!r}: the prompt {self.prompt!r} must contain '{{question}}'.")
        for label, value in (("num", self.num), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"Task {self.name!r}: {label}={value}; it must be at least 1.")
        for name in {self.metric} if isinstance(self.metric, str) else set(self.metric.values()):
            if ":" not in name and name not in METRICS:
                METRICS.load(name)  # raises the error that names the known ones

    def metric_name(self, kind: str) -> str:
        """The metric of a question kind. Raises ValueError when a mapping has neither it nor "default"."""
        if isinstance(self.metric, str):
            return self.metric
        name = self.metric.get(kind, self.metric.get(OTHER_KINDS))
        if name is None:
            raise ValueError(
                f"Task {self.name!r} has no metric for questions of kind {kind!r}; add '{kind}: exact_match' or "
                f"'{OTHER_KINDS}: exact_match' under metric."
            )
        return name


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Tasks that are evaluated together."""

    tasks: list[TaskConfig]
    """Asked in this order."""
    decode: dict[str, Any] = field(default_factory=dict)
    """Decode settings of every task, over the model's own defaults; keys as in `Pipeline.chat`."""
    limit: int | None = None
    """Ask only the first so many questions of every task, for a quick look; null leaves it to the tasks."""
    batch_size: int = 32
    """Questions decoded together; changes the time, not the answers."""
    seed: int = 0
    """Seed of sampled decoding (temperature above 0); each question draws from its own generator."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read or asked: stop, or count it and go on."""

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"A suite needs tasks with distinct names, not {names}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; it must be at least 1.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}; it must be at least 1, or null for all questions.")
