"""Which token goes where, and which are sure enough to be committed: functions of the logits alone.

A rule gives the *doubt* about each open position; the least doubtful are committed. Doubt is measured as probability
mass that speaks against the choice, never as one minus a rounded probability, so that float32 does not tie at 1.

Sources: low_confidence and random, Nie et al., LLaDA, arXiv:2502.09992, section 2.4; margin and entropy, Ye et al.,
Dream, arXiv:2508.15487, and Kim et al., arXiv:2502.06768; sequential, SDAR, arXiv:2510.06303; threshold, Wu et al.,
Fast-dLLM, arXiv:2505.22618, section 3.3. Ranking by the probability of a *drawn* token (low_confidence at
temperature > 0) favours probable texts even at one token a step; margin, entropy and random look at the distribution
alone, and at one token a step they draw exactly from a model with exact conditionals (tests/samplers/test_denoise.py).

Shapes: B rows of the batch, K positions asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.samplers.estimate import Estimate


def low_confidence(seen: Estimate, uniform: Tensor) -> Tensor:
    """Doubt [B, K]: the probability of anything but the chosen token."""
    return seen.against


def margin(seen: Estimate, uniform: Tensor) -> Tensor:
    """Doubt [B, K]: how little the most probable token is ahead of the next, 1 - (p1 - p2)."""
    return (seen.others + seen.runner_up.exp()) / (1 + seen.others)


def entropy(seen: Estimate, uniform: Tensor) -> Tensor:
    """Doubt [B, K]: the entropy in nats, each term exact where the distribution is nearly certain."""
    return seen.entropy


def random_order(seen: Estimate, uniform: Tensor) -> Tensor:
    """Doubt [B, K]: none in particular; the order is drawn."""
    return uniform


def sequential(seen: Estimate, uniform: Tensor) -> Tensor:
    """Doubt [B, K]: the same everywhere, so that the first goes first."""
    return torch.zeros_like(seen.others)


def choose(doubt: Tensor, sure: Tensor | None, asked: Tensor, quota: Tensor) -> Tensor:
    """Which positions to commit, [B, K] bool: the `quota` [B] least doubtful of those asked for, and all `sure` ones.

    Of equally doubtful ones the first goes first.
    """
    order = doubt.masked_fill(~asked, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    chosen = rank < quota[:, None]
    return asked & (chosen if sure is None else chosen | sure)
