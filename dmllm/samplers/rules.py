"""Which token goes where, and which are sure enough to be committed: functions of the logits alone.

A rule gives the *doubt* about each open position; the least doubtful are committed. Doubt is measured as probability
mass that speaks against the choice, never as one minus a rounded probability, so that float32 does not tie at 1.

Sources: low_confidence and random, Nie et al., LLaDA, arXiv:2502.09992, section 2.4; margin and entropy, Ye et al.,
Dream, arXiv:2508.15487, and Kim et al., arXiv:2502.06768; sequential, SDAR, arXiv:2510.06303; threshold, Wu et al.,
Fast-dLLM, arXiv:2505.22618, section 3.3. Ranking by the probability of a *drawn* token (low_confidence at
temperature > 0) favours probable texts even at one token a step; margin, entropy and random look at the distribution
alone, and at one token a step they draw exactly from a model with exact conditionals (tests/samplers/test_truths.py).

Shapes: B rows of the batch, K positions asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmllm.samplers.config import DecodeConfig
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


def accepted(
    seen: Estimate, doubt: Tensor, asked: Tensor, config: DecodeConfig, stable: Tensor, progress: Tensor
) -> Tensor | None:
    """Which positions are sure enough to be committed beyond a quota, [B, K] bool; None where nothing is.

    That what is probable must also be stable is KLASS, Kim et al., arXiv:2511.05664 (code shkim0116/KLASS), here with
    changes between the calls on one block: its first call has nothing to compare with.

    Args:
        doubt: [B, K], of the order in which positions are committed.
        stable: [B, K] int64, for how many calls up to now the prediction has hardly changed.
        progress: [B], the share of its calls that a block has had, this one included.
    """
    sure = None
    if config.threshold is not None:
        sure = seen.against <= 1 - config.threshold
    if config.kl_threshold is not None and sure is not None:
        sure = sure & (stable >= config.kl_history_length)
    if config.factor is not None:
        sure = factor(seen, asked, config.factor)
    if config.entropy_bound is not None:
        sure = entropy_bound(seen, doubt, asked, config.entropy_bound)
    if config.early_exit_thresholds:
        ready = early_exit(seen, asked, progress, config.early_exit_thresholds)
        sure = ready if sure is None else sure | ready
    return sure


def factor(seen: Estimate, asked: Tensor, scale: float) -> Tensor:
    """The n most probable choices, for the largest n whose least probable one is at least 1 - scale / (n + 1).

    At scale 1 they are then together the most probable text, too. One is taken in any case, and where a
    single one would be left over, it goes along, as in the authors' code.
    Source: Wu et al., Fast-dLLM, arXiv:2505.22618, section 3.3, theorem 1; code NVlabs/Fast-dLLM (llada/generate.py).
    """
    against = seen.against.masked_fill(~asked, torch.inf)
    lowest = against.sort(dim=-1).values
    number = torch.arange(1, lowest.shape[-1] + 1, device=lowest.device)
    passes = (lowest <= scale / (number + 1)) | (number == 1)
    count, left = passes.long().cumprod(-1).sum(-1), asked.sum(-1)
    return _first(against, count + (count == left - 1)) & asked


def entropy_bound(seen: Estimate, doubt: Tensor, asked: Tensor, bound: float) -> Tensor:
    """The first positions in the order of `doubt` whose entropies without the largest sum to at most `bound` nats.

    The sum is a bound on how much the chosen positions say about each other, so that 0 is exact.
    Source: Ben-Hamu et al., EB-Sampler, arXiv:2505.24857; with the order of entropies it is DiffusionGemma's.
    """
    order = doubt.masked_fill(~asked, torch.inf).argsort(dim=-1, stable=True)
    entropies = seen.entropy.masked_fill(~asked, MUCH).gather(-1, order)
    beside = entropies.cumsum(-1) - entropies.cummax(-1).values
    return _first(doubt.masked_fill(~asked, torch.inf), (beside <= bound).long().cumprod(-1).sum(-1)) & asked


def early_exit(seen: Estimate, asked: Tensor, progress: Tensor, gaps: Sequence[float]) -> Tensor:
    """All that is asked for, or nothing: whether the most probable tokens are far enough ahead of the next, on average.

    Far enough is, in logits, what `gaps` says of the first, second and last third of the calls.
    Source: Li et al., Prophet, arXiv:2508.19982; code pixeli99/Prophet (generate_earlyexit.py), which looks
    at five places where the answer is expected to stand.
    """
    mean = (-seen.runner_up * asked).sum(-1) / asked.sum(-1).clamp(min=1)
    early, middle, late = gaps
    least = torch.where(progress < 0.33, early, torch.where(progress < 0.67, middle, late))
    return asked & (mean >= least)[:, None]


MUCH = 1e9  # an entropy beyond any vocabulary's


def choose(doubt: Tensor, sure: Tensor | None, asked: Tensor, quota: Tensor) -> Tensor:
    """Which positions to commit, [B, K] bool: the `quota` [B] least doubtful of those asked for, and all `sure` ones.

    Of equally doubtful ones the first goes first.
    """
    chosen = _first(doubt.masked_fill(~asked, torch.inf), quota)
    return asked & (chosen if sure is None else chosen | sure)


def _first(doubt: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] lowest of each row of `doubt` [B, K], [B, K] bool; of equal ones the first goes first."""
    order = doubt.argsort(dim=-1, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places) < count[:, None]
