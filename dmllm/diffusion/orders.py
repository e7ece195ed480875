"""Orders in which the tokens of a text come: each a factorisation of its probability by the chain rule.

    log p(x) = sum over k of log p(x_z(k) | x_z(1), ..., x_z(k - 1))          for every order z

With conditionals that do not depend on the order of what is given, the mean over all orders is the bound of absorbing
diffusion (Uria et al., arXiv:1310.1757; Hoogeboom et al., arXiv:2110.02037, section 3). Shapes: B rows, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(key: Tensor, documents: Tensor, chosen: Tensor) -> Tensor:
    """When each token comes: [B, L] int64, 0, 1, ... over the `chosen` rows of a document by ascending `key`, -1
    elsewhere. Of equal keys the first comes first.

    Args:
        key: [B, L], for example uniform numbers, of which every order is equally likely.
        documents: [B, L] int64, 0 or above where chosen.
        chosen: [B, L] bool.
    """
    by_key = key.argsort(dim=1, stable=True)
    group = documents.masked_fill(~chosen, int(documents.max()) + 1).gather(1, by_key)
    in_groups = group.argsort(dim=1, stable=True)
    group = group.gather(1, in_groups)
    place = torch.arange(key.shape[1], device=key.device) - torch.searchsorted(group, group)
    return torch.empty_like(place).scatter_(1, by_key.gather(1, in_groups), place).masked_fill(~chosen, -1)
