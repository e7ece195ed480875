"""Finite scalar quantisation: each feature of a latent vector is rounded to one of a few levels, and that is the code.

There is no table to learn, so none that can fall out of use, and no loss besides that of the picture. Feature i has
`levels[i]` values, evenly spaced in [-1, 1]; a code counts them, the first feature fastest:

    code = sum_i  (value_i * (L_i // 2) + L_i // 2) * L_1 * ... * L_(i-1)

Source: Mentzer et al., arXiv:2309.15505 (section 3; five levels or more each; gradients pass the rounding straight).
The nets are small on purpose: pictures are cut into patches first, so that no convolution runs at full size.
Shapes: B pictures, C channels, D features, rows x cols codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmllm.config import to_dict
from dmllm.models.image_tokenizers.tokenizer import ImageTokenizer, Quantised
from dmllm.registry import nearest

SLACK = 1e-3  # how far the outermost level's rounding interval is left open, in levels per level


@dataclass(frozen=True, kw_only=True)
class FsqConfig:
    """Levels and nets."""

    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Values of each feature; their product is the number of codes. (8, 6, 5) has 240, (8, 8, 8, 6, 5) 15360."""
    channels: tuple[int, ...] = (64, 128)
    """Channels of each stage; each but the first halves the sides."""
    depth: int = 2
    """Residual blocks of a stage."""
    patch: int = 4
    """Pixels of a side that the first stage takes as one; `stride` is patch * 2^(stages - 1)."""
    num_groups: int = 8
    """Groups of channels that are normalised together."""

    def __post_init__(self) -> None:
        for name in ("levels", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels={self.levels}: each feature needs at least 2 values; try levels=(8, 5, 5, 5).")
        if not self.channels or any(c % self.num_groups for c in self.channels):
            raise ValueError(f"channels={self.channels} must each be a multiple of num_groups={self.num_groups}.")
        if self.patch < 1 or self.depth < 0:
            raise ValueError(f"patch={self.patch} must be positive and depth={self.depth} not negative.")


class FiniteScalar(nn.Module):
    """Rounding to levels, and codes of levels."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.num_codes = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels)[:, None, None], persistent=False)
        self.register_buffer("basis", torch.tensor(basis)[:, None, None], persistent=False)

    def forward(self, latents: Tensor) -> Quantised:
        """[B, D, rows, cols], any real numbers, to levels in [-1, 1]."""
        bounded = self.bound(latents)
        rounded = bounded + (bounded.round() - bounded).detach()
        values = rounded / (self.levels // 2)
        return Quantised(latents=values, codes=self.codes(values.detach()))

    def bound(self, latents: Tensor) -> Tensor:
        """Squashed so that rounding gives L whole numbers, from -(L // 2) on; 0 stays 0."""
        half = (self.levels - 1) * (1 + SLACK) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(latents + torch.atanh(offset / half)) * half - offset

    def codes(self, values: Tensor) -> Tensor:
        """Levels in [-1, 1], [B, D, rows, cols] -> codes [B, rows, cols] int64."""
        half = self.levels // 2
        return ((values.float() * half + half).round().long() * self.basis).sum(1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes [B, rows, cols] -> levels in [-1, 1], [B, D, rows, cols]."""
        half = self.levels // 2
        return (codes[:, None] // self.basis % self.levels - half) / half


class Fsq(ImageTokenizer):
    """A small convolutional autoencoder around a finite scalar quantiser."""

    def __init__(self, config: FsqConfig):
        super().__init__()
        self.config = config
        self.quantiser = FiniteScalar(config.levels)
        self.num_codes = self.quantiser.num_codes
        self.stride = config.patch * 2 ** (len(config.channels) - 1)
        features, (first, *_), last = len(config.levels), config.channels, config.channels[-1]
        inner, outer = 3 * config.patch**2, list(zip(config.channels, config.channels[1:]))
        down: list[nn.Module] = [nn.PixelUnshuffle(config.patch), nn.Conv2d(inner, first, 3, padding=1)]
        for index, channels in enumerate(config.channels):
            down += [Residual(channels, config.num_groups) for _ in range(config.depth)]
            if index < len(outer):
                down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, outer[index][1], 1)]
        self.encoder = nn.Sequential(*down, *_ending(last, features, config.num_groups))
        up: list[nn.Module] = [nn.Conv2d(features, last, 3, padding=1)]
        for index, channels in reversed(list(enumerate(config.channels))):
            up += [Residual(channels, config.num_groups) for _ in range(config.depth)]
            if index > 0:
                up += [nn.Conv2d(channels, 4 * config.channels[index - 1], 1), nn.PixelShuffle(2)]
        self.decoder = nn.Sequential(*up, *_ending(first, inner, config.num_groups), nn.PixelShuffle(config.patch))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Fsq:
        """Fields of `FsqConfig`."""
        for name in fields:
            if name not in FIELDS:
                raise ValueError(f"fsq has no field {name!r}; {nearest(name, FIELDS)}")
        return cls(FsqConfig(**fields))

    def fields(self) -> dict[str, Any]:
        return to_dict(self.config)

    def to_latents(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)

    def quantise(self, latents: Tensor) -> Quantised:
        return self.quantiser(latents)

    def from_codes(self, codes: Tensor) -> Tensor:
        return self.quantiser.vectors(codes).to(next(self.parameters()).dtype)

    def to_pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


FIELDS = [f.name for f in fields(FsqConfig)]


class Residual(nn.Module):
    """Twice norm, SiLU and convolution, added to what came in; begins as the identity."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(num_groups, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def _ending(channels: int, features: int, num_groups: int) -> list[nn.Module]:
    return [nn.GroupNorm(num_groups, channels), nn.SiLU(), nn.Conv2d(channels, features, 3, padding=1)]
