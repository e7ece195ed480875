"""Gaussian corruption of vectors: z_t = signal(t) x + noise(t) eps, and the ways back from z_t to z_s given an x-hat.

    sqrt      variance preserving, signal^2 = (1 - sqrt(t + 1e-4)) / 0.99    Diffusion-LM (arXiv:2205.14217), DiffuSeq
    cosine    variance preserving, signal = cos of a straight angle          Nichol and Dhariwal, arXiv:2102.09672
    log_snr   variance preserving, log(signal^2 / noise^2) a straight line   VDM (arXiv:2107.00630), Plaid
    linear    z = (1 - t) x + t eps, the path of flow matching               arXiv:2209.03003, arXiv:2210.02747

The ways back hold for each of them: the posterior q(z_s | z_t, x) (DDPM, arXiv:2006.11239, equation 7), the
deterministic one with the same marginals (DDIM, arXiv:2010.02502, equation 12), Euler's along dz/dt (linear alone).
Time: t = 0 is clean, t = 1 is noise; s < t. Shapes: times [...], vectors [..., d].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dmllm.registry import Table


class Level(NamedTuple):
    """How noisy something is: the factors of x and of eps in z, of one shape."""

    signal: Tensor
    noise: Tensor

    @property
    def snr(self) -> Tensor:
        """signal^2 / noise^2."""
        return (self.signal / self.noise).square()

    def each(self) -> Level:
        """The same for every feature of a vector: [..., 1]."""
        return Level(self.signal[..., None], self.noise[..., None])

    def mix(self, x: Tensor, eps: Tensor) -> Tensor:
        """z, of vectors x and eps [..., d]."""
        signal, noise = self.each()
        return signal * x + noise * eps


class GaussianSchedule(Protocol):
    """Signal falls, and signal to noise falls, with time."""

    def level(self, t: Tensor) -> Level: ...


@dataclass(frozen=True)
class Sqrt:
    """Diffusion-LM's: noise comes fast at the beginning, for a word is its vector's nearest however little it moves."""

    steps: int = 2000
    """T of the discrete chain of the papers, whose step i = 1 ... T is t = i / T; it decides on what is left at t = 1
    alone, as beta is at most 0.999 there."""
    offset: float = 1e-4
    """Of the time under the root."""

    def alpha_bar(self, t: Tensor) -> Tensor:
        """signal^2."""
        whole = 1 - math.sqrt(self.offset)
        last = 1 - math.sqrt(1 - 1 / self.steps + self.offset)
        return ((1 - (t + self.offset).sqrt()) / whole).clamp((1 - 0.999) * last / whole, 1)

    def level(self, t: Tensor) -> Level:
        return preserving(self.alpha_bar(t))


@dataclass(frozen=True)
class Cosine:
    """signal = cos(pi/2 (t + offset) / (1 + offset)), over its value at t = 0."""

    offset: float = 0.008

    def level(self, t: Tensor) -> Level:
        angle = math.pi / 2 / (1 + self.offset)
        signal = torch.cos(angle * (t + self.offset)) / math.cos(angle * self.offset)
        return Level(signal.clamp(0, 1), (1 - signal.square()).clamp(0, 1).sqrt())


@dataclass(frozen=True)
class LogSNR:
    """log SNR = -gamma(t), gamma a straight line from `gamma_min` to `gamma_max`; the ends are Plaid's first ones."""

    gamma_min: float = -3.0
    gamma_max: float = 6.0

    def __post_init__(self) -> None:
        if not self.gamma_min < self.gamma_max:
            raise ValueError(
                f"gamma_min={self.gamma_min} must lie below gamma_max={self.gamma_max}; -3 and 6 are usual."
            )

    def level(self, t: Tensor) -> Level:
        return of_log_snr(-(self.gamma_min + (self.gamma_max - self.gamma_min) * t))


@dataclass(frozen=True)
class Linear:
    """z = (1 - t) x + t eps."""

    def level(self, t: Tensor) -> Level:
        return Level(1 - t, t)


GAUSSIAN_SCHEDULES = Table(
    "Gaussian schedule",
    {
        "sqrt": "dmllm.diffusion.gaussian:Sqrt",
        "cosine": "dmllm.diffusion.gaussian:Cosine",
        "log_snr": "dmllm.diffusion.gaussian:LogSNR",
        "linear": "dmllm.diffusion.gaussian:Linear",
    },
)


def preserving(alpha_bar: Tensor) -> Level:
    """The level of a process that keeps the variance of its data at 1."""
    return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def of_log_snr(log_snr: Tensor) -> Level:
    """The same, by its log SNR, which tells apart what is nearly clean too."""
    return Level(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


def posterior(now: Level, then: Level) -> tuple[Tensor, Tensor, Tensor]:
    """q(z_s | z_t, x): the factors of x and of z_t in its mean, and its standard deviation.

    From a time `now` to an earlier one `then`. The mean's own signal is then.signal: c_x + c_z signal(t) = signal(s).
    """
    kept = now.signal / then.signal
    added = (now.noise.square() - (kept * then.noise).square()).clamp(min=0)  # variance that comes between s and t
    total = now.noise.square()
    return then.signal * added / total, kept * then.noise.square() / total, then.noise * (added / total).sqrt()


def ddpm(z: Tensor, x_hat: Tensor, now: Level, then: Level, eps: Tensor) -> Tensor:
    """A draw of z_s from the posterior, x-hat for x; eps is standard normal."""
    of_x, of_z, deviation = (c[..., None] for c in posterior(now, then))
    return of_x * x_hat + of_z * z + deviation * eps


def ddim(z: Tensor, x_hat: Tensor, now: Level, then: Level) -> Tensor:
    """z_s with the very eps that x-hat says is in z_t."""
    signal, noise = now.each()
    return then.mix(x_hat, (z - signal * x_hat) / noise)


def euler(z: Tensor, x_hat: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """A step along the velocity dz/dt = eps - x = (z - x) / t of the linear path; on it, it is DDIM's."""
    t, s = t[..., None], s[..., None]
    return z + (s - t) * (z - x_hat) / t


def vdm_weight(now: Level, then: Level) -> Tensor:
    """What |x - x-hat|^2 weighs, in nats, between t and s: half the difference of SNR (VDM, equation 14)."""
    return (then.snr - now.snr) / 2


def normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers of uniform ones in [0, 1) of 24 bits, none of them infinite."""
    return math.sqrt(2) * torch.erfinv(2 * uniform.double() + 2**-24 - 1).to(uniform.dtype)


def evened(alpha_bar: Tensor, losses: Tensor) -> Tensor:
    """A chain under which the loss rises in equal steps from one time to the next, position by position.

    Source: Yuan et al., SeqDiffuSeq, arXiv:2212.10325, section 4.2.

    Args:
        alpha_bar: [T, P] the chain at t = 1/T ... 1, falling.
        losses: [K, P] the mean loss in each of K bins of T / K times; made to rise where they do not.

    Returns:
        [T, P] float64, on the CPU.
    """
    old, loss = alpha_bar.double().cpu().numpy(), losses.double().cpu().numpy().copy()
    for k in range(1, len(loss)):
        loss[k] = np.maximum(loss[k], loss[k - 1] + 1e-5)
    loss = np.vstack([loss[:1] - (loss[1:2] - loss[:1]) / 2, loss, loss[-1:] + (loss[-1:] - loss[-2:-1]) / 2])
    means = old.reshape(len(losses), -1, old.shape[1]).mean(1)
    means = np.vstack([np.full_like(means[:1], old.max()), means, np.full_like(means[:1], old.min())])
    asked = np.linspace(loss[0] - 1e-5, loss[-1] + 1e-5, len(old))
    found = [np.interp(asked[:, p], loss[:, p], means[:, p]) for p in range(old.shape[1])]
    return torch.from_numpy(np.stack(found, 1))
