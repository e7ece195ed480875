"""Multi-token prediction: heads that say, beside the next token, the ones behind it, all from the same hidden row.

Each head is a residual feed-forward of its own in front of the model's vocabulary projection, which all share. It sees
no other row, so that it can be asked at any row alone, as drafting asks it. (Meta's heads are whole layers; the linear
heads that they compare are simpler.) Heads start as copies of what the model says of the next token.

Sources: Gloeckle et al., arXiv:2404.19737, section 2; heads without attention: Cai et al., Medusa, arXiv:2401.10774.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmllm.nn.feed_forward import FeedForward
from dmllm.nn.norms import RMSNorm


@dataclass(frozen=True, kw_only=True)
class MultiTokenConfig:
    """How far ahead is looked."""

    n: int
    """Tokens that each row predicts, the next one included, which needs no head."""
    intermediate_size: int | None = None
    """Inner features of each head; None is twice the hidden size."""
    initializer_range: float = 0.02
    """Standard deviation of the first weights; the last ones start at zero."""

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 2:
            raise ValueError(f"n={self.n!r} must be a whole number, at least 2; without heads one token is predicted.")


class MultiToken(nn.Module):
    """`module(hidden [..., D], backbone)` -> logits [..., n - 1, V] of the tokens behind the next, nearest first."""

    def __init__(self, config: MultiTokenConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.config = config
        inner = config.intermediate_size or 2 * hidden_size
        self.norms = nn.ModuleList(RMSNorm(hidden_size) for _ in range(config.n - 1))
        self.layers = nn.ModuleList(FeedForward(hidden_size, inner) for _ in range(config.n - 1))

    def forward(self, hidden: Tensor, backbone: Any) -> Tensor:
        rows = [hidden + layer(norm(hidden)) for norm, layer in zip(self.norms, self.layers, strict=True)]
        return backbone.unembed(torch.stack(rows, -2))

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights, each head's last layer zero."""
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                nn.init.ones_(weight)
            elif "down_proj" in name:
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=self.config.initializer_range)


MTP = (MultiToken, MultiTokenConfig)
