"""Self-speculation: the heads of a causal model draft the next tokens, and the next call says which of them stand.

A call feeds the last known token and the drafts behind it, and so learns what follows each. The first drafts that agree
with that are kept, with one token more, which no draft needed. Greedily the tokens are those of one call a token; when
they are drawn, their distribution is (`diffusion.speculative`). At the last token kept the heads draft anew.

Sources: Gloeckle et al., arXiv:2404.19737, section 3.2; Stern et al., arXiv:1811.03115.
Shapes: B rows, N canvas tokens, S drafts, n tokens that a row predicts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from dmllm.diffusion.speculative import verify
from dmllm.samplers.absorbing import finished
from dmllm.samplers.canvas import Canvas, Drafts
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.constraint import Constraint
from dmllm.samplers.draws import numbers
from dmllm.samplers.estimate import distribution, estimate, forbid, invert
from dmllm.samplers.process import Process


def advance(
    predict: Any, canvas: Canvas, config: DecodeConfig, draws: list[Generator], constraint: Constraint | None
) -> Canvas:
    """One call: which of the drafts are kept, the token behind them, and new drafts."""
    assert constraint is None, "a constraint is followed token by token"
    size, device, length = config.speculate, canvas.ids.device, canvas.ids.shape[1]
    drafts = canvas.drafts
    if drafts is None:  # a mask token is never kept
        drafts = Drafts(torch.full((len(canvas), size), canvas.mask_id, device=device))
    first = canvas.committed.long().argmin(1, keepdim=True)
    rows = first + torch.arange(size + 1, device=device)
    open_rows, on_canvas = rows.clamp(max=length - 1), rows < length
    ids = canvas.commit(open_rows[:, :-1], drafts.tokens, on_canvas[:, :-1]).ids
    said = predict.drafting(canvas, ids, rows)[:, :, : size + 1]  # [B, S + 1, n, V]
    if config.draws_tokens:
        uniform = numbers(draws, 2 * size + 1, device)
        p = _masses(said[:, :, 0], canvas.mask_id, config)
        q = torch.zeros_like(p[:, 1:]) if drafts.masses is None else drafts.masses
        count, rest = verify(p, q, drafts.tokens, uniform[:, :size])
        last = invert(rest, uniform[:, size])[:, None]
        tokens = torch.cat([drafts.tokens, last], 1).scatter(1, count[:, None], last)
    else:
        tokens = estimate(said[:, :, 0], canvas.mask_id, config).tokens
        count = (tokens[:, :-1] == drafts.tokens).long().cumprod(1).sum(1)
    chosen = (torch.arange(size + 1, device=device) <= count[:, None]) & on_canvas
    filled = canvas.commit(open_rows, tokens, chosen)
    ahead = said[torch.arange(len(canvas), device=device), count, 1:]  # [B, S, V]
    if config.draws_tokens:
        masses = _masses(ahead, canvas.mask_id, config)
        drafts = Drafts(invert(masses, uniform[:, size + 1 :]), masses)
    else:
        drafts = Drafts(estimate(ahead, canvas.mask_id, config).tokens)
    return replace(filled, drafts=drafts, forwards=canvas.forwards + 1, accepted=chosen.sum(1))


def _masses(logits: Tensor, mask_id: int, config: DecodeConfig) -> Tensor:
    """What tokens are drawn from, [..., V] float32, with a sum of 1."""
    scores = logits.to(torch.float32, copy=True)
    forbid(scores, mask_id, config)
    mass = distribution(scores, config.temperature, config.top_p)
    return mass / mass.sum(-1, keepdim=True)


SPECULATIVE = Process(advance, finished)
