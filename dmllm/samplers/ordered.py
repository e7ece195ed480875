"""Decoding models that learned every order: what is known stands in the order in which it became known.

A token sees what is given and what was known before it, so that once fed it is computed for good, whatever order is
taken: the prompt once, each token once, and the open places that are asked for, each of which sees all that is known
and none of the others. What was given on the canvas comes first, left to right; tokens of one call too. That is exact:
a call says what the two streams of training say of the same order (tests/samplers/test_ordered.py).

    remasking: random        an order as training draws it, decided before the model is asked
    remasking: sequential    left to right
    any other                the surest place of all that are open, which are then all asked for

Where a known token is opened again (`remdm`), what came after it is fed anew.

Source: Yang et al., XLNet, arXiv:1906.08237, section 2.3. Shapes: B rows of the batch (twice the requests under
guidance), P prompt rows, N canvas tokens, K positions asked for, S orders of n tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dmllm.nn.visibility import ORDERED
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.stream import Stream, asked_twice, guided

UNKNOWN = -1  # the rank of what is open


class OrderedPredictor:
    """`predictor(canvas, rows) -> logits [B, K, V]` for `denoise`.

    Args:
        stream: the requests; with a cache, the prompts are computed here, once.
        cfg_scale: guidance, 0 for none.
        cfg_masks_draft: whether it leaves out what was given on the canvas too.
        most: how many tokens a call makes known at most (`at_most`); None is all.
    """

    def __init__(
        self, stream: Stream, *, cfg_scale: float = 0.0, cfg_masks_draft: bool = False, most: int | None = None
    ):
        self.stream, self.cfg_scale, self._masks_draft, self._most = stream, cfg_scale, cfg_masks_draft, most
        self._begun = False  # whether what was given on the canvas has been fed
        shape = len(stream.lengths), stream.length
        self._rank = torch.full(shape, UNKNOWN, device=stream.lengths.device)  # when a token became known
        self._ids = torch.zeros_like(self._rank)  # as they were fed last
        if stream.cache is not None:
            stream.store()

    @torch.no_grad()
    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K]."""
        stream = self.stream
        if (kept := stream.follow(canvas.requests)) is not None:
            self._rank, self._ids = self._rank[kept], self._ids[kept]
        ids, known = asked_twice(canvas, self.cfg_scale, self._masks_draft), canvas.committed
        if self.cfg_scale:
            known = torch.cat([known, known & canvas.editable if self._masks_draft else known])
        asked = rows.repeat(stream.copies, 1)
        query = torch.zeros_like(known).scatter_(1, asked, torch.ones_like(asked, dtype=torch.bool)) & ~known
        fed = query | self._advance(ids, known)
        rank = torch.where(known, self._rank, self._next() + torch.arange(stream.length, device=ids.device))
        window = self._window(known | fed if stream.cache is None else fed, rows.shape[1])
        self._begun = True
        asked = asked + stream.lengths[:, None]
        clean = torch.zeros_like(rank[:, 0], dtype=torch.float32)  # there is no noise, whatever is known
        logits = stream.feed(ids, *window, asked, clean, order=(rank, known))
        return guided(logits, self.cfg_scale)

    def _advance(self, ids: Tensor, known: Tensor) -> Tensor:
        """Ranks of what is newly known, and what is not computed as it now stands, [B, N] bool."""
        fresh, gone = known & (self._rank == UNKNOWN), ~known & (self._rank != UNKNOWN)
        broken = gone | (known & ~fresh & (ids != self._ids))
        first = torch.where(broken, self._rank, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        behind = known & (self._rank >= first)  # what has seen it
        rank = self._rank.masked_fill(gone, UNKNOWN)
        self._rank = torch.where(fresh, rank.amax(1, keepdim=True) + fresh.cumsum(1), rank)
        self._ids = ids
        return fresh | gone | behind

    def _next(self) -> Tensor:
        """A rank beyond all there are, [B, 1]."""
        return self._rank.amax(1, keepdim=True) + 1

    def _window(self, chosen: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        """The places of what is `chosen` [B, N] of the canvas, of which so many are asked for, and, without a cache, of
        the prompts, ascending: [B, W], and which of them are real."""
        stream = self.stream
        places = torch.arange(stream.given + stream.length, device=chosen.device)
        column = places - stream.lengths[:, None]
        chosen = F.pad(chosen, (0, stream.given)).gather(1, column.clamp(min=0)) & (column >= 0)
        chosen = chosen | (column < 0 if stream.cache is None else False)
        width = chosen.shape[1]
        if not stream.static:
            width = int(chosen.sum(1).max())
        elif stream.cache is not None:
            beside = self._most if self._begun and self._most is not None else stream.length
            width = min(queries + beside, stream.length)
        places = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :width]
        real = chosen.gather(1, places)
        return torch.where(real, places, chosen.shape[1]), real


def at_most(config: DecodeConfig) -> int | None:
    """How many tokens a call makes known, where that does not depend on what the model says; else None."""
    length = config.max_new_tokens
    calls = config.calls_per_block(length)
    if calls is None or (config.sub_block_length or length) < length:
        return None
    return config.num_to_transfer or -(-config.block_of(length) // calls)


def check_ordered(config: DecodeConfig) -> None:
    """Raises ValueError for rules that ask of a known token what the others say of it: it is seen by those after it."""
    for name in ("editing_threshold", "revoke_threshold", "blocks_ahead"):
        if getattr(config, name):
            raise ValueError(
                f"{name}={getattr(config, name)} is not for visibility={ORDERED!r}: an open place sees no other open "
                "place, and a known token only what was known before it. Leave it out."
            )


def draw_ranks(length: int, count: int, generator: Generator, orders: Any = None) -> Tensor:
    """When each token comes in `count` random orders, or in `orders` [S, length]: [S, length] int64, on the CPU.

    Raises:
        ValueError: an order does not name every place of the answer once.
    """
    if orders is None:
        return torch.rand(count, length, generator=generator, device=generator.device).argsort(-1).cpu()
    found = torch.as_tensor(orders).cpu()
    if found.ndim != 2 or not torch.equal(found.sort(-1).values, torch.arange(length).expand(len(found), -1)):
        raise ValueError(
            f"orders={orders!s:.80} must be lists of the places 0 to {length - 1} of the answer, each place once."
        )
    return found.argsort(-1)


@torch.no_grad()
def order_values(
    stream: Stream, answer: Tensor, ranks: Tensor, mask_id: int, batch_size: int, cfg_scale: float = 0.0
) -> Tensor:
    """log p(answer) in nats by the chain rule in each order, [S] float64; their mean is a bound on the log of the mean.

    Args:
        stream: of one request, whose canvas stands there twice at the same positions (`stream_of`, streams=2): what is
            known and, behind it, what is asked.
        answer: [n] int64, at most half of that canvas.
        ranks: [S, n] int64, when each token comes.
        batch_size: orders in one model call.
    """
    count, half, device = len(answer), stream.length // 2, answer.device
    both = torch.cat([torch.arange(count, device=device), half + torch.arange(count, device=device)])
    start = stream.lengths[:1] if stream.cache is not None else torch.zeros_like(stream.lengths[:1])
    prompt = torch.arange(int(stream.lengths[0] - start[0]), device=device) + start
    places = torch.cat([prompt, both + stream.lengths[0]])
    ids = torch.full((stream.length,), mask_id, device=device)
    ids[:count] = answer
    known = torch.arange(stream.length, device=device) < half
    values = []
    for part in ranks.split(batch_size):
        views = stream.fork(len(part))
        rows = len(part) * stream.copies
        rank = torch.zeros(rows, stream.length, dtype=torch.int64, device=device)
        rank[:, both] = part.repeat(stream.copies, 2)
        window = places.repeat(rows, 1)
        logits = guided(
            views.feed(
                ids.expand(rows, -1),
                window,
                torch.ones_like(window, dtype=torch.bool),
                (both[count:] + stream.lengths[0]).repeat(rows, 1),
                torch.zeros(rows, device=device),
                order=(rank, known.expand(rows, -1)),
            ),
            cfg_scale,
        ).float()
        found = logits.gather(-1, answer.expand(len(part), -1)[..., None]).squeeze(-1) - logits.logsumexp(-1)
        values.append(found.double().sum(1))
    return torch.cat(values)
