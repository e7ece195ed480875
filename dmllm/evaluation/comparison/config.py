"""What a comparison is told: paradigms, and studies in which all of them learn from the same data.

A run's training configuration is what is said of all, then of the study, then of the paradigm, the later over the
earlier; it is written as YAML beside the run, so that `dmllm train` can repeat it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dmllm.config import load_config, read_yaml
from dmllm.evaluation.config import TaskConfig
from dmllm.registry import nearest


@dataclass(frozen=True, kw_only=True)
class BuiltinData:
    """A built-in data set, made when it is needed."""

    builtin: str
    """scenes, digits or stories."""
    num: int
    """Pictures or texts."""
    seed: int = 0
    """Seed of what is drawn."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the data set, e.g. {kinds: [story]}."""
    weight: float | None = None
    """Share of the mixture; null for all: every record once an epoch."""


@dataclass(frozen=True, kw_only=True)
class Paradigm:
    """One way of learning and of answering."""

    name: str
    """Names it in results; unique."""
    objective: str
    """A name of `objectives.OBJECTIVES`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The objective's options."""
    model: dict[str, Any] = field(default_factory=dict)
    """Over the study's `model`, e.g. {visibility: "block:4"}."""
    train: dict[str, Any] = field(default_factory=dict)
    """Further training fields over the study's; what is compared should not differ here."""
    start: str | None = None
    """The paradigm from whose model, of the same study and seed, this one starts; null is random weights."""
    bound: dict[str, Any] | None = None
    """Options over `options` with which the loss is a bound on -log p in nats; null: this is no likelihood."""
    decode: dict[str, Any] = field(default_factory=dict)
    """Decode settings."""
    hole: str = "[MASK:{}]"
    """How a hole of {} tokens is written where it is filled from both sides; [MASK:*] is one of any length."""
    free: dict[str, Any] = field(default_factory=dict)
    """Decode settings over `decode` where texts are drawn freely, at temperature 1."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Further settings over these, each a point of quality against forwards."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Data, and what is measured of those who have learned from it."""

    name: str
    """Names it in results; unique."""
    title: str = ""
    """A line above its tables."""
    data: list[BuiltinData]
    """What is learned from."""
    held_out: BuiltinData
    """What validation losses and bounds are measured on: the validation split."""
    test: BuiltinData | None = None
    """Stories with holes, of the test split; null: no holes are filled and nothing is drawn freely."""
    train: dict[str, Any] = field(default_factory=dict)
    """Training fields over the comparison's."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Arguments of `train_tokenizer` over the comparison's."""
    paradigms: list[str] = field(default_factory=list)
    """Names; [] is all."""
    seeds: list[int] = field(default_factory=list)
    """Training seeds; [] is the comparison's."""
    holes: list[str] = field(default_factory=list)
    """Kinds of holes that are filled, and whose fillings are ranked."""
    questions: int = 100
    """Holes of each kind."""
    ranked: int = 0
    """Of these, how many are also answered by ranking the truth among wrong fillings; 0: none."""
    rank_samples: int = 16
    """Views by which a bound is estimated when ranking."""
    length: int = 44
    """Tokens of a text that is drawn freely, its end among them."""
    free: int = 0
    """Texts drawn freely at temperature 1; 0: none."""
    bound: int = 0
    """Held-out texts on which the bound is measured; 0: it is not."""
    bound_draws: int = 8
    """Times that each of them is noised."""
    suite: list[TaskConfig] = field(default_factory=list)
    """Questions that are asked in a chat, as in `dmllm eval`."""
    curves: list[str] = field(default_factory=list)
    """For what quality against forwards is measured: kinds of holes, and "free"."""
    timed: int = 0
    """Questions asked one by one, for the time of an answer; 0: none."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """All of it."""

    paradigms: list[Paradigm]
    """In the order of the tables."""
    studies: list[Study]
    """In the order of the report."""
    train: dict[str, Any] = field(default_factory=dict)
    """Training fields (`training.config.TrainConfig`) that all runs share."""
    tokenizer: dict[str, Any] = field(default_factory=lambda: {"vocab_size": 2048})
    """Arguments of `train_tokenizer`; each study has one, learned from its own data."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Training seeds. Data and questions are the same under all of them."""
    processes: int = 2
    """Runs at a time, each with one thread."""
    batch_size: int = 25
    """Questions decoded together; changes the time, not the answers."""

    def __post_init__(self) -> None:
        for what, names in (
            ("paradigms", [p.name for p in self.paradigms]),
            ("studies", [s.name for s in self.studies]),
        ):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{what} must have distinct names, not {names}.")
        known = [p.name for p in self.paradigms]
        for paradigm in self.paradigms:
            if paradigm.start is not None and (paradigm.start not in known or paradigm.start == paradigm.name):
                raise ValueError(f"{paradigm.name}: start={paradigm.start!r} is not another paradigm here.")
        for study in self.studies:
            for name in study.paradigms:
                if name not in known:
                    raise ValueError(f"study {study.name}: no paradigm is called {name!r}; {nearest(name, known)}")
        if not self.seeds or self.processes < 1 or self.batch_size < 1:
            raise ValueError("seeds needs at least one seed, and processes and batch_size must be at least 1.")

    def of(self, study: Study) -> list[Paradigm]:
        """The paradigms of a study, in order."""
        return [p for p in self.paradigms if not study.paradigms or p.name in study.paradigms]

    def seeds_of(self, study: Study) -> list[int]:
        return study.seeds or self.seeds


def read_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    short: bool = False,
    only: Sequence[str] = (),
    studies: Sequence[str] = (),
) -> CompareConfig:
    """The comparison in a YAML file.

    Args:
        overrides: `--seeds=[0]` and the like.
        short: whether what the file says under `short` goes over what it says otherwise.
        only: names of the paradigms to keep, with those they start from; () keeps all.
        studies: names of the studies to keep; () keeps all.

    Raises:
        ValueError, FileNotFoundError: as `load_config`; or an unknown name.
    """
    values = read_yaml(path)
    over = values.pop("short", {})
    values = merge(values, over) if short else values
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        config = load_config(CompareConfig, file, list(overrides))
    known, asked = {paradigm.name: paradigm for paradigm in config.paradigms}, [s.name for s in config.studies]
    for what, names, there in (("paradigm", only, list(known)), ("study", studies, asked)):
        for name in names:
            if name not in there:
                raise ValueError(f"{path}: no {what} is called {name!r}; {nearest(name, there)}")
    kept = {*only, *(start for name in only if (start := known[name].start))} if only else {*known}
    chosen = [
        replace(study, paradigms=own)
        for study in config.studies
        if study.name in (studies or asked) and (own := [n for n in study.paradigms or known if n in kept])
    ]
    return replace(config, paradigms=[p for p in config.paradigms if p.name in kept], studies=chosen)


def merge(below: Any, above: Any) -> Any:
    """`above` over `below`: mappings key by key, lists of named things name by name (new ones behind), all else as a
    whole."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {k: merge(below.get(k), above[k]) if k in above else below[k] for k in dict.fromkeys([*below, *above])}
    if _is_named(below) and _is_named(above):
        new = {one["name"]: one for one in above}
        kept = [merge(one, new.pop(one["name"], {})) for one in below]
        return [*kept, *new.values()]
    return below if above is None and below is not None else above


def _is_named(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, dict) and "name" in v for v in values)
