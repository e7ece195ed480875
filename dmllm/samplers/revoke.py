"""Committed tokens that are opened again while their block is the active one; what was given stays.

Two ways. In the diffusion process run backwards a known token may be masked again on the way from time t to s, with
probability sigma, if as many more are committed: what is known at each time is then distributed as without it (ReMDM).
Or a token is judged by what the others say of it, and goes where that is little (WINO).

Sources: Wang et al., ReMDM, arXiv:2503.00307 (code kuleshov-group/remdm, diffusion.py; alpha = 1 - t);
Hong et al., WINO, arXiv:2507.18578 (code Feng-Hong/WINO-DLLM). WINO judges in the same call, by a second
block of masks each of which sees all but its own token. Here it is a second call, in which every other token of the
block is hidden, the odd ones and the even ones in turn: any model can be asked that, and what was committed together
is judged by its other half.

Shapes: B rows of the batch, N tokens of the canvas, L places of a block, K positions asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.estimate import estimate
from dmllm.samplers.quota import rates
from dmllm.samplers.rules import choose


def masked_again(canvas: Canvas, config: DecodeConfig, length: int, uniform: Tensor) -> Tensor:
    """Which tokens of each row's active block ReMDM masks, [B, N] bool: each by itself, none in the last call.

    Args:
        uniform: [B, L], one number a place of the block; that of an open place decides whether it is committed.
    """
    steps, known = config.steps_per_block(canvas.ids.shape[1]), _known(canvas, length)
    sigma, _ = rates(config, steps, canvas.calls)
    sigma = sigma[:, None]
    if config.remdm == "conf":
        sigma = sigma * (-canvas.confidence).masked_fill(~known, -torch.inf).softmax(-1)
    slots = torch.arange(known.shape[1], device=known.device) + (canvas.offset - canvas.block * length)[:, None]
    number = uniform.gather(1, slots.clamp(0, length - 1))
    return known & (number < sigma) & (canvas.calls < steps - 1)[:, None]


def revoked(
    predict: Callable[[Canvas, Tensor], Tensor], canvas: Canvas, config: DecodeConfig, length: int, fresh: Tensor
) -> Tensor:
    """Which tokens of each row's active block are less probable than `revoke_threshold`, given the others, [B, N] bool.

    Only where the call has committed several (`fresh` [B]), and then fewer than the call before it committed: so a
    block ends after as many calls as it has places, at most.
    """
    assert config.revoke_threshold is not None
    half = torch.arange(-(-length // 2), device=canvas.ids.device)
    places = (canvas.block * length - canvas.offset + canvas.calls % 2)[:, None] + 2 * half  # [B, K]
    rows = places.clamp(0, canvas.ids.shape[1] - 1)
    judged = (rows == places) & _known(canvas, length).gather(1, rows)
    hidden = _marked(canvas, rows, judged)
    logits = predict(canvas.reopen(hidden), rows)
    doubt = estimate(logits, canvas.mask_id, config, given=canvas.ids.gather(1, rows)).against
    going = judged & (doubt > 1 - config.revoke_threshold)
    over = canvas.calls + 1 >= config.steps_per_block(canvas.ids.shape[1])
    most = torch.where((fresh > 1) & ~over, canvas.accepted - 1, 0)
    return _marked(canvas, rows, choose(-doubt, None, going, most))


def with_confidence(canvas: Canvas, rows: Tensor, against: Tensor, chosen: Tensor) -> Canvas:
    """The canvas that remembers how probable what is `chosen` [B, K] at `rows` is now."""
    fresh = _marked(canvas, rows, chosen)
    found = torch.zeros_like(canvas.confidence).scatter_add_(1, rows, (1 - against) * chosen)
    return replace(canvas, confidence=torch.where(fresh, found, canvas.confidence))


def _known(canvas: Canvas, length: int) -> Tensor:
    """[B, N] bool: what was committed in each row's active block and not given."""
    places = torch.arange(canvas.ids.shape[1], device=canvas.ids.device) + canvas.offset[:, None]
    return (places // length == canvas.block[:, None]) & canvas.committed & canvas.editable


def _marked(canvas: Canvas, rows: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros_like(canvas.ids).scatter_add_(1, rows, chosen.long()).bool()
