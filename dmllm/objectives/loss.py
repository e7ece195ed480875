"""The one loss: sum(weight * cross_entropy) over the rows asked for, divided later by a global count.

Which count is the `reduction`, named after what each published system divides by; they are not interchangeable:

    tokens         sum(w CE) / number of scorable tokens               MDLM (arXiv:2406.07524), dLLM
    batch_length   sum(w CE) / number of rows, prompt included         LLaDA pre-training (arXiv:2502.09992)
    answer_length  mean over answers of sum(w CE) / answer length      LLaDA and LLaDA-V fine-tuning, MMaDA
    masked         sum(w CE) / number of masked tokens                 LaViDa, Dimple, LLaDA2 (not a bound)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.types import PADDING, LossSum

REDUCTIONS = ("tokens", "batch_length", "answer_length", "masked")


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, count: Tensor) -> LossSum:
    """logits [N, V], targets [N], weights [N] -> sum(weights * CE) and its count, in float32."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return LossSum(total=(losses * weights).sum(), count=count)


def normalise(
    reduction: str, weights: Tensor, scorable: Tensor, hidden: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights [B, L] with per-answer divisors put in, and the count that remains to be divided by, a scalar.

    Args:
        reduction: a name of REDUCTIONS.
        weights: [B, L], each token's weight if hidden.
        scorable: [B, L] bool, tokens with a label; hidden: those that are noised.
        documents: [B, L]; in one row, each document holds one answer (or one conversation).
    """
    if reduction == "tokens":
        return weights, scorable.sum().float()
    if reduction == "masked":
        return weights, hidden.sum().float()
    if reduction == "batch_length":
        return weights, (documents != PADDING).sum().float()
    if reduction == "answer_length":
        lengths = answer_lengths(scorable, documents)  # [B, documents]
        per_row = lengths.gather(1, documents.clamp(min=0))
        return weights / per_row.clamp(min=1), (lengths > 0).sum().float()
    raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}.")


def answer_lengths(scorable: Tensor, documents: Tensor) -> Tensor:
    """Scorable tokens of each document, [B, D] float32, D the greatest number of documents in a row."""
    width = max(int(documents.max()) + 1, 1)
    lengths = torch.zeros(documents.shape[0], width, device=documents.device)
    return lengths.scatter_add_(1, documents.clamp(min=0), scorable.float())
