"""Bounds on -log p(x_0) for tokens that turn into words or masks (`diffusion.uniform`), one formula for all of them.

With q the distribution of x_t for the true x_0, p the same for what is predicted of it, z the token that stands there,
and r = q(z) / p(z), the bound is the mean over t and z of

    rate(z) / q(z) * (KL(q || p) + r - 1 - log r)            continuous time
    T * KL(q(x_s | z, x_0) || q(x_s | z, prediction))        in T steps, s = t - 1/T

The first is UDLM's for uniform noise (arXiv:2412.10193, equation 18; Duo, arXiv:2506.10892), GIDD's for hybrid noise
(arXiv:2503.04482, section 3.2), and MDLM's weighted cross-entropy where all noise is masks. The second is D3PM's
(arXiv:2107.03006, section 2), its first step the reconstruction. Any positive scores s_y in place of the ratios
p(y) / p(z) give the score entropy (SEDD, arXiv:2310.16834, equation 5); it is the same number for these.

All take the prediction of x_0 that leaves its own place out (`uniform.leave_one_out`): the bound is tight for that one.
Shapes: N tokens, V ids. Everything is in float32 and exact where noise or what is left of a token vanishes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.diffusion.uniform import Level, Noise

WEIGHTS = ("elbo", "dynamic", "clipped", "none")


def divergences(log_x: Tensor, targets: Tensor, noised: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """KL(q || p) and log q(z) / p(z), both [N].

    Args:
        log_x: [N, V], log-probabilities of the words, -inf for what is none.
        targets, noised: [N], x_0 and z.
    """
    odds, uniform = level.log_odds, level.uniform
    at_target = log_x.gather(-1, targets[:, None]).squeeze(-1)
    at_noised = log_x.gather(-1, noised[:, None]).squeeze(-1)
    raised = F.softplus(odds[:, None] + log_x).sum(-1)  # log p(y) / uniform, of all words
    on_target = _log_ratio(odds, at_target)
    kl = (level.alpha + uniform) * on_target - uniform * (raised - F.softplus(odds + at_target))
    return kl, torch.where(noised == targets, on_target, -F.softplus(odds + at_noised))


def continuous(
    log_x: Tensor, targets: Tensor, noised: Tensor, noise: Noise, t: Tensor, mask_id: int, weight: Tensor | None = None
) -> Tensor:
    """Each token's share of the bound, [N]; `weight` [N] stands in for rate(z) / q(z)."""
    kl, log_ratio = divergences(log_x, targets, noised, noise.at(t))
    weight = rate(targets, noised, noise, t, mask_id) if weight is None else weight
    return weight * (kl + torch.expm1(log_ratio) - log_ratio)


def rate(targets: Tensor, noised: Tensor, noise: Noise, t: Tensor, mask_id: int) -> Tensor:
    """rate(z) / q(z), [N]: how fast what stands there would come about, for its probability."""
    word, mask = noise.pull(t)
    pull = torch.where(noised == mask_id, mask, word)
    return torch.where(noised == targets, pull * torch.sigmoid(-noise.at(t).log_odds), pull)


def weights_of(
    kind: str, targets: Tensor, noised: Tensor, noise: Noise, t: Tensor, mask_id: int, clip: float
) -> Tensor:
    """What KL + r - 1 - log r weighs in training, [N], by a name of WEIGHTS.

    dynamic is the bound's weight for gamma = 1 without what depends on the time alone (GIDD, section 4.2): all times
    then teach alike.
    """
    if kind == "none":
        return torch.ones_like(t)
    if kind == "dynamic":
        weight = torch.where(noised == mask_id, 2.0, 1.0)
        return torch.where(noised == targets, torch.sigmoid(-noise.at(t).log_odds), weight)
    weight = rate(targets, noised, noise, t, mask_id)
    return weight.clamp(max=clip) if kind == "clipped" else weight


def discrete(
    log_x: Tensor, targets: Tensor, noised: Tensor, noise: Noise, s: Tensor, t: Tensor, mask_id: int
) -> Tensor:
    """KL(q(x_s | z, x_0) || q(x_s | z, prediction)), [N]: one of the T terms of the bound.

    The two share q(z | x_s): what remains is how p and q differ at s, and at t in z.
    """
    before, now = noise.at(s), noise.at(t)
    kl, log_ratio = divergences(log_x, targets, noised, before)
    _, log_ratio_now = divergences(log_x, targets, noised, now)
    same = noised == targets
    was = before.noise(noised, mask_id) + before.alpha * same
    is_now = now.noise(noised, mask_id) + now.alpha * same
    kept = now.alpha / before.alpha
    came = (now.noise(noised, mask_id) - kept * before.noise(noised, mask_id)).clamp(min=0)
    stayed = torch.where(was > 0, was * log_ratio, 0.0)  # a token that could not be there takes no part
    return (came * kl + kept * stayed) / is_now - log_ratio_now


def score_entropy(
    log_scores: Tensor, targets: Tensor, noised: Tensor, noise: Noise, t: Tensor, mask_id: int, words: Tensor
) -> Tensor:
    """The bound of any log-scores [N, V] for log p(y) / p(z), [N]; noise must be masks alone, or words alone.

    Args:
        words: [V] bool, the ids that noise or text may be; for z itself the score is not read.
    """
    level = noise.at(t)
    others = words & (torch.arange(len(words), device=words.device) != noised[:, None])
    sum_scores = log_scores.masked_fill(~others, -torch.inf).exp().sum(-1)
    sum_logs = log_scores.masked_fill(~others, 0.0).sum(-1)
    at_target = log_scores.gather(-1, targets[:, None]).squeeze(-1)
    masked, same = noised == mask_id, noised == targets
    own = level.noise(noised, mask_id)  # q(z) where z is not x_0
    true = (level.alpha + torch.where(masked, 0.0, level.uniform)) / own  # q(x_0) / q(z), where z is not x_0
    beside = torch.where(same, torch.sigmoid(-level.log_odds), torch.where(masked, 0.0, 1.0))  # q(y) / q(z) of others
    count = noise.words - torch.where(masked, 0.0, torch.where(same, 1.0, 2.0))  # so many others, but for x_0
    to_target = torch.where(same, 0.0, true)
    logs = torch.where(same, 0.0, to_target * at_target) + beside * (sum_logs - torch.where(same, 0.0, at_target))
    least = torch.where(same, 0.0, _cross(to_target)) + count * _cross(beside)
    word, mask = noise.pull(t)
    pull = torch.where(masked, mask, word) * own  # the rate
    return pull * (sum_scores - logs + least)


def _cross(ratio: Tensor) -> Tensor:
    """a (log a - 1), 0 at 0."""
    return torch.xlogy(ratio, ratio) - ratio


def _log_ratio(odds: Tensor, log_x: Tensor) -> Tensor:
    """log (alpha + uniform) / (alpha x + uniform), without a difference of large numbers."""
    high, low = odds.clamp(min=0), odds.clamp(max=0)
    much = -log_x + F.softplus(-high) - F.softplus(-high - log_x)
    return torch.where(odds > 0, much, F.softplus(low) - F.softplus(low + log_x))
