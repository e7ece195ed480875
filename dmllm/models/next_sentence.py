"""Next-sentence prediction: whether the second part of a text belongs to the first, said by one row that sees both.

Source: Devlin et al., BERT, arXiv:1810.04805, section 3.1 and its code: a dense layer, tanh, and a linear classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class NextSentenceConfig:
    """Nothing but how it begins."""

    initializer_range: float = 0.02
    """Standard deviation of the first weights."""


class NextSentence(nn.Module):
    """`module(hidden [..., D], backbone)` -> logits [..., 2]: it belongs, or it is another's."""

    def __init__(self, config: NextSentenceConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.config = config
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, 2)

    def forward(self, hidden: Tensor, backbone: Any) -> Tensor:
        return self.classifier(torch.tanh(self.dense(hidden)))

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights, no biases."""
        for layer in (self.dense, self.classifier):
            nn.init.normal_(layer.weight, std=self.config.initializer_range)
            nn.init.zeros_(layer.bias)


NEXT_SENTENCE = (NextSentence, NextSentenceConfig)
