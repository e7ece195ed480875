"""The absorbing ("masked") corruption process: a token is kept, or becomes the mask token.

q(x_t | x_0) keeps each token with probability alpha(t), independently (Austin et al., D3PM, arXiv:2107.03006, A.2.2).
The random numbers are an argument, so that the caller decides what they are keyed by.
"""

from __future__ import annotations

from torch import Tensor


def hide(ids: Tensor, hidden: Tensor, mask_id: int) -> Tensor:
    """ids [...] with the mask token where `hidden` [...] is True."""
    return ids.masked_fill(hidden, mask_id)


def draw_hidden(noise_prob: Tensor, uniform: Tensor, maskable: Tensor) -> Tensor:
    """Which tokens are hidden: each maskable one with probability noise_prob; all arguments broadcast to [B, L]."""
    return (uniform < noise_prob) & maskable
