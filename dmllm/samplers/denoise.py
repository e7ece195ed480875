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

from dmllm.samplers.canvas import Canvas, ends_at, reply_length
from dmllm.samplers.config import REMASKING, DecodeConfig
from dmllm.samplers.rules import choose, estimate
from dmllm.samplers.schedules import CURVES, commit_counts
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
    whole = part = canvas
    finished = _finished(whole, config)
    if bool(finished.all()):
        yield Step(ids=whole.ids, committed=whole.committed, num_forwards=whole.forwards, finished=finished)
    while True:
        alive = (~_finished(part, config)).nonzero().squeeze(1)
        if not len(alive):
            return
        if len(alive) < len(part):
            part = part.take(alive)
            draws = [draws[i] for i in alive.tolist()]
        part = advance(predict, part, config, draws)
        whole = whole.put(part)
        finished = _finished(whole, config)
        yield Step(ids=whole.ids, committed=whole.committed, num_forwards=whole.forwards, finished=finished)


def advance(predict: Predict, canvas: Canvas, config: DecodeConfig, draws: list[Generator]) -> Canvas:
    """One model call, what it commits of each row's first unfilled block, and what it edits there."""
    length = canvas.block_length or config.block_of(canvas.ids.shape[1])
    canvas = _enter_block(canvas, length)
    canvas = replace(canvas, time=_noise_level(canvas, config, length))
    rows, asked, slots, left = _open_rows(
        canvas, config, length, compact=canvas.ids.device.type == "cpu" and config.editing_threshold is None
    )
    canvas, full = replace(canvas, opened=torch.where(canvas.calls == 0, left, canvas.opened)), (left == 0)[:, None]
    if not config.fill_behind_eos:
        asked = asked & (rows < _first_end(canvas, config)[:, None])
        left = asked.sum(1)
    uniform = _draw(config, draws, length, slots)
    seen = estimate(predict(canvas, rows), canvas.mask_id, config, uniform[0])
    doubt = REMASKING.load(config.remasking)(seen, uniform[1])
    if config.distrust_ids:
        last = torch.isin(seen.tokens, torch.tensor(config.distrust_ids, device=rows.device))
        doubt = doubt.masked_fill(last, torch.finfo(doubt.dtype).max)
    sure = None if config.threshold is None else seen.against <= 1 - config.threshold
    chosen = choose(doubt, sure, asked, quota(canvas, config, asked, left, uniform[1], length))
    tokens = seen.tokens
    if config.prompt_first:
        chosen = chosen | asked & full
        tokens = torch.where(full, seen.top, tokens) if config.draws_tokens else tokens
    if config.choose_mask:
        over = canvas.calls + 1 >= config.steps_per_block(canvas.ids.shape[1])
        chosen = chosen & (tokens != canvas.mask_id)
        tokens = tokens.masked_fill(~chosen, canvas.mask_id)
        chosen = chosen | asked & over[:, None]
    filled = canvas.commit(rows, tokens, chosen)
    edited = torch.zeros_like(asked)
    if config.editing_threshold is not None:
        inside = rows == canvas.block[:, None] * length - canvas.offset[:, None] + slots  # the others are padding
        known = inside & ~asked & canvas.editable.gather(1, rows)
        better = (seen.tokens != canvas.ids.gather(1, rows)) & (seen.against < 1 - config.editing_threshold)
        edited = known & better
        filled = filled.commit(rows, seen.tokens, edited, edit=True)
    again = torch.where(edited.any(1), canvas.post - 1, 0)  # a full block is left once nothing changes
    post = torch.where((asked & ~full).any(1), config.post_steps, again)
    if config.schedule == "time":  # a block lasts until its last time, even where chance has filled it before
        lasts = config.steps_per_block(canvas.ids.shape[1]) - 1 - canvas.calls
        post = torch.where(canvas.block < 0, post, post.maximum(lasts))
    return replace(filled, calls=canvas.calls + 1, post=post, forwards=canvas.forwards + 1)


def quota(canvas: Canvas, config: DecodeConfig, asked: Tensor, left: Tensor, uniform: Tensor, length: int) -> Tensor:
    """How many of the `asked` [B, K] positions a call commits at least, [B] (see `DecodeConfig.schedule`).

    Of a block `left` [B] positions are open; a call on a sub-block asks for fewer.
    Shared evenly, no call is left with more than its share (the first take the remainder) and the last fills the block.
    """
    open_rows, steps, calls = left, config.steps_per_block(canvas.ids.shape[1]), canvas.calls
    if config.num_to_transfer is not None:
        return torch.full_like(open_rows, config.num_to_transfer)
    if config.schedule in CURVES:
        rows = zip(canvas.opened.tolist(), calls.tolist(), strict=True)
        counts = [(commit_counts(config.schedule, config.shift, n, steps)[c:] or (length,))[0] for n, c in rows]
        return torch.tensor(counts, device=asked.device)
    if config.schedule == "fixed":
        return length // steps + (calls < length % steps).long()
    if config.schedule == "time":
        times = _times(config, steps).to(asked.device)
        share = 1 - times[(calls + 1).clamp(max=steps)] / times[calls.clamp(max=steps - 1)]
        if config.remasking == "origin":  # as many as fall below their share, and `choose` takes the lowest
            some = (asked & (uniform < share[:, None])).sum(1)
        else:
            some = (open_rows * share).long()
        return torch.where(calls < steps - 1, some, open_rows)
    if config.choose_mask or not config.fill_behind_eos:  # some places are never filled
        return canvas.opened // steps + (calls < canvas.opened % steps).long()
    return -(-open_rows // (steps - calls).clamp(min=1))


def _first_end(canvas: Canvas, config: DecodeConfig) -> Tensor:
    """The place of each row's first known end of sequence, [B]; the canvas's length where there is none."""
    ends = ends_at(canvas.ids, canvas.committed, config.stops)
    return torch.where(ends.any(1), ends.long().argmax(1), canvas.ids.shape[1])


def _finished(canvas: Canvas, config: DecodeConfig) -> Tensor:
    """[B] bool: all is known, or all up to and including an end of sequence; and the block needs no further call."""
    length, stopped = reply_length(canvas.ids, canvas.committed, config.stops)
    left = canvas.post > 0
    if config.eos_early_stop and config.editing_threshold is None:
        return stopped | (length == canvas.ids.shape[1]) & ~left
    block_length = canvas.block_length or config.block_of(canvas.ids.shape[1])
    return ~left & (stopped & (_first_block(canvas, block_length) > canvas.block) | canvas.committed.all(1))


def _enter_block(canvas: Canvas, block_length: int) -> Canvas:
    """Each row at the block of its first unknown token, its calls counted from there; or still at a full one."""
    block = torch.where(canvas.post > 0, canvas.block, _first_block(canvas, block_length))
    return replace(canvas, block=block, calls=torch.where(block == canvas.block, canvas.calls, 0))


def _noise_level(canvas: Canvas, config: DecodeConfig, block_length: int) -> Tensor:
    """The time t of a call, [B]: where `schedule: time` has come to, or how much of the canvas (of whole blocks, of the
    active one) is unknown."""
    unknown = ~canvas.committed
    if config.schedule == "time":
        steps = config.steps_per_block(unknown.shape[1])
        return _times(config, steps).to(unknown.device)[canvas.calls.clamp(max=steps - 1)]
    if canvas.block_length is None:
        return unknown.float().mean(1)
    places = torch.arange(unknown.shape[1], device=unknown.device) + canvas.offset[:, None]
    return (unknown & (places // block_length == canvas.block[:, None])).sum(1) / block_length


def _times(config: DecodeConfig, steps: int) -> Tensor:
    """The times between which the calls on a block lie, [steps + 1]."""
    return torch.linspace(1, config.eps, steps + 1)


def _first_block(canvas: Canvas, block_length: int) -> Tensor:
    """The block of each row's first unknown token, [B]."""
    return (canvas.committed.long().argmin(1) + canvas.offset) // block_length


def _open_rows(
    canvas: Canvas, config: DecodeConfig, block_length: int, *, compact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The positions to ask for, [B, K]; which of them are unknown (the others are padding); their places in the block;
    and how many of the block are unknown, [B].

    K is the whole sub-block, so that shapes stay the same from call to call; `compact` leaves the known ones out.
    """
    slots = torch.arange(block_length, device=canvas.ids.device).expand(len(canvas), -1)
    first = (canvas.block * block_length - canvas.offset)[:, None]
    rows, asked = _unknown(canvas, first + slots)
    left = asked.sum(1)
    if config.prompt_first:  # of a full block, the place behind it
        full = (left == 0)[:, None]
        rows, asked = _unknown(canvas, first + block_length * full + slots)
        asked = asked & (~full | (slots == 0))
    sub_length = config.sub_block_length or block_length
    if sub_length < block_length:
        first = asked.long().argmax(1, keepdim=True) // sub_length * sub_length
        slots = first.clamp(max=block_length - sub_length) + slots[:, :sub_length]
        rows, asked = rows.gather(1, slots), asked.gather(1, slots) & (slots >= first)
    if compact:
        order = (~asked).long().argsort(dim=1, stable=True)[:, : int(asked.sum(1).max())]
        rows, asked, slots = rows.gather(1, order), asked.gather(1, order), slots.gather(1, order)
    return rows, asked, slots, left


def _unknown(canvas: Canvas, places: Tensor) -> tuple[Tensor, Tensor]:
    """The canvas positions nearest to `places` [B, K], and which of these are on the canvas and unknown."""
    rows = places.clamp(0, canvas.ids.shape[1] - 1)
    return rows, (rows == places) & ~canvas.committed.gather(1, rows)


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
