"""Noise schedules: how much of the data is still there at time t.

t = 0 is clean and t = 1 is noise, everywhere. `alpha(t)` is the probability that a token is kept; from it follow the
noise probability 1 - alpha and the weight -alpha' / (1 - alpha) that makes a masked cross-entropy a bound on the
negative log-likelihood (Sahoo et al., MDLM, arXiv:2406.07524, equation 11; Shi et al., MD4, arXiv:2406.04329).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmllm.registry import Table


class NoiseSchedule(Protocol):
    """alpha(0) = 1, alpha(1) = 0, decreasing."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def alpha_prime(self, t: Tensor) -> Tensor: ...

    def time(self, noise_prob: Tensor) -> Tensor:
        """The t at which the noise probability is `noise_prob`."""
        ...


@dataclass(frozen=True)
class Linear:
    """alpha = 1 - t; weight 1/t: LLaDA (arXiv:2502.09992, equation 3), MDLM's log-linear schedule."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def time(self, noise_prob: Tensor) -> Tensor:
        return noise_prob


@dataclass(frozen=True)
class Cosine:
    """alpha = 1 - cos(pi/2 (1 - t)); weight (pi/2) tan(pi/2 (1 - t)): MaskGIT's schedule (arXiv:2202.04200)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def time(self, noise_prob: Tensor) -> Tensor:
        return 1 - 2 / math.pi * torch.acos(noise_prob)


@dataclass(frozen=True)
class Polynomial:
    """alpha = 1 - t^power; weight power / t (MD4, arXiv:2406.04329, table 1)."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"power={self.power} must be positive; 1 is the linear schedule.")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -self.power * t ** (self.power - 1)

    def time(self, noise_prob: Tensor) -> Tensor:
        return noise_prob ** (1 / self.power)


@dataclass(frozen=True)
class Concave:
    """alpha = (1 - t)^power; weight power (1 - t)^(power - 1) / (1 - alpha): MaskGIT's square, cubic, ... (table 3)."""

    power: float = 2.0

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) ** self.power

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -self.power * (1 - t) ** (self.power - 1)

    def time(self, noise_prob: Tensor) -> Tensor:
        return 1 - (1 - noise_prob) ** (1 / self.power)


@dataclass(frozen=True)
class Cubic(Concave):
    """alpha = (1 - t)^3."""

    power: float = 3.0


@dataclass(frozen=True)
class Sigmoid:
    """What is masked rises as a sigmoid over [-width, width] does (Chen, arXiv:2301.10972; 3 in Show-o and MMaDA)."""

    width: float = 3.0

    def alpha(self, t: Tensor) -> Tensor:
        low, high = (torch.sigmoid(torch.tensor(end)) for end in (-self.width, self.width))
        return (torch.sigmoid(self.width * (1 - 2 * t)) - low) / (high - low)

    def alpha_prime(self, t: Tensor) -> Tensor:
        low, high = (torch.sigmoid(torch.tensor(end)) for end in (-self.width, self.width))
        value = torch.sigmoid(self.width * (1 - 2 * t))
        return -2 * self.width * value * (1 - value) / (high - low)

    def time(self, noise_prob: Tensor) -> Tensor:
        low, high = (torch.sigmoid(torch.tensor(end)) for end in (-self.width, self.width))
        return (1 - torch.logit(low + (1 - noise_prob) * (high - low)) / self.width) / 2


SCHEDULES = Table(
    "noise schedule",
    {
        "linear": "dmllm.diffusion.schedules:Linear",
        "cosine": "dmllm.diffusion.schedules:Cosine",
        "polynomial": "dmllm.diffusion.schedules:Polynomial",
        "square": "dmllm.diffusion.schedules:Concave",
        "cubic": "dmllm.diffusion.schedules:Cubic",
        "sigmoid": "dmllm.diffusion.schedules:Sigmoid",
    },
)


def elbo_weight(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """-alpha'(t) / (1 - alpha(t)): each noised token's weight in the bound."""
    return -schedule.alpha_prime(t) / (1 - schedule.alpha(t))
