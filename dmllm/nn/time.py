"""The time of a row as a vector that is added to the stream, for models that are told how noisy their canvas is.

Source: the sinusoids of Vaswani et al., arXiv:1706.03762, section 3.5, over time as Ho et al. (DDPM, arXiv:2006.11239)
have them. Time: t = 0 is clean, t = 1 is noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 128  # wavelengths, from 2 pi / SCALE of the unit of time to 10000 times as long
SCALE = 1000.0  # so that the shortest wavelength tells a hundredth of the unit apart


class TimeEmbedding(nn.Module):
    """t [...] in [0, 1] -> [..., D]. Its last layer starts at zero, so a model that is given one stays as it is."""

    def __init__(self, width: int):
        super().__init__()
        self.up_proj = nn.Linear(2 * FREQUENCIES, width)
        self.down_proj = nn.Linear(width, width)

    def initialise(self, std: float) -> None:
        """Random weights in front of the zeros."""
        nn.init.normal_(self.up_proj.weight, std=std)
        for zeros in (self.up_proj.bias, self.down_proj.weight, self.down_proj.bias):
            nn.init.zeros_(zeros)

    def forward(self, time: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) / FREQUENCIES * torch.arange(FREQUENCIES, device=time.device))
        angle = SCALE * time[..., None].float() * frequency
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.up_proj.weight.dtype)
        return self.down_proj(F.silu(self.up_proj(waves)))
