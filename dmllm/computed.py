"""Prompts whose rows are computed once: what earlier requests began with is not fed again, where that changes nothing.

A prompt is known by what stands in each place from its first row on: a token or a row of a picture, its positions and
document; and by who sees whom and the model's weights as they are. What is taken over is

    causal     the longest beginning that both have
    block:N    the same in whole blocks
    prefix     the whole prompt, or else its rows of document PREFIX, which see nothing but each other; and
    permutation  the same
    full       nothing: every row sees the canvas

Keys and values are kept where they were computed, the longest unused ones leaving first.

Shapes: B rows of a batch, P prompt rows, n places of one prompt, C numbers that say what stands in a place.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmllm.encoded import ROOM, EncodedImages, weights_of
from dmllm.nn.cache import KVCache
from dmllm.nn.visibility import ORDERED, check_layout
from dmllm.requests import fingerprint
from dmllm.tiling import Resize
from dmllm.types import PADDING, PREFIX, TEXT, Batch

Saved = dict[str, Tensor]
WHOLE = ("prefix", ORDERED)  # of which every prompt row sees all of the prompt


class ComputedPrompts:
    """The beginnings of earlier prompts.

    Args:
        room: bytes that are kept for later calls; 0 keeps none.
    """

    def __init__(self, room: int = ROOM):
        if type(room) is not int or room < 0:
            raise ValueError(f"prompt_room={room!r} must be a whole number of bytes; 0 keeps no computed prompts.")
        self.room = room
        self.hits = self.misses = 0  # prompt rows that were here, and that could have been
        self.bytes = 0
        self._weights: Any = None
        self._kept: OrderedDict[tuple[str, bytes], Saved] = OrderedDict()  # by who sees whom and what stands there
        self._lock = threading.Lock()

    def load(
        self,
        model: Any,
        cache: KVCache | None,
        visibility: str,
        batch: Batch,
        rows_per_tile: int,
        masked: int | None = None,
    ) -> tuple[list[int] | None, Callable[[], None] | None]:
        """How many of each prompt's first rows now stand in the fresh cache, and what is to be called once the others
        do too; None where nothing is kept.

        Args:
            batch: the prompts, on the CPU.
            rows_per_tile: of its pictures' features.
            masked: a mask token that takes the place of every row in a second copy of the batch, behind it.
        """
        weights = _version(model) if self.room and cache is not None and visibility != "full" else None
        if cache is None or weights is None:
            return None, None
        prompts = contents_of(batch, rows_per_tile)
        if masked is not None:
            nothing = torch.full_like(batch.image_slots, TEXT)
            hidden = replace(batch, input_ids=torch.full_like(nothing, masked), image_slots=nothing)
            prompts += contents_of(hidden, rows_per_tile)
        multiple = check_layout(visibility) or 1
        prompts = [prompt[: len(prompt) // multiple * multiple] for prompt in prompts]
        found = self._look_up(weights, visibility, prompts)
        cache.load(found)
        loaded = [len(next(iter(saved.values()))) if saved else 0 for saved in found]

        def keep() -> None:
            if _version(model) == weights:
                for row, (prompt, known) in enumerate(zip(prompts, loaded, strict=True)):
                    if known < len(prompt):
                        self._keep(weights, visibility, prompt, cache, row)

        return loaded, keep

    def clear(self) -> None:
        """Forgets all prompts."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def _look_up(self, weights: Any, visibility: str, prompts: list[np.ndarray]) -> list[Saved]:
        if weights != self._weights:
            self.clear()
            self._weights = weights
        found = []
        with self._lock:
            for prompt in prompts:
                count, best = 0, None
                for key in self._kept:
                    known = np.frombuffer(key[1], prompt.dtype).reshape(-1, prompt.shape[1])
                    usable = _usable(visibility, known, prompt) if key[0] == visibility else 0
                    count, best = (usable, key) if usable > count else (count, best)
                self.hits, self.misses = self.hits + count, self.misses + len(prompt) - count
                if best is None:
                    found.append({})
                    continue
                self._kept.move_to_end(best)
                found.append({name: value[:count] for name, value in self._kept[best].items()})
        return found

    def _keep(self, weights: Any, visibility: str, prompt: np.ndarray, cache: KVCache, row: int) -> None:
        key, size = (visibility, prompt.tobytes()), len(prompt) * cache.bytes
        with self._lock:
            if not 0 < size <= self.room or key in self._kept or weights != self._weights:
                return
            if visibility not in WHOLE:  # one that this begins with is of no further use
                for other in [k for k in self._kept if k[0] == visibility and key[1].startswith(k[1])]:
                    self.bytes -= _bytes(self._kept.pop(other))
            self._kept[key] = cache.save(row, len(prompt))
            self.bytes += size
            while self.bytes > self.room:
                self.bytes -= _bytes(self._kept.popitem(last=False)[1])


@dataclass(frozen=True)
class Kept:
    """What later requests need not compute again."""

    images: EncodedImages
    prompts: ComputedPrompts

    @staticmethod
    def of(image_room: int, prompt_room: int) -> Kept:
        """Of so many bytes."""
        return Kept(EncodedImages(image_room), ComputedPrompts(prompt_room))


def contents_of(batch: Batch, rows_per_tile: int) -> list[np.ndarray]:
    """What stands in each place of each row of a batch on the CPU, padding left out: [n, C] int64.

    Args:
        rows_per_tile: of its pictures' features.
    """
    slots, ids = batch.image_slots, batch.input_ids
    starts, digests = _pictures(batch, rows_per_tile)
    shown = torch.bucketize(slots.clamp(min=0), starts, right=True) - 1
    columns = [
        torch.where(slots == TEXT, ids, 0),
        torch.where(slots >= 0, slots - starts[shown], slots),
        *torch.where((slots >= 0)[..., None], digests[shown], 0).unbind(-1),
        batch.documents,
        *(batch.positions if batch.positions.ndim == 3 else batch.positions.expand(4, -1, -1)),
    ]
    contents = torch.stack(columns, -1).numpy()
    lengths = (batch.documents != PADDING).sum(1).tolist()
    return [row[:n] for row, n in zip(contents, lengths, strict=True)]


def _pictures(batch: Batch, rows_per_tile: int) -> tuple[Tensor, Tensor]:
    """The pictures' parts whose features depend on no other part: a tile, the tiles of a map that is resized, or a
    picture of native size. The first feature row of each, and 128 bits by which it is known, [parts, 2] int64."""
    if batch.pixel_values is None:
        return torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    tiles = len(batch.pixel_values)
    sizes, how = [1] * tiles, [torch.zeros(0, dtype=torch.int64)] * tiles
    if batch.image_grids is not None:
        sizes, how = batch.image_grids.prod(1).tolist(), list(batch.image_grids)
    for numbers in reversed([] if batch.image_resizes is None else list(batch.image_resizes)):
        resize = Resize(*numbers.tolist())
        part = slice(resize.tile, resize.tile + resize.down * resize.across)
        sizes[part], how[part] = [resize.down * resize.across], [numbers[1:]]
    known = [fingerprint(*given) for given in zip(batch.pixel_values.split(sizes), how, strict=True)]
    halves = [[int.from_bytes(bytes.fromhex(key[i : i + 16]), "big", signed=True) for i in (0, 16)] for key in known]
    return (torch.tensor([0, *sizes[:-1]]).cumsum(0) * rows_per_tile), torch.tensor(halves)


def _usable(visibility: str, known: np.ndarray, prompt: np.ndarray) -> int:
    """How many of the first rows of a prompt are as in the `known` one, both with what they see."""
    both = min(len(known), len(prompt))
    differs = (known[:both] != prompt[:both]).any(1)
    common = int(differs.argmax()) if differs.any() else both
    if visibility not in WHOLE:
        multiple = check_layout(visibility) or 1
        return common // multiple * multiple
    if common == len(known) == len(prompt):
        return common
    shared = [int((rows[:, 4] == PREFIX).sum()) for rows in (known, prompt)]
    return shared[0] if shared[0] == shared[1] <= common else 0


def _version(model: Any) -> Any:
    """What keys and values depend on besides the rows; None where they are not to be kept."""
    weights = weights_of(model)
    if weights is None or is_timed(model):
        return None
    return weights, torch.is_autocast_enabled(torch.device(model.device).type)


def is_timed(model: Any) -> bool:
    """Whether the model is told the time, on which every row depends then."""
    return bool((getattr(model.config, "backbone", None) or {}).get("time_conditioning"))


def _bytes(saved: Saved) -> int:
    return sum(value.nbytes for value in saved.values())
