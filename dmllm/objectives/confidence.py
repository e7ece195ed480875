"""Confidence: beside being right, be sure where you are right, so that many tokens may be committed in one call.

    answer by answer, the mean entropy of p^(1/T) over the hidden tokens whose most probable word is the right one

added to the loss with a coefficient. What is predicted wrongly has no part in it: to be sure of that would be no gain.
Answers count alike, however many of their tokens are right (one that has none counts 0), so that the divisor is known
before the model is called and the split into micro-batches never matters.

Sources: confidence-aware parallel training of LLaDA2.0, arXiv:2512.15745; certainty-forcing distillation of dParallel,
arXiv:2509.26488 (T = 0.5, coefficient 2, a text a micro-batch). Shapes: N hidden tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.types import LossSum

LEAST = -1e4  # of a logarithm: its exponential is 0, and so is their product


def confidence_loss(logits: Tensor, targets: Tensor, answers: Tensor, count: Tensor, temperature: float) -> LossSum:
    """logits [N, V], targets [N], answers [N] (which one each token is of, below N), count of answers -> their sum."""
    logits = logits.float()
    right = (logits.argmax(-1) == targets).float()
    log_probs = (logits / temperature).log_softmax(-1).clamp(min=LEAST)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    sums, numbers = (torch.zeros_like(right).index_add(0, answers, x) for x in (entropy * right, right))
    return LossSum(total=(sums / numbers.clamp(min=1)).sum(), count=count)


def number_answers(documents: Tensor, views: int) -> list[Tensor]:
    """For each view of a batch [B, L] int64: which answer each row is of, a number for each document of each row."""
    width = max(int(documents.max()) + 1, 1)
    first = documents.clamp(min=0) + width * torch.arange(len(documents), device=documents.device)[:, None]
    return [first + view * width * len(documents) for view in range(views)]
