"""The absorbing ("masked") corruption process: a token is kept, or becomes the mask token.

q(x_t | x_0) keeps each token with probability alpha(t), independently (Austin et al., D3PM, arXiv:2107.03006, A.2.2).
The random numbers are an argument, so that the caller decides what they are keyed by.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hide(ids: Tensor, hidden: Tensor, mask_id: int) -> Tensor:
    """ids [...] with the mask token where `hidden` [...] is True."""
    return ids.masked_fill(hidden, mask_id)


def draw_hidden(noise_prob: Tensor, uniform: Tensor, maskable: Tensor) -> Tensor:
    """Which tokens are hidden: each maskable one with probability noise_prob; all arguments broadcast to [B, L]."""
    return (uniform < noise_prob) & maskable


def draw_exactly(noise_prob: Tensor, uniform: Tensor, maskable: Tensor, documents: Tensor) -> Tensor:
    """As `draw_hidden`, but exactly round(noise_prob * n) of the n maskable tokens of each document, one at least.

    Args:
        noise_prob: [B, L], the same for all tokens of a document.
        uniform, maskable, documents: [B, L].
    """
    hidden = torch.zeros_like(maskable)
    for number in range(int(documents.max()) + 1):
        mine = maskable & (documents == number)
        count = mine.sum(1, keepdim=True)
        prob = noise_prob.masked_fill(~mine, 0).amax(1, keepdim=True)
        wanted = (prob * count).round().clamp(min=1).minimum(count)
        order = uniform.masked_fill(~mine, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
        hidden |= mine & (order < wanted)
    return hidden
