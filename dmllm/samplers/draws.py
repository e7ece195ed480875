"""Random numbers of decoding: each row's own, so that it draws what it would draw alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def numbers(draws: list[Generator], count: int, device: torch.device) -> Tensor:
    """`count` numbers from each row's generator, [B, count] float64 in [0, 1); the host waits for nothing."""
    found = torch.stack([torch.rand(count, generator=g, dtype=torch.float64, device=g.device) for g in draws])
    return found if found.device == device else found.pin_memory().to(device, non_blocking=True)
