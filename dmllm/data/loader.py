"""Batches of a mixture for one rank, by worker processes, resumable at any example.

Batch b of rank r of R holds the global examples start + (b * R + r) * batch_size + [0, batch_size). Everything random
about an example is keyed by (seed, its global index), so that neither ranks, nor workers, nor a resumption change it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dmllm.data.collate import collate
from dmllm.data.mixture import Mixture
from dmllm.data.processor import Processor
from dmllm.types import Batch, Example

logger = logging.getLogger(__name__)

ATTEMPTS = 100  # records tried for one example before the data is called unusable
EXAMPLE = 4  # purpose of the draws, beside dmllm.data.mixture's


class Loader:
    """An endless iterator of batches; `skipped` counts the records that could not be used, `reasons` says why."""

    def __init__(self, batches: DataLoader):
        self._batches = batches
        self._iterator: Iterator[tuple[Batch | ValueError, list[str]]] | None = None
        self.skipped = 0
        self.reasons: dict[str, int] = {}

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._batches)
        batch, reasons = next(self._iterator)
        if isinstance(batch, ValueError):
            self.close()
            raise batch
        for reason in reasons:
            self.skipped += 1
            if reason not in self.reasons:
                logger.warning("skipped %s", reason)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        return batch

    def close(self) -> None:
        """Stop the worker processes."""
        self._iterator = None


def build_loader(
    mixture: Mixture,
    processor: Processor,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    num_workers: int = 0,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    pad_to_multiple: int = 1,
) -> Loader:
    """The batches of this rank from global example `start` on.

    Args:
        batch_size: examples of a batch on this rank.
        num_workers: processes that prepare batches; 0 prepares them in this one.
        on_error: raise stops at a record that cannot be used; skip puts another record in its place.
        pad_to_multiple: row lengths are rounded up to a multiple of this.

    Raises:
        ValueError: no such rank, or an empty batch.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} of world_size={world_size}: ranks count from 0.")
    if batch_size < 1 or start < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1 and start={start} at least 0.")
    batches = _Batches(mixture, processor, batch_size, rank, world_size, start, seed, on_error, pad_to_multiple)
    return Loader(
        DataLoader(
            batches,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_one_thread if num_workers else None,
            prefetch_factor=4 if num_workers else None,
        )
    )


class _Batches(IterableDataset[tuple[Batch | ValueError, list[str]]]):
    """Worker w of W prepares batches w, w + W, ...; the DataLoader takes them in turn."""

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        batch_size: int,
        rank: int,
        world_size: int,
        start: int,
        seed: int,
        on_error: str,
        pad_to_multiple: int,
    ):
        self.mixture, self.processor, self.batch_size = mixture, processor, batch_size
        self.rank, self.world_size, self.start, self.seed = rank, world_size, start, seed
        self.on_error, self.pad_to_multiple = on_error, pad_to_multiple

    def __iter__(self) -> Iterator[tuple[Batch | ValueError, list[str]]]:
        worker = get_worker_info()
        batch, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        config, reasons = self.processor.config, []
        while True:
            first = self.start + (batch * self.world_size + self.rank) * self.batch_size
            try:
                examples = [self._example(index, reasons) for index in range(first, first + self.batch_size)]
            except ValueError as error:  # raised by the Loader, in the main process
                yield error, reasons
                return
            collated = collate(
                examples,
                self.processor.special,
                rows_per_tile=self.processor.rows_per_tile,
                pad_to_multiple=self.pad_to_multiple,
                eos_padding=config.eos_padding,
                score_padding=config.score_padding,
            )
            yield collated, reasons
            batch, reasons = batch + stride, []

    def _example(self, index: int, reasons: list[str]) -> Example:
        generator = torch.Generator()
        number, record = self.mixture.at(index)
        for attempt in range(ATTEMPTS):
            generator.manual_seed(example_seed(self.seed, index, attempt))
            try:
                return self.processor.example(
                    self.mixture.record(number, record),
                    generator=generator,
                    turns=self.mixture.sources[number].entry.turns,
                    index=index,
                )
            except ValueError as error:
                if self.on_error == "raise":
                    raise
                reasons.append(str(error))
                number, record = self.mixture.reserve(index, attempt)
        raise ValueError(f"{ATTEMPTS} records in a row could not be used; the last one: {reasons[-1]}")


def example_seed(seed: int, index: int, attempt: int = 0) -> int:
    """The seed of an example's own draws (its random turn, its canvas length): splitmix64 over the key."""
    mixed = 0
    for part in (seed, EXAMPLE, index, attempt):
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _64_BITS
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64_BITS
        mixed ^= mixed >> 31
    return mixed >> 1


_64_BITS = (1 << 64) - 1


def _one_thread(worker: int, *_: Any) -> None:
    torch.set_num_threads(1)
