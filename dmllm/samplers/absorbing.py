"""Denoising by filling in: what a call commits of a canvas on which masks stand for what is unknown.

Sources: LLaDA, arXiv:2502.09992, section 2.4; MDLM, arXiv:2406.07524; the rules name their own.
Shapes: B rows, N canvas tokens, K positions asked for, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from dmllm.samplers.canvas import Canvas, ends_at, reply_length
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.constraint import Constraint
from dmllm.samplers.draws import numbers, of_authors
from dmllm.samplers.estimate import Estimate, Heard, estimate
from dmllm.samplers.maskgit import doubts
from dmllm.samplers.process import Predict, Process
from dmllm.samplers.quota import most, noise_level, quota
from dmllm.samplers.revoke import masked_again, revoked, with_confidence
from dmllm.samplers.rules import accepted, choose
from dmllm.samplers.stream import is_static

BLIND = ("random", "origin", "sequential")  # rules that look at no logits


def advance(
    predict: Predict,
    canvas: Canvas,
    config: DecodeConfig,
    draws: list[Generator],
    constraint: Constraint | None = None,
) -> Canvas:
    """One model call, what it commits of each row's first unfilled block, and what it edits there."""
    length = canvas.block_length or config.block_of(canvas.ids.shape[1])
    canvas = _enter_block(canvas, length)
    rows, asked, slots, left = _open_rows(
        canvas, config, length, compact=not is_static(canvas.ids.device) and config.editing_threshold is None
    )
    canvas, full = replace(canvas, opened=torch.where(canvas.calls == 0, left, canvas.opened)), (left == 0)[:, None]
    if not config.fill_behind_eos:
        asked = asked & (rows < _first_end(canvas, config)[:, None])
        left = asked.sum(1)
    drawn = _draw(config, draws, length, canvas.ids.device)
    uniform = [numbers.gather(1, slots) for numbers in drawn]
    canvas = replace(canvas, time=noise_level(canvas, config, length, asked, uniform[1]))
    if constraint is None and _is_blind(config):
        rows, asked, slots = _in_line(canvas, config, rows, asked, slots, left, uniform[1], length)
        uniform = [numbers.gather(1, slots) for numbers in drawn]
    logits, guided = predict(canvas, rows), None
    if config.sampling != "inverse":
        uniform = of_authors(config.sampling, draws, logits, asked, slots, length, config.draws_tokens)
    if constraint is not None:
        guided = constraint(canvas, config, logits, rows, asked, uniform[0], full[:, 0])
        logits = guided.logits
    seen = estimate(logits, canvas.mask_id, config, uniform[0], canvas.heard, rows, guided and guided.tokens)
    if config.kl_threshold is not None:
        stable = torch.where(seen.change < config.kl_threshold, canvas.stable.gather(1, rows) + 1, 0)
        heard = Heard(rows, logits.clone())  # the model may write its next ones over them
        canvas = replace(canvas, stable=canvas.stable.scatter(1, rows, stable), heard=heard)
    doubtful = asked
    if guided is not None:
        doubtful = asked & ~guided.certain
        left = (left - (asked & ~doubtful).sum(1)).clamp(min=0)
    tokens, chosen = _choose(canvas, config, seen, rows, doubtful, left, full, uniform[1], length)
    if guided is not None:
        tokens, chosen = guided.settle(tokens, chosen, asked)
    filled = canvas.commit(rows, tokens, chosen)
    edited = _edits(canvas, config, seen, rows, asked, slots, length)
    if config.editing_threshold is not None:
        filled = filled.commit(rows, seen.tokens, edited, edit=True)
    if config.remdm is not None:
        filled = with_confidence(filled, rows, seen.against, chosen) if config.remdm == "conf" else filled
        filled = filled.reopen(masked_again(canvas, config, length, drawn[1]))
    fresh, forwards = chosen.sum(1), canvas.forwards + 1
    if config.revoke_threshold is not None:
        filled, forwards = filled.reopen(revoked(predict, canvas, config, length, fresh)), forwards + 1
    post = _calls_after(canvas, config, (asked & ~full).any(1), edited.any(1))
    return replace(filled, calls=canvas.calls + 1, post=post, forwards=forwards, accepted=fresh)


def _choose(
    canvas: Canvas,
    config: DecodeConfig,
    seen: Estimate,
    rows: Tensor,
    asked: Tensor,
    left: Tensor,
    full: Tensor,
    uniform: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, K] and where they are committed, [B, K] bool: the least doubtful of what is asked for."""
    steps = config.steps_per_block(canvas.ids.shape[1])
    doubt = doubts(canvas, config, seen, rows, uniform, steps)
    for token in config.distrust_ids:
        doubt = doubt.masked_fill(seen.tokens == token, torch.finfo(doubt.dtype).max)
    sure = accepted(seen, doubt, asked, config, canvas.stable.gather(1, rows), (canvas.calls + 1) / steps)
    least = quota(canvas, config, asked, left, uniform, length)
    if sure is not None and config.schedule == "carried":
        sure = choose(doubt, None, sure & asked, most(canvas, config, left))
    over = (canvas.calls + 1 >= steps)[:, None]
    if sure is not None and config.quota_if_unsure:
        least = least.masked_fill((sure & asked).any(1) & ~over[:, 0], 0)
    tokens, chosen = seen.tokens, choose(doubt, sure, asked, least)
    if config.prompt_first:
        chosen = chosen | asked & (full if canvas.block_length is not None else (canvas.calls == 0)[:, None])
        tokens = torch.where(full, seen.top, tokens) if config.draws_tokens else tokens
    if config.choose_mask:
        chosen = chosen & (tokens != canvas.mask_id)
        tokens = tokens.masked_fill(~chosen, canvas.mask_id)
        chosen = chosen | asked & over
    return tokens, chosen


def _edits(
    canvas: Canvas, config: DecodeConfig, seen: Estimate, rows: Tensor, asked: Tensor, slots: Tensor, length: int
) -> Tensor:
    """Where a known token of the active block gives way to a surer one, [B, K] bool (LLaDA2.1)."""
    if config.editing_threshold is None:
        return torch.zeros_like(asked)
    inside = rows == canvas.block[:, None] * length - canvas.offset[:, None] + slots  # the others are padding
    better = (seen.tokens != canvas.ids.gather(1, rows)) & (seen.against < 1 - config.editing_threshold)
    return inside & ~asked & canvas.editable.gather(1, rows) & better


def _calls_after(canvas: Canvas, config: DecodeConfig, filling: Tensor, editing: Tensor) -> Tensor:
    """How many calls the active block may still take though nothing in it is unknown, [B]."""
    again = torch.where(editing, canvas.post - 1, 0)  # a full block is left once nothing changes
    post = torch.where(filling, config.post_steps, again)
    if config.schedule != "time":
        return post
    lasts = config.steps_per_block(canvas.ids.shape[1]) - 1 - canvas.calls  # even where chance has filled it before
    return torch.where(canvas.block < 0, post, post.maximum(lasts))


def _first_end(canvas: Canvas, config: DecodeConfig) -> Tensor:
    """The place of each row's first known end of sequence, [B]; the canvas's length where there is none."""
    ends = ends_at(canvas.ids, canvas.committed, config.stops)
    return torch.where(ends.any(1), ends.long().argmax(1), canvas.ids.shape[1])


def finished(canvas: Canvas, config: DecodeConfig) -> Tensor:
    """[B] bool: all is known, or all up to and including an end of sequence; and the block needs no further call."""
    length, stopped = reply_length(canvas.ids, canvas.committed, config.stops)
    left = canvas.post > 0
    if config.eos_early_stop and not config.rewrites:
        return stopped | (length == canvas.ids.shape[1]) & ~left
    if not config.fill_behind_eos:  # what is behind the end stays open
        return ~left & (stopped | canvas.committed.all(1))
    block_length = canvas.block_length or config.block_of(canvas.ids.shape[1])
    return ~left & (stopped & (_first_block(canvas, block_length) > canvas.block) | canvas.committed.all(1))


def _enter_block(canvas: Canvas, block_length: int) -> Canvas:
    """Each row at the block of its first unknown token, its calls counted from there; or still at a full one."""
    block = torch.where(canvas.post > 0, canvas.block, _first_block(canvas, block_length))
    return replace(canvas, block=block, calls=torch.where(block == canvas.block, canvas.calls, 0))


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
    if config.prompt_first and canvas.block_length is None:  # at first one token alone
        asked = asked & ((canvas.calls > 0)[:, None] | (asked.cumsum(1) == 1))
    elif config.prompt_first:  # of a full block, the place behind it
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


def _is_blind(config: DecodeConfig) -> bool:
    """Whether what comes next is known before the model is asked: then it is asked for that alone."""
    surely = ("threshold", "factor", "entropy_bound", "editing_threshold")
    told = config.early_exit_thresholds or config.distrust_ids or config.choose_mask or config.prompt_first
    told = told or any(getattr(config, name) is not None for name in surely)
    return config.remasking in BLIND and config.schedule not in ("confident", "carried") and not told


def _in_line(
    canvas: Canvas,
    config: DecodeConfig,
    rows: Tensor,
    asked: Tensor,
    slots: Tensor,
    left: Tensor,
    uniform: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of what `_open_rows` found, the places whose turn it is."""
    doubt = uniform
    if config.remasking == "sequential":
        doubt = torch.zeros_like(uniform) if canvas.order is None else canvas.order.gather(1, rows).float()
    chosen = choose(doubt, None, asked, quota(canvas, config, asked, left, uniform, length))
    if not is_static(rows.device):
        width = max(int(chosen.sum(1).max()), 1)
    elif config.schedule == "even" and (config.sub_block_length or length) >= length:
        width = config.num_to_transfer or -(-length // config.steps_per_block(canvas.ids.shape[1]))
    else:
        return rows, asked, slots
    first = (~chosen).long().argsort(dim=1, stable=True)[:, :width]
    return rows.gather(1, first), chosen.gather(1, first), slots.gather(1, first)


def _unknown(canvas: Canvas, places: Tensor) -> tuple[Tensor, Tensor]:
    """The canvas positions nearest to `places` [B, K], and which of these are on the canvas and unknown."""
    rows = places.clamp(0, canvas.ids.shape[1] - 1)
    return rows, (rows == places) & ~canvas.committed.gather(1, rows)


def _draw(
    config: DecodeConfig, draws: list[Generator], block_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Uniform numbers for the tokens and for the order at each place of a block, both [B, L], float64 in [0, 1).

    A row draws one number for each place of a block from its own generator, known or not: what it draws depends on
    nothing but the number of its calls. Nothing is drawn for what is not random.
    """

    def own(wanted: bool) -> Tensor:
        if wanted:
            return numbers(draws, block_length, device)
        return torch.zeros(len(draws), block_length, dtype=torch.float64, device=device)

    alone = config.sampling == "inverse"
    return own(config.draws_tokens and alone), own(config.draws_order and alone)


ABSORBING = Process(advance, finished, masks=True)
