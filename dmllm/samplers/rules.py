"""Which token goes where, and which are sure enough to be committed: functions of the logits alone.

A rule gives the *doubt* about each open position; the least doubtful are committed. Doubt is measured as probability
mass that speaks against the choice, never as one minus a rounded probability, so that float32 does not tie at 1.

Sources: low_confidence and random, Nie et al., LLaDA, arXiv:2502.09992, section 2.4; margin and entropy, Ye et al.,
Dream, arXiv:2508.15487, and Kim et al., arXiv:2502.06768; sequential, SDAR, arXiv:2510.06303; threshold, Wu et al.,
Fast-dLLM, arXiv:2505.22618, section 3.3. Ranking by the probability of a *drawn* token (low_confidence at
temperature > 0) favours probable texts even at one token a step; margin, entropy and random look at the distribution
alone, and at one token a step they draw exactly from a model with exact conditionals (tests/samplers/test_denoise.py).

Shapes: B rows of the batch, K positions asked for, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmllm.samplers.config import DecodeConfig


@dataclass(frozen=True)
class Estimate:
    """What the model says of each position, in one pass over the logits: mass relative to the top token's."""

    tokens: Tensor  # [B, K] int64, the token that would be committed
    top: Tensor  # [B, K] int64, the most probable one
    weights: Tensor  # [B, K, V] float32, exp(logit - greatest logit), but 0 at the top token itself
    others: Tensor  # [B, K] float32, their sum: mass(all but the top) / mass(top)

    @property
    def against(self) -> Tensor:
        """Probability of anything but `tokens`, [B, K]."""
        chosen = self.weights.gather(-1, self.tokens[..., None]).squeeze(-1)
        beside = torch.where(self.tokens == self.top, self.others, 1 + self.others - chosen)
        return beside / (1 + self.others)


def estimate(logits: Tensor, mask_id: int, config: DecodeConfig, uniform: Tensor | None = None) -> Estimate:
    """Choose a token for each position; the mask token (as a rule) and `config.suppress_ids` are never one.

    Args:
        logits: [B, K, V], left as they are.
        uniform: [B, K] float64 in [0, 1), one number a position; needed at temperature > 0.
    """
    scores = logits.to(torch.float32, copy=True)
    mask = scores[..., mask_id].clone()
    scores[..., [*([] if config.choose_mask else [mask_id]), *config.suppress_ids]] = -torch.inf
    highest, top = scores.max(-1)
    tokens = top
    if config.draws_tokens:
        assert uniform is not None
        tokens = draw(scores, uniform, config.temperature, config.top_p)
    if config.distrust_ids:  # chosen or not, they have no part in the distribution by which choices are ranked
        scores[..., config.distrust_ids] = -torch.inf
        highest, top = scores.max(-1)
    if config.count_mask:
        scores[..., mask_id] = mask.minimum(highest + MOST)
    scores -= highest[..., None]
    weights = scores.exp_().scatter_(-1, top[..., None], 0.0)
    return Estimate(tokens, top, weights, weights.sum(-1))


MOST = 60.0  # exp of it is far from overflow, and beside it any other mass is nothing


def draw(scores: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [B, K] from softmax(scores / temperature), by inverting the cumulative distribution at `uniform`.

    One random number a position, in float64: a row of the batch draws the same whatever its neighbours are, and rare
    tokens keep their share. With top_p < 1 only the most probable tokens that together reach it remain.
    """
    mass = (scores / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = mass.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        mass = torch.zeros_like(mass).scatter_(-1, index, ordered.masked_fill(before >= top_p, 0.0))
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    target = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=scores.shape[-1] - 1)


def low_confidence(seen: Estimate, uniform: Tensor) -> Tensor:
    """Doubt [B, K]: the probability of anything but the chosen token."""
    return seen.against


def margin(seen: Estimate, uniform: Tensor) -> Tensor:
    """Doubt [B, K]: how little the most probable token is ahead of the next, 1 - (p1 - p2)."""
    return (seen.others + seen.weights.amax(-1)) / (1 + seen.others)


def entropy(seen: Estimate, uniform: Tensor) -> Tensor:
    """Doubt [B, K]: the entropy in nats, each term exact where the distribution is nearly certain."""
    rest = torch.special.entr(seen.weights / (1 + seen.others)[..., None]).sum(-1)
    return rest + seen.others.log1p() / (1 + seen.others)


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
