"""Random numbers of decoding: each row's own, so that it draws what it would draw alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def numbers(draws: list[Generator], count: int, device: torch.device) -> Tensor:
    """`count` numbers from each row's generator, [B, count] float64 in [0, 1); the host waits for nothing."""
    found = torch.stack([torch.rand(count, generator=g, dtype=torch.float64, device=g.device) for g in draws])
    return found if found.device == device else found.pin_memory().to(device, non_blocking=True)


def of_authors(
    kind: str, draws: list[Generator], logits: Tensor, asked: Tensor, slots: Tensor, length: int, tokens: bool
) -> tuple[Tensor, Tensor]:
    """What authors' codes draw in a call: of each word its Gumbel noise [B, K, V], and uniform numbers [B, K] for the
    order, both float32. Rows that share one generator draw together, as one batch of theirs.

    multinomial: torch.multinomial's exponential numbers for each of `length` places, known ones too, then as many for
    the order. gumbel: uniform numbers of the open places alone, which come first in `asked` [B, K].

    Args:
        logits: [B, K, V].
        slots: [B, K], which of the `length` places each position is.
        tokens: whether tokens are drawn, or the order alone.
    """
    count, width = logits.shape[1:]
    noise = torch.zeros(logits.shape if tokens else (len(draws), count, 1), device=logits.device)
    if kind == "multinomial":
        groups = draws[:1] if all(g is draws[0] for g in draws) else draws
        each, device = len(draws) // len(groups) * length, draws[0].device
        if tokens:
            mine = [torch.empty(each, width, device=device).exponential_(1, generator=g) for g in groups]
            whole = torch.cat(mine).view(len(draws), length, width).to(logits.device)
            noise = -whole.gather(1, slots[..., None].expand(-1, -1, width)).log()
        order = torch.cat([torch.rand(each, generator=g, device=device) for g in groups])
        return noise, order.view(len(draws), length).to(logits.device).gather(1, slots)
    order = torch.full((len(draws), count), 0.5, device=logits.device)
    for row, own in enumerate(draws):
        some = int(asked[row].sum())
        if tokens:
            drawn = torch.rand(some, width, generator=own, device=own.device).to(noise.device)
            noise[row, :some] = -(-(drawn + 1e-20).log() + 1e-20).log()
        order[row, :some] = torch.rand(some, generator=own, device=own.device).to(noise.device)
    return noise, order
