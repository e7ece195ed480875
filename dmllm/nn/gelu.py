"""GELU that rounds alike whatever the number of CPU threads.

torch cuts a tensor of more than `GRAIN` elements into one part a thread, and the last few elements of a part, which its
vector kernel does not reach, are rounded otherwise than the rest. Such a last bit is nothing, but a model with sharp
attention makes 1e-3 of it in its logits, so that a result recorded with another number of threads is not met.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRAIN = 16384  # torch computes a GELU of no more elements in one thread; a multiple of every vector's length


class SteadyGELU(nn.Module):
    """GELU in float32 on a CPU as `parts` threads compute it, and plainly elsewhere.

    Args:
        approximate: none or tanh, as `torch.nn.functional.gelu` takes it.
        parts: the number of threads whose rounding it has.
    """

    def __init__(self, approximate: str = "none", parts: int = 1):
        super().__init__()
        self.approximate, self.parts = approximate, parts

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel()
        if x.device.type != "cpu" or x.dtype != torch.float32 or count <= GRAIN:
            return F.gelu(x, approximate=self.approximate)
        parts = x.flatten().split(-(-count // self.parts))
        pieces = (piece for part in parts for piece in part.split(GRAIN))
        return torch.cat([F.gelu(piece, approximate=self.approximate) for piece in pieces]).view(x.shape)
