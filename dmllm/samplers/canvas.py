"""The state that the denoising loop carries: some tokens of each row are known, the rest are to be found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.samplers.estimate import Heard

PER_ROW = (
    "ids",
    "committed",
    "editable",
    "requests",
    "offset",
    "block",
    "opened",
    "calls",
    "post",
    "forwards",
    "time",
    "stable",
    "accepted",
    "confidence",
    "extent",
    "closed",
    "owed",
    "latents",
    "order",
)


@dataclass(frozen=True)
class Drafts:
    """What may come next in each row, until a call has said so."""

    tokens: Tensor  # [B, S] int64
    masses: Tensor | None = None  # [B, S, V], what they were drawn from; None where nothing is drawn

    def take(self, rows: Tensor) -> Drafts:
        """Some rows of the batch, `rows` [B'] int64."""
        return Drafts(self.tokens[rows], None if self.masses is None else self.masses[rows])


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """B answers of N tokens. What is known is what `committed` says; a mask token in `ids` says nothing."""

    ids: Tensor  # [B, N] int64, the mask token where not committed
    committed: Tensor  # [B, N] bool
    editable: Tensor  # [B, N] bool: what was not given, which editing may replace
    requests: Tensor  # [B] int64: which row of the first canvas this is, as finished rows leave
    offset: Tensor  # [B] int64: places of the first block that lie before the canvas
    block: Tensor  # [B] int64: the block being filled, -1 before the first
    opened: Tensor  # [B] int64: how many of its tokens were unknown when it was entered
    calls: Tensor  # [B] int64: model calls spent on it
    post: Tensor  # [B] int64: calls that it may still have now that it is full
    forwards: Tensor  # [B] int64: model calls spent on the row
    time: Tensor  # [B] float32: its noise level, 1 where nothing is known and 0 where all is
    stable: Tensor  # [B, N] int64: for how many calls up to now a token's prediction has hardly changed
    accepted: Tensor  # [B] int64: how many tokens the last call committed
    confidence: Tensor  # [B, N] float32: how probable a token was when it was committed, where a rule asks for it
    mask_id: int
    heard: Heard | None = None  # the last call's logits, where a rule compares with them
    drafts: Drafts | None = None  # what the last call expects next, where that is tried
    extent: Tensor | None = None  # [B] int64: how many of the N places there are, on a canvas that grows
    closed: Tensor | None = None  # [B, N + 1] bool: gaps where nothing is inserted, before each place and at the end
    owed: Tensor | None = None  # [B, 2] float64: what rounding has left over of masks to be inserted, and to be filled
    latents: Tensor | None = None  # [B, N, F]: what stands in place of tokens that are not known, for `space` to enter
    space: Any = None  # where tokens are vectors: the model's head for them (`models.latent.Latent`)
    order: Tensor | None = None  # [B, N] int64: when the turn of each place is, of a canvas with an order
    parts: tuple[Canvas, ...] = ()  # of a canvas of several modalities, or of one that is not the whole of it
    block_length: int | None = None  # of a canvas that is made of whole blocks; None is the configuration's

    @staticmethod
    def of(ids: Tensor, committed: Tensor, mask_id: int) -> Canvas:
        """A canvas on which `ids` [B, N] are known where `committed` [B, N]."""
        rows = torch.arange(ids.shape[0], device=ids.device)
        none = torch.zeros_like(rows)
        return Canvas(
            ids=ids.masked_fill(~committed, mask_id),
            committed=committed,
            editable=~committed,
            requests=rows,
            offset=none,
            block=torch.full_like(rows, -1),
            opened=none,
            calls=none,
            post=none,
            forwards=none,
            time=(~committed).float().mean(1),
            stable=torch.zeros_like(ids),
            accepted=none,
            confidence=torch.zeros(ids.shape, device=ids.device),
            mask_id=mask_id,
        )

    @staticmethod
    def blank(batch: int, length: int, mask_id: int, device: torch.device | str = "cpu") -> Canvas:
        """A canvas on which nothing is known."""
        ids = torch.full((batch, length), mask_id, dtype=torch.int64, device=device)
        return Canvas.of(ids, torch.zeros_like(ids, dtype=torch.bool), mask_id)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def _per_row(self) -> list[str]:
        """What of PER_ROW this canvas has."""
        return [name for name in PER_ROW if getattr(self, name) is not None]

    def take(self, rows: Tensor) -> Canvas:
        """Some rows of the batch, `rows` [B'] int64."""
        heard, drafts = (None if own is None else own.take(rows) for own in (self.heard, self.drafts))
        parts = tuple(part.take(rows) for part in self.parts)
        own = {name: getattr(self, name)[rows] for name in self._per_row}
        return replace(self, heard=heard, drafts=drafts, parts=parts, **own)

    def keep(self, rows: Tensor, before: Canvas) -> Canvas:
        """This canvas, but the rows `rows` [B] bool as they were `before`, of the same requests."""

        def choose(name: str) -> Tensor:
            new, old = getattr(self, name), getattr(before, name)
            return torch.where(rows.view(-1, *(1 for _ in new.shape[1:])), old, new)

        parts = tuple(now.keep(rows, then) for now, then in zip(self.parts, before.parts, strict=True))
        return replace(self, parts=parts, **{name: choose(name) for name in self._per_row if name != "requests"})

    def put(self, part: Canvas) -> Canvas:
        """This first canvas with the rows of `part` in their places: the inverse of `take`."""
        if part.requests is self.requests:
            return part
        there = part.requests
        parts = tuple(mine.put(own) for mine, own in zip(self.parts, part.parts, strict=True))
        own = {n: getattr(self, n).index_copy(0, there, getattr(part, n)) for n in self._per_row}
        return replace(self, parts=parts, **own)

    def commit(self, rows: Tensor, tokens: Tensor, chosen: Tensor, *, edit: bool = False) -> Canvas:
        """Write `tokens` [B, K] at positions `rows` [B, K] where `chosen` [B, K].

        What is committed stays as it is, or with `edit` what was given. A position may stand several times in `rows`
        (as padding), but is chosen at most once.
        """
        found = torch.zeros_like(self.ids).scatter_add_(1, rows, tokens * chosen)
        fresh = torch.zeros_like(self.ids).scatter_add_(1, rows, chosen.long()).bool()
        fresh = fresh & (self.editable if edit else ~self.committed)
        return replace(self, ids=torch.where(fresh, found, self.ids), committed=self.committed | fresh)

    def reopen(self, which: Tensor) -> Canvas:
        """The tokens `which` [B, N] unknown again, but for what was given."""
        which = which & self.editable
        return replace(self, ids=self.ids.masked_fill(which, self.mask_id), committed=self.committed & ~which)


Stops = tuple[int | tuple[int, ...], ...]
"""What ends a reply: tokens, and runs of tokens."""


def reply_length(ids: Tensor, committed: Tensor, stops: Stops) -> tuple[Tensor, Tensor]:
    """How long each answer is, [B] int64, and whether a stop token ended it, [B] bool.

    An answer is what is known in order, up to the first of `stops`, which is not part of it.
    """
    ends = ends_at(ids, committed, stops)
    length = (committed & ~ends).cumprod(1).sum(1)
    ended = ends.gather(1, length.clamp(max=ids.shape[1] - 1)[:, None]).squeeze(1)
    return length, ended & (length < ids.shape[1])


def ends_at(ids: Tensor, committed: Tensor, stops: Stops) -> Tensor:
    """[B, N] bool: where one of `stops` begins, all of it known."""
    ends = torch.zeros_like(committed)
    for stop in stops:
        run = (stop,) if isinstance(stop, int) else stop
        count = ids.shape[1] - len(run) + 1  # places where it may begin
        if count > 0:
            found = [committed[:, i : i + count] & (ids[:, i : i + count] == token) for i, token in enumerate(run)]
            ends = ends | F.pad(torch.stack(found).all(0), (0, len(run) - 1))
    return ends
