"""Speculative sampling: tokens drafted from one distribution, kept or replaced so that they are drawn from another.

A draft is kept with probability min(1, p / q); the first that is not gives way to a draw from max(p - q, 0). Whatever
the drafts come from, what remains is distributed as if it had been drawn from p token by token.

Source: Leviathan et al., arXiv:2211.17192, algorithm 1; Chen et al., arXiv:2302.01318, theorem 1.
Shapes: B rows, S drafts, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def verify(p: Tensor, q: Tensor, drafts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the first drafts are kept, [B] int64, and the masses [B, V] of the token behind them (their sum is
    not 1).

    Args:
        p: [B, S + 1, V], of the token at each draft and behind the last, given the drafts before it.
        q: [B, S, V], what each draft was drawn from; zeros where there is none.
        drafts: [B, S] int64.
        uniform: [B, S] in [0, 1).
    """
    wanted, offered = (mass.gather(-1, drafts[..., None]).squeeze(-1) for mass in (p[:, :-1], q))
    count = (uniform * offered < wanted).long().cumprod(1).sum(1)
    at = count[:, None, None].expand(-1, 1, p.shape[-1])
    own = p.gather(1, at).squeeze(1)
    rest = (own - F.pad(q, (0, 0, 0, 1)).gather(1, at).squeeze(1)).clamp(min=0)
    return count, torch.where(rest.sum(-1, keepdim=True) > 0, rest, own)
