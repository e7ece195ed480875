"""How many tokens are missing behind a row: the head of any-length diffusion.

It says the logarithm of the number to be expected, which starts at 0: one token in every gap.
Source: Kim et al., FlexMDM, arXiv:2509.01025, section 4.2; its code has a softplus in place of the exponential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class MissingConfig:
    """The head's size."""

    intermediate_size: int | None = None
    """Inner features; None is the hidden size."""
    initializer_range: float = 0.02
    """Standard deviation of the first weights; the last ones start at zero."""


class Missing(nn.Module):
    """`module(hidden [..., D], backbone)` -> log of the expected number, [...]."""

    def __init__(self, config: MissingConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.config = config
        inner = config.intermediate_size or hidden_size
        self.up_proj = nn.Linear(hidden_size, inner)
        self.down_proj = nn.Linear(inner, 1)

    def forward(self, hidden: Tensor, backbone: Any) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(hidden))).squeeze(-1)

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights in front of zeros."""
        nn.init.normal_(self.up_proj.weight, std=self.config.initializer_range)
        for zeros in (self.up_proj.bias, self.down_proj.weight, self.down_proj.bias):
            nn.init.zeros_(zeros)


MISSING = (Missing, MissingConfig)
