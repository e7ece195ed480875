"""How many tokens each call on a block commits, where a curve says it.

A curve rises from 0 at the first call to 1 at the last; its steps, in whole tokens and at least one each, are taken
from the last to the first: `shift` above 1 commits few tokens at first, while little is known, and many at the end.

Source: Li et al., LaViDa, arXiv:2505.16839, section 3.3 (timestep shifting, from arXiv:2403.03206); code
jacklishufan/LaViDa (llada/generate.py), whose rounding in float32 this keeps.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

CURVES = ("linear", "shift", "cosine", "logit_normal")


@lru_cache(maxsize=4096)
def commit_counts(curve: str, shift: float, tokens: int, calls: int) -> tuple[int, ...]:
    """The tokens that each of at most `calls` calls commits, of `tokens` in all.

    Args:
        curve: a name of CURVES; `shift` is that curve's parameter, 1 is linear.
    """
    if not tokens:
        return ()
    reached = _curve(curve, shift, torch.linspace(0, 1, min(calls, tokens) + 1))
    counts = (reached * tokens).long().diff().clamp(min=1).tolist()
    excess, at = sum(counts) - tokens, 0
    counts[-1] -= min(excess, 0)  # a curve that rounding keeps below 1 leaves a token over
    while excess > 0:
        if counts[at] > 1:
            counts[at] -= 1
            excess -= 1
        at = (at + 1) % len(counts)
    return tuple(reversed(counts))


@lru_cache(maxsize=64)
def commit_table(curve: str, shift: float, length: int, calls: int, device: torch.device) -> Tensor:
    """`commit_counts` for every number of tokens up to `length`, [length + 1, calls + 1]; `length` after the last."""
    table = torch.full((length + 1, calls + 1), length)
    for tokens in range(1, length + 1):
        counts = commit_counts(curve, shift, tokens, calls)
        table[tokens, : len(counts)] = torch.tensor(counts)
    return table.to(device)


@lru_cache(maxsize=64)
def time_table(eps: float, calls: int, device: torch.device) -> Tensor:
    """The times between which the calls on a block lie, [calls + 1]."""
    return torch.linspace(1, eps, calls + 1).to(device)


def until_something(open_rows: Tensor, opened: Tensor, calls: Tensor, steps: int, eps: float) -> Tensor:
    """The tokens of confident decoding's next time, [B]: at least one of `open_rows` [B], all of them at the last time.

    Of `opened` tokens m are open, so that it is time t = m / opened; to come are those of linspace(1, eps, steps + 1)
    that are below t and behind the calls spent. The first at which int(m (1 - s/t)) is not 0 says how many.

    Source: Yu, Ma and Wang, Dimple, arXiv:2505.16990, section 3.3; code yu-rp/Dimple (generation_utils.py).
    """
    times = time_table(eps, steps, open_rows.device)
    now = (open_rows / opened.clamp(min=1))[:, None]
    counts = (open_rows[:, None] * (1 - times / now.clamp(min=eps))).long()  # [B, steps + 1]
    counts[:, -1] = open_rows
    coming = (times < now) & (torch.arange(steps + 1, device=times.device) > calls[:, None]) & (counts > 0)
    coming[:, -1] = True
    return counts.gather(1, coming.long().argmax(1, keepdim=True)).squeeze(1)


def _curve(name: str, shift: float, t: Tensor) -> Tensor:
    if name == "shift":
        return shift * t / (1 + (shift - 1) * t)
    if name == "cosine":
        return 1 - 0.5 * (1 + (math.pi * t).cos())
    if name == "logit_normal":
        return 0.5 * (1 + ((t / (1 - t)).log() / torch.tensor(2.0).sqrt()).erf())
    return t
