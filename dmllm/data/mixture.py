"""Which record is example number i: data sets, their samples, shuffling and weights.

Without weights, an epoch is every (sampled) record once, shuffled by (seed, epoch). With weights, each example draws
its data set, and each data set is its own endless stream, reshuffled whenever it has been read through. Either way the
order is a pure function of (seed, index): a run resumes at any index, and ranks and workers only divide the indices.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmllm.config import load_config
from dmllm.data.sources import DataSource, Source, open_source
from dmllm.types import Record

BLOCK = 4096  # examples of a weighted mixture that are drawn together
SAMPLE, ORDER, CHOICE, RESERVE = range(4)  # purposes, so that no two draws share a key

_STRATEGY = re.compile(r"(first|end|random):(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data sets to learn from, as in `data_configs/*.yaml`."""

    datasets: tuple[DataSource, ...]
    """LLaVA-NeXT's entries: json_path, sampling_strategy, and optionally image_folder, name, weight, format, turns."""
    on_error: Literal["raise", "skip"] = "raise"
    """A record that cannot be used: raise stops and names it; skip takes another one instead and counts it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "datasets", tuple(self.datasets))
        if not self.datasets:
            raise ValueError("datasets: is empty; list at least one entry with a json_path.")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={self.on_error!r} is not known; use raise or skip.")
        if len({entry.weight is None for entry in self.datasets}) > 1:
            without = ", ".join(entry.label for entry in self.datasets if entry.weight is None)
            raise ValueError(f"Give a weight to every data set or to none; {without} has none.")


def read_data_config(path: str | Path) -> DataConfig:
    """A data configuration from YAML."""
    return load_config(DataConfig, path)


class Mixture:
    """Several sources as one endless, resumable sequence of records.

    Args:
        sources: opened data sets.
        chosen: for each, the records that its sampling strategy keeps.
        weights: for each, its share; None for one pass over everything an epoch.
        seed: of shuffling and choosing.
        shuffle: False leaves the records of an unweighted mixture in the order of the files.
    """

    def __init__(
        self,
        sources: list[Source],
        chosen: list[np.ndarray],
        weights: list[float] | None,
        seed: int,
        shuffle: bool = True,
    ):
        self.sources, self.chosen, self.seed, self.shuffle = sources, chosen, seed, shuffle
        self.sizes = np.array([len(c) for c in chosen])
        self.ends = np.cumsum(self.sizes)
        self.weights = None if weights is None else np.array(weights) / sum(weights)
        self._counts = np.zeros((1, len(sources)), dtype=np.int64)  # examples of each data set before each block
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Examples of an epoch."""
        return int(self.ends[-1])

    def at(self, index: int) -> tuple[int, int]:
        """The data set and the record in it of example `index`."""
        if self.weights is None:
            epoch, place = divmod(index, len(self))
            flat = int(self._order(0, epoch, len(self))[place]) if self.shuffle else place
            return self._split(flat)
        block, place = divmod(index, BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._drawn(block))
        number, turn = int(self._block[1][place]), int(self._block[2][place])
        epoch, within = divmod(turn, int(self.sizes[number]))
        order = self._order(1 + number, epoch, int(self.sizes[number]))
        return number, int(self.chosen[number][order[within]])

    def order(self, start: int = 0) -> Iterator[tuple[int, int, int]]:
        """(index, data set, record) from example `start` on, without end."""
        index = start
        while True:
            yield (index, *self.at(index))
            index += 1

    def record(self, number: int, record: int) -> Record:
        """The record itself. Raises ValueError naming the file and record when it is damaged."""
        return self.sources[number][record]

    def reserve(self, index: int, attempt: int) -> tuple[int, int]:
        """What stands in for example `index` when it cannot be used, and for that one in turn."""
        draws = np.random.default_rng((self.seed, RESERVE, index, attempt))
        if self.weights is None:
            return self._split(int(draws.integers(len(self))))
        number = int(draws.choice(len(self.sources), p=self.weights))
        return number, int(self.chosen[number][draws.integers(self.sizes[number])])

    def _split(self, flat: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.ends, flat, side="right"))
        return number, int(self.chosen[number][flat - int(self.ends[number - 1] if number else 0)])

    def _order(self, stream: int, epoch: int, size: int) -> np.ndarray:
        return _permutation(self.seed, stream, epoch, size)

    def _drawn(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each example of a block, its data set and how many of that data set came before."""
        while len(self._counts) <= block:
            numbers = self._choices(len(self._counts) - 1)
            counts = self._counts[-1] + np.bincount(numbers, minlength=len(self.sources))
            self._counts = np.concatenate([self._counts, counts[None]])
        numbers = self._choices(block)
        is_one = numbers[:, None] == np.arange(len(self.sources))
        before = self._counts[block] + np.cumsum(is_one, axis=0) - is_one
        return numbers, before[np.arange(BLOCK), numbers]

    def _choices(self, block: int) -> np.ndarray:
        assert self.weights is not None
        return np.random.default_rng((self.seed, CHOICE, block)).choice(len(self.weights), BLOCK, p=self.weights)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": None}


@lru_cache(maxsize=16)
def _permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, ORDER, stream, epoch)).permutation(size)


def load_mixture(config: DataConfig | str | Path, *, seed: int, shuffle: bool = True) -> Mixture:
    """The mixture of a data configuration or of its YAML file; relative paths start at the working directory, else at
    the YAML file's folder.

    Raises:
        ValueError: a missing file, a malformed list, an unknown key or sampling strategy.
    """
    base = None
    if not isinstance(config, DataConfig):
        base = Path(config).parent
        config = read_data_config(config)
    sources = [open_source(entry, base) for entry in config.datasets]
    chosen = [sampled(len(s), s.entry.sampling_strategy, seed, s.name) for s in sources]
    for source, kept in zip(sources, chosen, strict=True):
        if not len(kept):
            raise ValueError(
                f"{source.entry.json_path}: sampling_strategy {source.entry.sampling_strategy!r} keeps none of its "
                f"{len(source)} records."
            )
    weights = [w for entry in config.datasets if (w := entry.weight) is not None]
    return Mixture(sources, chosen, weights or None, seed, shuffle)


def sampled(size: int, strategy: str, seed: int, name: str) -> np.ndarray:
    """The record numbers that a sampling strategy keeps of `size`: all, first|end|random:N or :N%, rounded up.

    Raises:
        ValueError: an unknown strategy, or more records than there are.
    """
    if strategy == "all":
        return np.arange(size)
    match = _STRATEGY.fullmatch(strategy.strip())
    if match is None or (not match[3] and "." in match[2]):
        raise ValueError(
            f"{name}: sampling_strategy={strategy!r}; use all, first:N, end:N or random:N, N a number or a percentage, "
            "for example random:10%."
        )
    kind, number, percent = match.groups()
    count = math.ceil(float(number) * size / 100) if percent else int(number)
    if count > size:
        raise ValueError(f"{name}: sampling_strategy={strategy!r} asks for {count} of {size} records.")
    if kind == "random":
        draws = np.random.default_rng((seed, SAMPLE, zlib.crc32(name.encode())))
        return np.sort(draws.permutation(size)[:count])
    return np.arange(count) if kind == "first" else np.arange(size - count, size)
