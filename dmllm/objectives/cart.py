"""CART: a hidden token weighs more the more of what is near it is shown.

    w(n) = sum over shown i of 1/2 p (1 - p)^(|n - i| - 1)

a geometric distribution over the distance, half to either side. It takes the place of 1/t and is not a bound.
Source: Ye et al., Dream, arXiv:2508.15487, section 3.2. Shapes: B rows, L tokens, D documents, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.types import PREFIX


def context_adaptive(hidden: Tensor, documents: Tensor, positions: Tensor, p: float) -> Tensor:
    """The weights [B, L] of tokens if `hidden` [B, L] bool is what is hidden.

    Distances are between `positions` [B, L], each its document's own; a document also has the rows of document PREFIX
    near it, and none of padding.
    """
    width, length = max(int(documents.max()) + 1, 1), int(positions.max()) + 1
    place = documents.clamp(min=0) * length + positions
    shown = (~hidden & (documents >= 0)).float()
    table = torch.zeros(len(hidden), width * length, device=hidden.device).scatter_add_(1, place, shown)
    prefix = torch.zeros(len(hidden), length, device=hidden.device)
    prefix = prefix.scatter_add_(1, positions, (documents == PREFIX).float())
    table = table.view(-1, width, length) + prefix[:, None]
    step = torch.arange(length, device=hidden.device)
    share = 0.5 * p * (1 - p) ** (step - 1.0)
    share[0] = 0  # a token is no context of itself
    return (table @ share[(step[:, None] - step).abs()]).flatten(1).gather(1, place)
