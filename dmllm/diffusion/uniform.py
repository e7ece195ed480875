"""Corruption into random tokens: a token is kept, or becomes any other one, or (hybrid noise) the mask token.

    q(x_t | x_0) = alpha [x_t = x_0] + uniform [x_t is a word] + masked [x_t is the mask]
    alpha + K uniform + masked = 1

    uniform     masked = 0                        D3PM (Austin et al., arXiv:2107.03006, A.2.1), UDLM, Duo
    hybrid      mostly masks, a share of words    GIDD (von Ruette et al., arXiv:2503.04482, section 3.3)
    absorbing   uniform = 0                       MDLM, SEDD (`diffusion.absorbing`)

The words are the K ids that are not reserved (`types.Vocabulary`): mask, image and padding are never noise, the end of
sequence is. A kept token and a random one look alike, so a model must be told the time, and what it predicts comes in
two forms. Both are logits over the words, and differ in the entry of the token that stands there:

    posterior        p(x_0 | x_t): what cross-entropy teaches, what a final choice is made from
    leave one out    p(x_0 | x_t but for this place): what belongs into the posterior of a step and into the bounds;
                     with the other one a bound does not reach the entropy, however good the model (arXiv:2605.22765)

Time: t = 0 is clean, t = 1 is noise. Shapes: any, [...]; V ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.diffusion.schedules import SCHEDULES, NoiseSchedule
from dmllm.types import Vocabulary

NOISES = ("uniform", "hybrid", "absorbing")
PARAMETERISATIONS = ("leave_one_out", "posterior", "score")
MOST = 1e4  # of log-odds: exp of minus it is 0, and it is finite


@dataclass(frozen=True)
class Level:
    """What q(x_t | x_0) is made of at some times, each [...]."""

    alpha: Tensor  # the mass of the token itself, beside what noise gives it
    uniform: Tensor  # the mass of each word
    masked: Tensor  # the mass of the mask token
    log_odds: Tensor  # log(alpha / uniform), finite

    def noise(self, ids: Tensor, mask_id: int) -> Tensor:
        """The mass that noise gives `ids` [...]."""
        return torch.where(ids == mask_id, self.masked, self.uniform)


class Noise(Protocol):
    """A process that corrupts each token by itself."""

    @property
    def words(self) -> int: ...

    def at(self, t: Tensor) -> Level: ...

    def pull(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d/dt log(noise / alpha) of a word and of the mask: rates of the process, for its bounds."""
        ...

    def time(self, share: Tensor) -> Tensor:
        """The t at which 1 - alpha is `share`."""
        ...


@dataclass(frozen=True)
class UniformNoise:
    """A token is kept with probability alpha(t) of a schedule, or drawn anew from all words."""

    words: int
    schedule: NoiseSchedule

    def at(self, t: Tensor) -> Level:
        alpha = self.schedule.alpha(t).clamp(0, 1)
        odds = alpha.log() - torch.log1p(-alpha) + math.log(self.words)
        return Level(alpha, (1 - alpha) / self.words, torch.zeros_like(alpha), odds.clamp(-MOST, MOST))

    def pull(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.schedule.alpha(t)
        rate = -self.schedule.alpha_prime(t) / (alpha * (1 - alpha))
        return rate, rate

    def time(self, share: Tensor) -> Tensor:
        return self.schedule.time(share)


@dataclass(frozen=True)
class MaskNoise:
    """A token is kept with probability alpha(t) of a schedule, or masked."""

    words: int
    schedule: NoiseSchedule

    def at(self, t: Tensor) -> Level:
        alpha = self.schedule.alpha(t).clamp(0, 1)
        return Level(alpha, torch.zeros_like(alpha), 1 - alpha, torch.full_like(alpha, MOST))

    def pull(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return UniformNoise(self.words, self.schedule).pull(t)

    def time(self, share: Tensor) -> Tensor:
        return self.schedule.time(share)


@dataclass(frozen=True)
class HybridNoise:
    """GIDD: masks, and random words of which there are most in the middle, where they are the share `p_uniform` of all.

    alpha = (1 - t) / C, masked = t / C, K uniform = c / C with c = B (t (1 - t))^(gamma / 2), C = 1 + c.
    """

    words: int
    p_uniform: float
    gamma: float = 1.0

    def at(self, t: Tensor) -> Level:
        c = self._scale * (t * (1 - t)) ** (self.gamma / 2)
        odds = torch.log1p(-t) - torch.log(c / self.words)
        odds = torch.where(t < 1, odds, -MOST).clamp(-MOST, MOST)
        return Level((1 - t) / (1 + c), c / (1 + c) / self.words, t / (1 + c), odds)

    def pull(self, t: Tensor) -> tuple[Tensor, Tensor]:
        mask = 1 / (t * (1 - t))
        return mask * (self.gamma / 2 + t * (1 - self.gamma)), mask

    def time(self, share: Tensor) -> Tensor:
        low, high = torch.zeros_like(share), torch.ones_like(share)
        for _ in range(26):  # to 1e-8
            middle = (low + high) / 2
            early = 1 - self.at(middle).alpha < share
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return torch.where(share >= 1, 1.0, torch.where(share <= 0, 0.0, (low + high) / 2))

    @property
    def _scale(self) -> float:
        return 2**self.gamma * self.p_uniform / (1 - self.p_uniform)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How tokens are corrupted, and what a model that undoes it predicts: `process_options` of its config.json."""

    noise: str = "uniform"
    """uniform: random words in place of tokens. hybrid: masks, and random words among them (GIDD). absorbing: masks."""
    p_uniform: float = 0.1
    """Under `hybrid`, the share of random words among noise and all at t = 1/2; 0 leaves masks alone."""
    gamma: float = 1.0
    """Under `hybrid`, how much the random words keep to the middle, above 0 and at most 2."""
    schedule: str = "linear"
    """How much is noise when, by name: linear, cosine, polynomial. Hybrid noise has its own."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. {power: 2} for polynomial."""
    parameterisation: str = "leave_one_out"
    """What the logits say: leave_one_out, posterior (see above), or score: log p_t(y) / p_t(x_t) (SEDD)."""

    def __post_init__(self) -> None:
        for name, known in (("noise", NOISES), ("parameterisation", PARAMETERISATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}.")
        if self.noise == "hybrid" and self.schedule != "linear":
            raise ValueError(f"schedule={self.schedule!r} is for other noise: hybrid noise has its own; leave it out.")
        if not 0 <= self.p_uniform < 1:
            raise ValueError(f"p_uniform={self.p_uniform} must be 0 (masks alone) or above, below 1; GIDD's is 0.1.")
        if not 0 < self.gamma <= 2:
            raise ValueError(f"gamma={self.gamma} must lie above 0 and at most at 2; GIDD's is 1.")
        SCHEDULES.load(self.schedule)(**self.schedule_options)


def build_noise(config: NoiseConfig, words: int) -> Noise:
    """The process over so many words."""
    if config.noise == "hybrid":
        return HybridNoise(words, config.p_uniform, config.gamma)
    kind = MaskNoise if config.noise == "absorbing" else UniformNoise
    return kind(words, SCHEDULES.load(config.schedule)(**config.schedule_options))


def process_options(config: NoiseConfig) -> dict[str, Any]:
    """What config.json says of the process: the fields of `NoiseConfig`, whatever else `config` has."""
    return {own.name: getattr(config, own.name) for own in fields(NoiseConfig)}


def draw_words(number: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Words, each as probable, from `number` [...] in [0, 1)."""
    words = (number * vocabulary.words).long().clamp(max=vocabulary.words - 1)
    for reserved in vocabulary.reserved:
        words = words + (words >= reserved)
    return words


def corrupt(ids: Tensor, level: Level, which: Tensor, number: Tensor, vocabulary: Vocabulary) -> Tensor:
    """x_t for x_0 = `ids` [...], by two uniform numbers in [0, 1) for each: what it becomes, and which word."""
    noise = torch.where(which < level.masked, vocabulary.mask, draw_words(number, vocabulary))
    return torch.where(which < 1 - level.alpha, noise, ids)


def fresh(level: Level, which: Tensor, number: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Tokens [...] that are noise for sure, by two uniform numbers for each."""
    masks = which * (1 - level.alpha) < level.masked
    return torch.where(masks, vocabulary.mask, draw_words(number, vocabulary))


def reverse(chance: Tensor, noised: Tensor, t: Level, s: Level, kappa: float, mask_id: int) -> tuple[Tensor, Tensor]:
    """The probabilities that on the way from x_t to x_s a token remains, and that what is predicted comes, both [...];
    else it becomes noise of s (`fresh`). The three may be the same token.

    kappa is the share of the posterior q(x_s | x_t, prediction), of which the token is x_s already with the probability
    `stays`; the rest draws x_0 and noise on it anew: the token is x_0 with the probability `was` (Psi-samplers).

    Args:
        chance: [...], what is predicted of the token that stands there, its own place left out.
    """
    whole = t.noise(noised, mask_id) + t.alpha * chance
    was = t.alpha * chance / whole
    stays = t.alpha / s.alpha * (s.noise(noised, mask_id) + s.alpha * chance) / whole
    remains = kappa * stays + (1 - kappa) * was * s.alpha
    return remains, (kappa * (1 - stays) + (1 - kappa) * (1 - was)) * s.alpha


def is_word(vocabulary: Vocabulary, device: torch.device) -> Tensor:
    """[V] bool: the ids that are not reserved."""
    words = torch.ones(vocabulary.size, dtype=torch.bool, device=device)
    for reserved in vocabulary.reserved:
        words[reserved] = False
    return words


def of_words(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Logits [..., V] of the words alone: those of reserved ids are -inf."""
    kept = logits.clone()
    for reserved in vocabulary.reserved:
        kept[..., reserved] = -torch.inf
    return kept


def leave_one_out(logits: Tensor, noised: Tensor, level: Level, mask_id: int) -> Tensor:
    """Logits [..., V] of p(x_0 | x_t but for this place) from those of p(x_0 | x_t): divided by q(x_t | x_0)."""
    return _weigh(logits, noised, level, mask_id, -1)


def posterior(logits: Tensor, noised: Tensor, level: Level, mask_id: int) -> Tensor:
    """Logits [..., V] of p(x_0 | x_t) from those of p(x_0 | x_t but for this place)."""
    return _weigh(logits, noised, level, mask_id, 1)


def _weigh(logits: Tensor, noised: Tensor, level: Level, mask_id: int, power: int) -> Tensor:
    """q(x_t | x_0 = y) is (alpha + uniform) / uniform times as large for y = x_t; a mask says nothing of it."""
    own = power * F.softplus(level.log_odds.to(logits.dtype)) * (noised != mask_id)
    return logits.scatter_add(-1, noised[..., None], own[..., None].to(logits.dtype))
