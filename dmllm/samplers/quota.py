"""How far a call goes: how many tokens it commits at least, and the time it is at.

Shapes: B rows of the batch, K positions asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.diffusion.schedules import SCHEDULES as NOISE
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.schedules import (
    CURVES,
    MASKGIT,
    commit_table,
    open_shares,
    remasked,
    time_table,
    until_something,
)


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
    if config.schedule in MASKGIT:
        return open_rows - still_open(config, canvas, open_rows, length, steps)
    if config.schedule == "fixed":
        return length // steps + (calls < length % steps).long()
    if config.schedule == "time":
        _, share = rates(config, steps, calls)
        if config.remasking == "origin":  # as many as fall below their share, and `choose` takes the lowest
            some = (asked & (uniform < share[:, None])).sum(1)
        else:
            some = (open_rows * share).long()
        return torch.where(calls < steps - 1, some, open_rows)
    if config.schedule in ("carried", "first_hitting"):
        return torch.ones_like(open_rows)
    if config.schedule == "confident":
        return until_something(open_rows, canvas.opened, calls, steps, config.eps)
    if config.choose_mask or not config.fill_behind_eos:  # some places are never filled
        return canvas.opened // steps + (calls < canvas.opened % steps).long()
    return -(-open_rows // (steps - calls).clamp(min=1))


def still_open(config: DecodeConfig, canvas: Canvas, left: Tensor, length: int, steps: int) -> Tensor:
    """How many of the `left` [B] open tokens a MaskGIT step leaves open, [B]: the share of its schedule, rounded down,
    of what was open at first; one at least, but fewer than before; none at the last call. Under maskgit_fixed it is the
    share of all of the canvas, and one stays open until the last call (MMaDA's code)."""
    shares = open_shares(config.noise_schedule, steps, left.device)[canvas.calls.clamp(max=steps - 1)]
    if config.schedule == "maskgit_fixed":
        keep = (length * shares).floor().long().minimum(left - 1).clamp(min=1)
    else:
        keep = (canvas.opened * shares).floor().long().clamp(min=1).minimum(left - 1)
    return torch.where(canvas.calls < steps - 1, keep, 0)


def most(canvas: Canvas, config: DecodeConfig, left: Tensor) -> Tensor:
    """How many tokens a call commits at most, [B]: under `schedule: carried` its share and what calls before it turned
    down of theirs, which is what is open but for the shares of the calls to come; else all that are open.

    Source: code NVlabs/Fast-dLLM (dream/model/generation_utils.py), where a threshold that turns tokens down to the end
    adds calls, one for each, that are made even after the last token is known; here they are not.
    """
    if config.schedule != "carried":
        return left
    steps = config.steps_per_block(canvas.ids.shape[1])
    to_come = canvas.opened * (steps - 1 - canvas.calls).clamp(min=0) // steps
    return (left - to_come).clamp(min=1)


def rates(config: DecodeConfig, steps: int, calls: Tensor) -> tuple[Tensor, Tensor]:
    """From a call's time to the next: the probability sigma that a known token is masked again, and that an open one is
    committed, both [B]. Under conf sigma is what the known tokens share, and the open ones do not make up for it."""
    _, masked = _table(config, steps, calls.device)
    now, then = masked[calls.clamp(max=steps - 1)], masked[(calls + 1).clamp(max=steps)]
    sigma = remasked(config.remdm, config.eta, now, then)
    commits = 1 - then / now
    return sigma, commits if config.remdm == "conf" else commits + sigma * (1 - now) / now


def noise_level(canvas: Canvas, config: DecodeConfig, block_length: int, asked: Tensor, uniform: Tensor) -> Tensor:
    """The time t of a call, [B]: where `schedule: time` has come to, or at which as much is masked as is unknown of the
    canvas (of whole blocks, of the active one). Under `first_hitting` it is drawn: of n masked tokens the next is shown
    after a share of the time as large as the largest of n uniform numbers, or 1 less the lowest of those of the tokens
    `asked` [B, K] for, `uniform` [B, K] (Zheng et al., arXiv:2409.02908, section 4)."""
    unknown, schedule = ~canvas.committed, NOISE.load(config.noise_schedule)()
    if config.schedule == "time":
        steps = config.steps_per_block(unknown.shape[1])
        times, _ = _table(config, steps, unknown.device)
        return times[canvas.calls.clamp(max=steps - 1)]
    if config.schedule == "first_hitting":
        passed = uniform.masked_fill(~asked, 1.0).amin(1)
        before = torch.where(canvas.calls == 0, 1.0, 1 - schedule.alpha(canvas.time.double()))
        return schedule.time(before * (1 - passed)).float()
    if canvas.block_length is None:
        return schedule.time(unknown.float().mean(1))
    places = torch.arange(unknown.shape[1], device=unknown.device) + canvas.offset[:, None]
    return schedule.time((unknown & (places // block_length == canvas.block[:, None])).sum(1) / block_length)


def _table(config: DecodeConfig, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return time_table(config.eps, steps, device, config.noise_schedule, config.remdm == "loop")
