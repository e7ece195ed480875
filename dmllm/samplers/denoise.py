"""The denoising loop: model -> logits where something is unknown -> a rule commits some tokens -> yield the canvas.

Every row of the batch walks its own blocks and steps and draws from its own generator, so it gets the tokens that it
would get alone, whatever the other rows are. Streaming, step pictures and saved trajectories are this loop's yields.

Shapes: B rows of the batch, N tokens of the canvas, K positions asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import REMASKING, DecodeConfig
from dmllm.samplers.rules import choose, estimate
from dmllm.types import Step

Predict = Callable[[Canvas, Tensor], Tensor]
"""(canvas, rows [B, K] int64) -> logits [B, K, V] at those positions; `canvas.requests` says whose rows they are."""


def denoise(predict: Predict, canvas: Canvas, config: DecodeConfig, draws: list[Generator]) -> Iterator[Step]:
    """Fill the canvas; one `Step` after each model call, or a single one where nothing is unknown.

    Rows that are finished (all known, or known in order up to an end of sequence) take no part in later calls.

    Args:
        predict: the model, already given its prompts.
        canvas: `Canvas.of` or `Canvas.blank`; what is known stays as it is, and the canvas itself is not changed.
        config: how; its `max_new_tokens` plays no part, the canvas has its length.
        draws: one generator for each row of the canvas.
    """
    assert len(draws) == len(canvas), (len(draws), len(canvas))
    forwards = torch.zeros_like(canvas.requests)
    whole = part = canvas
    finished = whole.finished(config.stop_ids)
    if bool(finished.all()):
        yield Step(ids=whole.ids, committed=whole.committed, num_forwards=forwards, finished=finished)
    while True:
        alive = (~part.finished(config.stop_ids)).nonzero().squeeze(1)
        if not len(alive):
            return
        if len(alive) < len(part):
            part = part.take(alive)
            draws = [draws[i] for i in alive.tolist()]
        part = advance(predict, part, config, draws)
        whole = whole.put(part)
        forwards = forwards.index_add(0, part.requests, torch.ones_like(part.requests))
        finished = whole.finished(config.stop_ids)
        yield Step(ids=whole.ids, committed=whole.committed, num_forwards=forwards, finished=finished)


def advance(predict: Predict, canvas: Canvas, config: DecodeConfig, draws: list[Generator]) -> Canvas:
    """One model call and what it commits: in each row at least one token of its first unfilled block.

    The quota is what remains of the block, spread evenly over the calls that remain for it (the first calls take the
    remainder), so that no call is left with more than its share and the last one always fills the block.
    """
    length = canvas.ids.shape[1]
    canvas = _enter_block(canvas, config.block_of(length))
    rows, asked, slots = _open_rows(canvas, config.block_of(length), compact=canvas.ids.device.type == "cpu")
    uniform = _draw(config, draws, config.block_of(length), slots)
    seen = estimate(predict(canvas, rows), canvas.mask_id, config, uniform[0])
    doubt = REMASKING.load(config.remasking)(seen, uniform[1])
    sure = None if config.threshold is None else seen.against <= 1 - config.threshold
    left = config.steps_per_block(length) - canvas.calls
    quota = -(-asked.sum(1) // left)
    chosen = choose(doubt, sure, asked, quota)
    return replace(canvas.commit(rows, seen.tokens, chosen), calls=canvas.calls + 1)


def _enter_block(canvas: Canvas, block_length: int) -> Canvas:
    """Each row at the block of its first unknown token, its calls counted from there."""
    block = canvas.committed.long().argmin(1) // block_length
    return replace(canvas, block=block, calls=torch.where(block == canvas.block, canvas.calls, 0))


def _open_rows(canvas: Canvas, block_length: int, *, compact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The positions to ask for, [B, K]; which of them are unknown (the others are padding); their places in the block.

    K is the whole block, so that shapes stay the same from call to call; `compact` leaves the known ones out.
    """
    slots = torch.arange(block_length, device=canvas.ids.device).expand(len(canvas), -1)
    rows = canvas.block[:, None] * block_length + slots
    asked = rows < canvas.ids.shape[1]
    rows = rows.clamp(max=canvas.ids.shape[1] - 1)
    asked = asked & ~canvas.committed.gather(1, rows)
    if not compact:
        return rows, asked, slots
    slots = (~asked).long().argsort(dim=1, stable=True)[:, : int(asked.sum(1).max())]
    return rows.gather(1, slots), asked.gather(1, slots), slots


def _draw(config: DecodeConfig, draws: list[Generator], block_length: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform numbers at `slots` [B, K] for the tokens and for the order, float64 in [0, 1).

    A row draws one number for each place of a block from its own generator, known or not: what it draws depends on
    nothing but the number of its calls. Nothing is drawn for what is not random.
    """

    def numbers(wanted: bool) -> Tensor:
        if not wanted:
            return torch.zeros(slots.shape, dtype=torch.float64, device=slots.device)
        drawn = [torch.rand(block_length, generator=g, dtype=torch.float64, device=g.device) for g in draws]
        return torch.stack(drawn).to(slots.device).gather(1, slots)

    return numbers(config.draws_tokens), numbers(config.draws_order)
