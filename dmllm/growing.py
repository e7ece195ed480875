"""Texts with holes of any length, [MASK:*], filled by models that insert tokens (`samplers.insertion`).

A hole begins empty and only its own gap grows, so that all that is fixed stays; a hole of a given length keeps it. All
texts share one canvas with room for what may be inserted. Where a hole brings the space before it, its first token is a
word that has one.

Shapes: B texts, N places of the canvas.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from dmllm.data.holes import Gapped, Laid
from dmllm.data.tokens import ANY, WORD
from dmllm.predictor import prepare
from dmllm.samplers import process_of
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.types import Batch

Grown = tuple[Laid, list[int], int]
"""A text with holes of the lengths that they have come to, its ids, and how many calls it took."""


def grow(
    pipeline: Any,
    prompts: Batch,
    gaps: list[Gapped],
    config: DecodeConfig,
    draws: list[Generator],
    use_cache: bool | None,
) -> list[Grown]:
    """Each text filled; all have as many fixed tokens, so that each has the room that it would have alone.

    Args:
        prompts: what each is the answer to, one row a text.
        config: of which `max_new_tokens` is the room in a text's growing holes, and `steps` as many if not said.

    Raises:
        ValueError: a hole has a range of lengths, or touches another; or a text without a prompt begins with one.
    """
    for own in gaps:
        if own.choices > 1:
            raise ValueError("A model that inserts tokens finds lengths itself: say [MASK:*] in place of a range.")
        if not all(own.parts[1:-1]):
            raise ValueError("Two holes without anything between are one: leave one of them out.")
    laid = [own.lay([hole.least for hole in own.holes]) for own in gaps]
    room = config.max_new_tokens
    size = len(laid[0].ids) + room
    config = replace(config, max_new_tokens=size, steps=config.steps or max(room, 2), eos_token_id=[])
    mask_id, device = pipeline.special.mask, pipeline.model.device
    draft = torch.full((len(gaps), size), mask_id)
    closed = torch.ones(len(gaps), size + 1, dtype=torch.bool)
    for row, (own, one) in enumerate(zip(gaps, laid, strict=True)):
        draft[row, : len(one.ids)] = torch.tensor(one.ids, dtype=torch.int64)
        for hole, start in zip(own.holes, one.cuts[::2], strict=False):
            closed[row, start] = not hole.grows
    predict, canvas, config = prepare(pipeline.model, prompts, config, mask_id, use_cache, draft, kept=pipeline.kept)
    canvas = replace(canvas, extent=torch.full((len(gaps),), size - room, device=device), closed=closed.to(device))
    within = _Within(predict, pipeline.processor.tokens.kinds.to(device), gaps, mask_id)
    *_, last = denoise(within, canvas, config, draws, process=process_of(pipeline.model))  # type: ignore[arg-type]
    ids, found = last.ids.tolist(), []
    for row, (own, calls) in enumerate(zip(gaps, last.num_forwards.tolist(), strict=True)):
        lengths = [within.length(row, own, k) if hole.grows else hole.least for k, hole in enumerate(own.holes)]
        one = own.lay(lengths)
        found.append((one, ids[row][: len(one.ids)], calls))
    return found


class _Within:
    """A model of which only such tokens may be chosen as can stand in a hole; it remembers the canvas.

    A hole is known by how many fixed tokens stand in front of it.
    """

    def __init__(self, predict: Any, table: Tensor, gaps: list[Gapped], mask_id: int):
        self.predict, self.table, self.mask_id = predict, table, mask_id
        self.first = torch.full((len(gaps), 1 + max(map(places, gaps))), ANY)  # kinds, by fixed tokens in front
        for row, own in enumerate(gaps):
            for number, hole in enumerate(own.holes):
                if hole.spaced:
                    self.first[row, before_hole(own, number)] = WORD
        self.first = self.first.to(table.device)

    def with_head(self, canvas: Canvas, rows: Tensor, name: str, others: Tensor) -> tuple[Tensor, Tensor]:
        """As `WholePredictor.with_head`."""
        self._last = canvas
        logits, said = self.predict.with_head(canvas, rows, name, others)
        fixed = (~canvas.editable).long()
        begins = canvas.editable & (torch.cat([fixed.new_ones(len(fixed), 1), fixed[:, :-1]], 1) == 1)
        front = fixed.cumsum(1).clamp(max=self.first.shape[1] - 1)
        kinds = torch.where(begins, self.first[canvas.requests].gather(1, front), ANY).gather(1, rows)
        allowed = self.table.new_zeros(len(self.table), logits.shape[-1])
        allowed[:, : self.table.shape[1]] = self.table[:, : logits.shape[-1]]
        allowed[:, self.mask_id] = True
        return logits.masked_fill(~allowed[kinds], -math.inf), said

    def length(self, row: int, own: Gapped, number: int) -> int:
        """How many tokens the hole `number` of a text has come to hold."""
        canvas = self._last
        here = int((canvas.requests == row).long().argmax())
        assert canvas.extent is not None
        inserted = canvas.editable[here, : int(canvas.extent[here])]
        return int((inserted & ((~inserted).cumsum(0) == before_hole(own, number))).sum())


def places(own: Gapped) -> int:
    """How many places a text has before its holes grow."""
    return len(own.before) + sum(map(len, own.parts)) + len(own.end) + sum(hole.least for hole in own.holes)


def before_hole(own: Gapped, number: int) -> int:
    """How many of them stand in front of a hole."""
    return len(own.before) + sum(map(len, own.parts[: number + 1]))
