"""Feed-forwards: SwiGLU (Shazeer, arXiv:2002.05202) of Llama, Qwen and LLaDA, and GPT-2's and MDLM's with GELU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dmllm.nn.fused import Packed, project, swiglu


class FeedForward(nn.Module):
    """Rows [..., width] -> [..., width] through silu(gate) * up of `inner` features."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self._packed: Packed | None = None

    def pack(self) -> None:
        """One product in place of two, for decoding."""
        self._packed = Packed(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*project(self._packed, x, self.gate_proj, self.up_proj)))


class GELUFeedForward(nn.Module):
    """Rows [..., width] -> [..., width] through GELU (its tanh form) of `inner` features, with biases."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
