"""How far a call goes: how many tokens it commits at least, and the time it is at.

Shapes: B rows of the batch, K positions asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.schedules import CURVES, commit_table, time_table, until_something


def quota(canvas: Canvas, config: DecodeConfig, asked: Tensor, left: Tensor, uniform: Tensor, length: int) -> Tensor:
    """How many of the `asked` [B, K] positions a call commits at least, [B] (see `DecodeConfig.schedule`).

    Of a block `left` [B] positions are open; a call on a sub-block asks for fewer.
    Shared evenly, no call is left with more than its share (the first take the remainder) and the last fills the block.
    """
    open_rows, steps, calls = left, config.steps_per_block(canvas.ids.shape[1]), canvas.calls
    if config.num_to_transfer is not None:
        return torch.full_like(open_rows, config.num_to_transfer)
    if config.schedule in CURVES:
        table = commit_table(config.schedule, config.shift, length, steps, asked.device)
        return table[canvas.opened, calls.clamp(max=steps)]
    if config.schedule == "fixed":
        return length // steps + (calls < length % steps).long()
    if config.schedule == "time":
        _, share = rates(config, steps, calls)
        if config.remasking == "origin":  # as many as fall below their share, and `choose` takes the lowest
            some = (asked & (uniform < share[:, None])).sum(1)
        else:
            some = (open_rows * share).long()
        return torch.where(calls < steps - 1, some, open_rows)
    if config.schedule == "confident":
        return until_something(open_rows, canvas.opened, calls, steps, config.eps)
    if config.choose_mask or not config.fill_behind_eos:  # some places are never filled
        return canvas.opened // steps + (calls < canvas.opened % steps).long()
    return -(-open_rows // (steps - calls).clamp(min=1))


def rates(config: DecodeConfig, steps: int, calls: Tensor) -> tuple[Tensor, Tensor]:
    """From a call's time to the next: the probability sigma that a known token is masked again, and that an open one is
    committed, both [B]. Under conf sigma is what the known tokens share, and the open ones do not make up for it."""
    times = time_table(config.eps, steps, calls.device)
    now, then = times[calls.clamp(max=steps - 1)], times[(calls + 1).clamp(max=steps)]
    most = (then / (1 - now)).clamp(max=1)
    commits = 1 - then / now
    if config.remdm is None:
        return torch.zeros_like(now), commits
    if config.remdm == "conf":
        return most, commits
    sigma = most.clamp(max=config.eta) if config.remdm == "cap" else config.eta * most
    return sigma, commits + sigma * (1 - now) / now


def noise_level(canvas: Canvas, config: DecodeConfig, block_length: int) -> Tensor:
    """The time t of a call, [B]: where `schedule: time` has come to, or how much of the canvas (of whole blocks, of the
    active one) is unknown."""
    unknown = ~canvas.committed
    if config.schedule == "time":
        steps = config.steps_per_block(unknown.shape[1])
        return time_table(config.eps, steps, unknown.device)[canvas.calls.clamp(max=steps - 1)]
    if canvas.block_length is None:
        return unknown.float().mean(1)
    places = torch.arange(unknown.shape[1], device=unknown.device) + canvas.offset[:, None]
    return (unknown & (places // block_length == canvas.block[:, None])).sum(1) / block_length
