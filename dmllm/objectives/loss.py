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

from dmllm.types import IGNORE, PADDING, LossSum

REDUCTIONS = ("tokens", "batch_length", "answer_length", "masked")


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, count: Tensor) -> LossSum:
    """logits [N, V], targets [N], weights [N] -> sum(weights * CE) and its count, in float32."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return LossSum(total=(losses * weights).sum(), count=count)


def normalise(
    reduction: str, weights: Tensor, share: Tensor, hidden: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights [B, L] with shares and per-answer divisors put in, and the count that remains to be divided by.

    Args:
        reduction: a name of REDUCTIONS.
        weights: [B, L], each token's weight if hidden.
        share: [B, L] float, as how many tokens each counts: 0 without a label, else 1 (or see `padding_as_one`).
        hidden: [B, L] bool, the tokens that are noised.
        documents: [B, L]; in one row, each document holds one answer (or one conversation).
    """
    if reduction == "tokens":
        return weights * share, share.sum()
    if reduction == "masked":
        return weights * share, (share * hidden).sum()
    if reduction == "batch_length":
        return weights * share, (documents != PADDING).sum().float()
    if reduction == "answer_length":
        lengths = per_document(share, documents)  # [B, documents]
        divisor = lengths.gather(1, documents.clamp(min=0))
        return weights * share / divisor.clamp(min=1), (lengths > 0).sum().float()
    raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}.")


def padding_as_one(labels: Tensor, documents: Tensor, eos: int) -> Tensor:
    """Shares [B, L] in which the end tokens behind an answer's first end token count as one token together."""
    follows = (labels[:, 1:] == eos) & (labels[:, :-1] == eos) & (documents[:, 1:] == documents[:, :-1])
    padding = torch.cat([torch.zeros_like(follows[:, :1]), follows], 1)
    run = per_document(padding.float(), documents).gather(1, documents.clamp(min=0))
    return torch.where(padding, 1 / run.clamp(min=1), (labels != IGNORE).float())


def per_document(values: Tensor, documents: Tensor) -> Tensor:
    """Sums of values [B, L] over each document, [B, D] float32, D the greatest number of documents in a row."""
    width = max(int(documents.max()) + 1, 1)
    sums = torch.zeros(documents.shape[0], width, device=documents.device)
    return sums.scatter_add_(1, documents.clamp(min=0), values)
