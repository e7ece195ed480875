"""Rotary positions (Su et al., arXiv:2104.09864) in the rotate-half form that Llama, Qwen and LLaDA weights expect."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [B, 1, L, head_dim], for positions [B, L]; computed in float32, once per forward."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequency = 1.0 / theta**exponent  # rounded as in the code that published models were trained with
    angle = positions[..., None].float() * frequency  # [B, L, head_dim / 2]
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, L, head_dim] turned by their positions, in as many leading features as the tables have."""
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        return torch.cat([rotate(turned, cos, sin), rest], -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
