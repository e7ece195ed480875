"""The space in which tokens are vectors that noise moves continuously: into the stream, and back.

    ids --vectors--> x --noise--> z --enter--> rows of the stream ... hidden rows --> x-hat --nearest vector--> ids

Vectors have a table of their own, narrower than the stream: among many features noise hides nothing until there is a
lot of it. They are learned; held to one length they cannot shrink away from the noise, which the loss would reward.
x-hat is either regressed from the hidden row (DiffuSeq), or what the logits expect, softmax(logits) @ vectors (Plaid).
With self-conditioning the last x-hat enters beside z, through weights that start at zero.

Sources: Li et al., Diffusion-LM, arXiv:2205.14217; Gong et al., DiffuSeq, arXiv:2210.08933; Gulrajani and Hashimoto,
Plaid, arXiv:2305.18619; self-conditioning, Chen et al., arXiv:2208.04202; a chain for each position, Yuan et al.,
SeqDiffuSeq, arXiv:2212.10325. Time: t = 0 is clean, t = 1 is noise.
Shapes: V vocabulary, d features of a vector, D hidden, T steps, P positions, K bins of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmllm.diffusion.gaussian import GAUSSIAN_SCHEDULES, GaussianSchedule, Level, evened, of_log_snr

NAME = "latent"


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The space, and what noise does in it."""

    width: int = 32
    """d."""
    schedule: str = "linear"
    """How noise grows with time, a name of `GAUSSIAN_SCHEDULES`."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Its options."""
    regresses: bool = False
    """Whether x-hat is a row of its own (DiffuSeq); False: what the logits expect (Plaid)."""
    self_conditioning: bool = False
    """Whether the last x-hat enters beside z."""
    normalised: bool = True
    """Whether all vectors have the length sqrt(d); False leaves it to the loss to keep them apart."""
    positions: int = 0
    """How many of an answer's first positions have a chain of their own, which is refit to their losses; the rest
    have the last one's. 0: all have the schedule's."""
    steps: int = 2000
    """T, the times of such a chain."""
    bins: int = 100
    """K, in which its losses are collected; a divisor of `steps`."""

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("positions", 0), ("steps", 1), ("bins", 2)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}.")
        if self.steps % self.bins:
            raise ValueError(f"bins={self.bins} does not divide steps={self.steps}; 100 bins of 2000 steps are usual.")
        GAUSSIAN_SCHEDULES.load(self.schedule)(**self.schedule_options)


class Chains(nn.Module):
    """Noise levels at T times for each of the first P positions, which follow the losses: state, not weights."""

    log_snr: Tensor  # [T, P], which tells apart what is nearly clean, in any precision
    losses: Tensor  # [K, P], summed since the last refit
    counts: Tensor  # [K, P], how many these are
    refit_at: Tensor  # the training step of the last one

    def __init__(self, steps: int, positions: int, bins: int):
        super().__init__()
        self.steps, self.positions, self.bins = steps, positions, bins
        self.register_buffer("log_snr", torch.zeros(steps, positions))
        self.register_buffer("losses", torch.zeros(bins, positions))
        self.register_buffer("counts", torch.zeros(bins, positions))
        self.register_buffer("refit_at", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def begin(self, schedule: GaussianSchedule) -> None:
        """All positions as the schedule has them."""
        times = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        self.log_snr.copy_(schedule.level(times).snr.log()[:, None].expand_as(self.log_snr))
        self._forget()

    def level(self, t: Tensor, places: Tensor) -> Level:
        """Between the times of the chain on a straight line of log SNR; at t = 0 there is no noise."""
        at, places = t * self.steps - 1, places.clamp(max=self.positions - 1)
        low = at.floor().long().clamp(0, self.steps - 1)
        high = (low + 1).clamp(max=self.steps - 1)
        found = torch.lerp(
            self.log_snr[low, places].float(), self.log_snr[high, places].float(), (at - low).clamp(0, 1)
        )
        return of_log_snr(torch.where(t > 0, found, torch.inf))

    @torch.no_grad()
    def remember(self, t: Tensor, places: Tensor, losses: Tensor) -> None:
        """Losses [N] at times t [N] and places [N], by which the chains will be refit."""
        step = (t * self.steps).round().long().clamp(1, self.steps) - 1
        index = step // (self.steps // self.bins), places.clamp(max=self.positions - 1)
        self.losses.index_put_(index, losses.to(self.losses.dtype), accumulate=True)
        self.counts.index_put_(index, torch.ones_like(losses, dtype=self.counts.dtype), accumulate=True)

    @torch.no_grad()
    def refit(self, step: int, stride: int) -> None:
        """Every `stride` steps from the third time on, and once in a step: chains under which losses rise evenly."""
        if step < 3 * stride or step % stride or int(self.refit_at) == step:
            return
        found = evened(self.log_snr.double().sigmoid(), self.losses / self.counts)
        self.log_snr.copy_(found.logit())
        self.refit_at.fill_(step)
        self._forget()

    def _forget(self) -> None:
        """No losses but one in each bin, which rises with time, so that what is never seen stays as it is."""
        self.losses.copy_(torch.linspace(0, 0.5, self.bins)[:, None].expand_as(self.losses))
        self.counts.fill_(1)


class Latent(nn.Module):
    """A head that says x-hat, with the table of vectors and the way into the stream."""

    def __init__(self, config: LatentConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.config, self.width = config, config.width
        self.schedule = GAUSSIAN_SCHEDULES.load(config.schedule)(**config.schedule_options)
        self.table = nn.Embedding(vocab_size, config.width)
        self.enter_proj = nn.Linear(config.width, hidden_size)
        self.condition_proj = nn.Linear(config.width, hidden_size, bias=False) if config.self_conditioning else None
        self.leave_proj = nn.Linear(hidden_size, config.width) if config.regresses else None
        self.chains = Chains(config.steps, config.positions, config.bins) if config.positions else None

    @torch.no_grad()
    def initialise(self) -> None:
        """Random vectors and projections; what conditions on x-hat starts at zero."""
        nn.init.normal_(self.table.weight)
        for layer in (self.enter_proj, self.leave_proj):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
        if self.condition_proj is not None:
            nn.init.zeros_(self.condition_proj.weight)
        if self.chains is not None:
            self.chains.begin(self.schedule)

    @property
    def features(self) -> int:
        """Of a place on the canvas: of z and, with self-conditioning, of the last x-hat behind it."""
        return self.width * (2 if self.config.self_conditioning else 1)

    @property
    def head(self) -> str | None:
        """What a call is asked for: this head's x-hat, or None for logits."""
        return NAME if self.config.regresses else None

    def vectors(self) -> Tensor:
        """[V, d], in at least float32."""
        table = self.table.weight.float()
        return F.normalize(table, dim=-1) * math.sqrt(self.width) if self.config.normalised else table

    def enter(self, latents: Tensor) -> Tensor:
        """z, with self-conditioning z and x-hat, [..., features] -> rows of the stream [..., D]."""
        z, *x_hat = latents.to(self.enter_proj.weight.dtype).split(self.width, -1)
        rows = self.enter_proj(z)
        return rows if self.condition_proj is None else rows + self.condition_proj(x_hat[0])

    def forward(self, hidden: Tensor, backbone: Any) -> Tensor:
        """Hidden rows [..., D] -> x-hat [..., d]."""
        if self.leave_proj is not None:
            return self.leave_proj(hidden)
        return self.x_hat(backbone.unembed(hidden), self.vectors())

    def x_hat(self, said: Tensor, vectors: Tensor) -> Tensor:
        """[..., d], of what a call has said: x-hat itself, or logits [..., V]. `vectors` [V, d] are the space's."""
        return said.float() if self.config.regresses else said.float().softmax(-1) @ vectors

    def scores(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Logits [..., V] of the token that a vector [..., d] is: of its distances, as under noise of variance 1."""
        return x.float() @ vectors.T - vectors.square().sum(-1) / 2

    def read(self, said: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """What a call has said, x-hat or logits, as both: x-hat [..., d] and logits [..., V]."""
        return self.x_hat(said, vectors), self.scores(said, vectors) if self.config.regresses else said.float()

    def level(self, t: Tensor, places: Tensor) -> Level:
        """How noisy things are at times t [...] and `places` [...] within the answer, where these have their own."""
        return self.schedule.level(t) if self.chains is None else self.chains.level(t, places)


LATENT = (Latent, LatentConfig)
