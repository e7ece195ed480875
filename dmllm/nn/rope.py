"""Rotary positions (Su et al., arXiv:2104.09864) in the rotate-half form that Llama, Qwen and LLaDA weights expect."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Longer wavelengths for more positions than a model began with (Llama 3.1, arXiv:2407.21783).

    A wave that turns fewer than `low_freq_factor` times within the old positions turns `factor` times slower, one that
    turns more than `high_freq_factor` times as before, those between in proportion to how often they turn.
    """

    factor: float
    """How many times longer the longest waves become."""
    low_freq_factor: float
    """Turns within the old positions up to which the whole factor holds."""
    high_freq_factor: float
    """Turns from which none of it does."""
    original_max_position_embeddings: int
    """The old positions."""

    def __post_init__(self) -> None:
        above = min(self.factor, self.original_max_position_embeddings) > 0
        if not above or self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"{self}: factor and positions must be above 0, low_freq_factor below high_freq_factor.")

    def __call__(self, frequency: Tensor) -> Tensor:
        """Radians a position -> the same, stretched."""
        turns = self.original_max_position_embeddings / (2 * math.pi / frequency)  # rounded as in their code
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


def rotary_tables(
    positions: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    sections: tuple[int, ...] = (),
    interleaved: bool = False,
    stretch: Stretch | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [B, 1, L, head_dim], for positions [B, L]; computed in float32, once per forward.

    Positions [A, B, L] say time, height and width in their last three axes; `sections` says how many of the
    head_dim / 2 frequencies each of these turns (Qwen2-VL's M-RoPE, arXiv:2409.12191, section 2.1), one after another
    or, `interleaved`, in turns, so that each turns slow and fast ones (Qwen3-VL, arXiv:2511.21631).
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequency = 1.0 / theta**exponent  # rounded as in the code that published models were trained with
    frequency = frequency if stretch is None else stretch(frequency)
    angle = positions[..., None].float() * frequency  # [B, L, head_dim / 2]
    if positions.ndim == 3:
        axes = _axes(sections, interleaved, positions.device)
        angle = angle[-3:].gather(0, axes.expand(1, *angle.shape[1:]))[0]
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _axes(sections: tuple[int, ...], interleaved: bool, device: torch.device) -> Tensor:
    """Which axis turns each frequency: 0 time, 1 height, 2 width.

    Interleaved, height and width have every third frequency from their own number on, as far as their sections reach;
    time has all others.
    """
    axes = torch.zeros(sum(sections), dtype=torch.int64, device=device)
    time, height, _ = sections
    axes[slice(1, 3 * height, 3) if interleaved else slice(time, time + height)] = 1
    axes[slice(2, 3 * sections[2], 3) if interleaved else slice(time + height, None)] = 2
    return axes


def places(positions: Tensor) -> Tensor:
    """Each row's place in its document [B, L], out of positions [B, L], [4, B, L] (the place, then time, height and
    width) or [3, B, L] (without it: rows are taken to be laid out in order)."""
    if positions.ndim == 2:
        return positions
    order = torch.arange(positions.shape[2], device=positions.device)
    return positions[0] if len(positions) == 4 else order.expand(positions.shape[1:])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, L, head_dim] turned by their positions, in as many leading features as the tables have."""
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        return torch.cat([rotate(turned, cos, sin), rest], -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
