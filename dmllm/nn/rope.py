"""Rotary positions (Su et al., arXiv:2104.09864) in the rotate-half form that Llama, Qwen and LLaDA weights expect."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, sections: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [B, 1, L, head_dim], for positions [B, L]; computed in float32, once per forward.

    Positions [A, B, L] say time, height and width in their last three axes; `sections` says how many of the
    head_dim / 2 frequencies each of these turns (Qwen2-VL's M-RoPE, arXiv:2409.12191, section 2.1).
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequency = 1.0 / theta**exponent  # rounded as in the code that published models were trained with
    angle = positions[..., None].float() * frequency  # [B, L, head_dim / 2]
    if positions.ndim == 3:
        angle = torch.cat([part[axis] for axis, part in enumerate(angle[-3:].split(sections, -1))], -1)
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


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
