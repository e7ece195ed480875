"""The projection onto the vocabulary, a few of its rows at a time.

Its matrix is larger than a processor's cache. As one float32 product it is rearranged as a whole before it is used, and
so travels to memory and back; in slices that stay in the cache each travels once. The numbers are the same to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AT_ONCE = 1 << 20  # numbers of the matrix, 4 MB


class Unembedding(nn.Linear):
    """`nn.Linear` [..., D] -> [..., V] without a bias, whose float32 product on a CPU is made in slices; where
    gradients are wanted, or anything else is at work (autocast, another dtype), as ever."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        rows, weight = input.flatten(0, -2), self.weight
        slices = max(AT_ONCE // weight.shape[1], 1)
        plain = rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32
        plain = plain and type(input) is Tensor and type(weight) in (nn.Parameter, Tensor)
        if not plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or len(weight) <= slices:
            return super().forward(input)
        out = rows.new_empty(len(rows), len(weight))
        for start in range(0, len(weight), slices):
            part = slice(start, start + slices)
            torch.mm(rows, weight[part].t(), out=out[:, part])
        return out.unflatten(0, input.shape[:-1])


def unembed(head: nn.Linear, hidden: Tensor, words: tuple[int, int] | None = None) -> Tensor:
    """`head(hidden)`, [..., D] -> [..., V]; or its columns from the first of `words` to before the last, of which alone
    the rows of the matrix are read."""
    if words is None or words == (0, head.out_features):
        return head(hidden)
    first, end = words
    bias = None if head.bias is None else head.bias[first:end]
    return F.linear(hidden, head.weight[first:end], bias)
