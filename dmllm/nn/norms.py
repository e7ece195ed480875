"""Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` whose weight follows the input's dtype, so that the fused kernel also runs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
