"""Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

from torch import Tensor, nn

from dmllm.nn.fused import rms_norm


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` whose weight follows the input's dtype, so that the fused kernel also runs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)
