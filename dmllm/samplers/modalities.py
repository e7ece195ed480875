"""A canvas of several modalities: text and the codes of pictures, each filled by its own rules, all by the same calls.

A part is a set of places and the ids that may stand there. It is a canvas of its own, over its own ids alone: these are
counted from the first of them, and its mask is one behind the last where the model's is none of them. So every rule of
decoding is a rule for pictures too, and a step reads no other rows of the vocabulary (Chang et al., MaskGIT,
arXiv:2202.04200; Xin et al., Lumina-DiMOO, arXiv:2510.06308, draw from the codes alone, too).

Shapes: B rows of the batch, N places of the whole canvas, S of a part, K positions asked for, C ids of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Generator, Tensor

from dmllm.nn.cache import KVCache
from dmllm.samplers.absorbing import ABSORBING
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.process import Process
from dmllm.samplers.stream import Stream, ask, is_static

NEVER = -1e4  # the logit of what cannot stand in a place
Words = tuple[int, int]
Asked = tuple[tuple[Tensor, Words], ...]
"""Positions [B, K] of the whole canvas, and which ids may stand there: the first, and the one behind the last."""

Within = Callable[[Canvas, Asked], tuple[Tensor, ...]]
"""(canvas, asked) -> logits [B, K, C] of each."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One modality of a canvas."""

    slots: Tensor  # [S] int64, ascending: its places
    words: Words  # what may stand there
    config: DecodeConfig  # how it is filled
    allowed: Tensor | None = None  # [S, C] bool: which of these each place takes; None is all
    order: Tensor | None = None  # [S] int64: when the turn of each place is, where that is fixed

    def mask(self, mask_id: int) -> int:
        """What stands for the unknown among this part's ids."""
        first, end = self.words
        return mask_id - first if first <= mask_id < end else end - first

    def of(self, whole: Canvas) -> Canvas:
        """The canvas of this part alone."""
        committed = whole.committed[:, self.slots]
        ids = (whole.ids[:, self.slots] - self.words[0]).masked_fill(~committed, 0)
        own = Canvas.of(ids, committed, self.mask(whole.mask_id))
        order = None if self.order is None else self.order.to(ids.device).expand(len(ids), -1)
        return replace(own, requests=whole.requests, editable=whole.editable[:, self.slots], order=order)

    def put(self, whole: Canvas, own: Canvas) -> Canvas:
        """The whole canvas with what this part has become."""
        ids = torch.where(own.committed, own.ids + self.words[0], whole.mask_id)
        return replace(
            whole,
            ids=whole.ids.index_copy(1, self.slots, ids),
            committed=whole.committed.index_copy(1, self.slots, own.committed),
        )


def process(parts: Sequence[Part]) -> Process:
    """How a canvas with these parts is filled; its `predict` is a `Within`, and what is in no part is given.

    With several parts each draws from generators of its own, made from its row's, so that one that is full changes
    nothing about the others.
    """
    own: dict[int, list[Generator]] = {}

    def begin(canvas: Canvas, config: Any, draws: list[Generator]) -> Canvas:
        if len(parts) > 1:
            for g in {id(g): g for g in draws}.values():
                seeds = torch.randint(2**62, (len(parts),), generator=g, device=g.device).tolist()
                own[id(g)] = [Generator(g.device).manual_seed(seed) for seed in seeds]
        return replace(canvas, parts=tuple(part.of(canvas) for part in parts))

    def advance(predict: Any, canvas: Canvas, config: Any, draws: list[Generator], constraint: Any = None) -> Canvas:
        said, found, whole = _Said(predict, canvas, parts), [], canvas
        for number, (part, before) in enumerate(zip(parts, canvas.parts, strict=True)):
            over = ABSORBING.finished(before, part.config)
            if not is_static(over.device) and bool(over.all()):
                found.append(before)
                continue
            mine = draws if len(parts) == 1 else [own[id(g)][number] for g in draws]
            now = ABSORBING.advance(partial(said, number), before, part.config, mine, None).keep(over, before)
            whole = part.put(whole, now)
            found.append(now)
        calls = torch.stack([now.forwards - then.forwards for now, then in zip(found, canvas.parts, strict=True)])
        return replace(whole, parts=tuple(found), forwards=canvas.forwards + calls.amax(0))

    def finished(canvas: Canvas, config: Any) -> Tensor:
        full = [ABSORBING.finished(own, part.config) for part, own in zip(parts, canvas.parts, strict=True)]
        return torch.stack(full).all(0)

    return Process(advance, finished, begin, masks=True)


class _Said:
    """What the model says in one call, asked for by the parts in turn: of a single one where it asks, of several
    everywhere at once."""

    def __init__(self, predict: Within, canvas: Canvas, parts: Sequence[Part]):
        self.predict, self.canvas, self.parts = predict, canvas, parts
        self._all: tuple[Tensor, ...] | None = None

    def __call__(self, number: int, own: Canvas, rows: Tensor) -> Tensor:
        part, canvas = self.parts[number], self.canvas
        said = self._of(part, canvas, number, own, rows)
        if part.allowed is None:
            return said
        allowed = part.allowed.to(said.device)[rows]
        mask = part.mask(canvas.mask_id)
        if mask < said.shape[-1]:  # what it says of that is for the rules to judge
            allowed[..., mask] = True
        return said.masked_fill(~allowed, NEVER)

    def _of(self, part: Part, canvas: Canvas, number: int, own: Canvas, rows: Tensor) -> Tensor:
        if len(self.parts) == 1 or own.ids is not canvas.parts[number].ids:
            whole = replace(part.put(canvas, own), time=own.time)
            return self.predict(whole, ((part.slots[rows], part.words),))[0]
        if self._all is None:
            places = torch.cat([part.slots for part in self.parts])
            time = (~canvas.committed[:, places]).float().mean(1)
            asked = tuple((part.slots.expand(len(canvas), -1), part.words) for part in self.parts)
            self._all = self.predict(replace(canvas, time=time), asked)
        said = self._all[number]
        return said.gather(1, rows[..., None].expand(-1, -1, said.shape[-1]))


class PartPredictor:
    """`predictor(canvas, asked)`, a `Within`, for prompts with and without what guides.

    Args:
        stream: the requests, with their prompts; then, for each of `scales`, with what their prompts are without it.
        scales: s of c + sum s (c - u), of what the first prompt says and what the others do; none is no guidance.
        interval: the shares of `calls` between which there is guidance (Kynkaanniemi et al., arXiv:2404.07724);
            before and behind only the first prompts are computed.
        calls: how many there will be.
    """

    def __init__(
        self, stream: Stream, scales: Sequence[float] = (), interval: tuple[float, float] = (0.0, 1.0), calls: int = 1
    ):
        assert stream.copies == 1 + len(scales), "one prompt for each scale"
        self.stream, self.scales, self.interval, self.calls = stream, tuple(scales), interval, calls
        self._made = 0
        if stream.cache is not None:
            stream.store()

    @torch.no_grad()
    def __call__(self, canvas: Canvas, asked: Asked) -> tuple[Tensor, ...]:
        """Logits [B, K, C] of each of the parts of the canvas that are asked for."""
        stream, cached = self.stream, self.stream.cache is not None
        stream.follow(canvas.requests)
        low, high = self.interval
        copies = stream.copies if low <= self._made / self.calls < high else 1
        self._made += 1
        count, lengths = len(canvas) * copies, stream.lengths
        places, real = stream.run(
            lengths if cached else torch.zeros_like(lengths),
            lengths + stream.length,
            stream.length if cached else stream.given + stream.length,
        )
        some = None
        if count < len(lengths):
            some, places, real = torch.arange(count, device=lengths.device), places[:count], real[:count]
        rows = torch.cat([rows for rows, _ in asked], 1).repeat(copies, 1) + lengths[:count, None]
        call = _projecting(tuple(rows.shape[1] for rows, _ in asked), tuple(words for _, words in asked))
        ids, time = canvas.ids.repeat(copies, 1), canvas.time.repeat(copies)
        said = stream.feed(ids, places, real, rows, time, some, call)
        return tuple(self._guided(logits, copies) for logits in said)

    def _guided(self, logits: Tensor, copies: int) -> Tensor:
        if copies == 1:
            return logits
        prompted, *others = logits.float().chunk(copies)
        return prompted + sum(scale * (prompted - other) for scale, other in zip(self.scales, others, strict=True))


@lru_cache(maxsize=256)
def _projecting(counts: tuple[int, ...], words: tuple[Words, ...]) -> Callable[..., Any]:
    """As `stream.call_model`, for logits of so many of the rows asked for over the first of `words`, and so on."""

    def call(model: Any, cache: KVCache | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        return ask(model, cache, inputs, parts=tuple(zip(inputs[-2].split(counts, 1), words, strict=True))).logits

    return call
