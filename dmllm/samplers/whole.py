"""Decoding on one canvas: a call feeds it whole, with the prompts or, where these do not see it, behind their cache.

Or as far as it has been opened: its blocks one after the other, until a reply ends. A length need not be known then,
which DAEDAL (Li et al., arXiv:2508.00819) reaches by looking for the end of the sequence and inserting mask tokens.

Shapes: B rows of the batch (twice the requests under guidance), K positions asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dmllm.nn.cache import KVCache
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.stream import Call, Stream, ask, asked_twice, guided, heard_of


class WholePredictor:
    """`predictor(canvas, rows) -> logits [B, K, V]` for `denoise`.

    Args:
        stream: the requests; with a cache, the prompts are computed here, once.
        cfg_scale: guidance, 0 for none.
        cfg_masks_draft: whether it leaves out what was given on the canvas too.
        block_length: of the canvas.
        blocks_ahead: how many blocks behind the active one are fed, and seen; None is all.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        cfg_scale: float = 0.0,
        cfg_masks_draft: bool = False,
        block_length: int = 0,
        blocks_ahead: int | None = None,
    ):
        self.stream, self.cfg_scale, self._masks_draft = stream, cfg_scale, cfg_masks_draft
        self._block_length, self._blocks_ahead = block_length, blocks_ahead
        if stream.cache is not None:
            stream.store()

    @property
    def hears(self) -> bool:
        """Whether the model goes on from what it has said (`canvas.heard`)."""
        return getattr(self.stream.model, "takes_feedback", False)

    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K]."""
        return guided(self._feed(canvas, rows), self.cfg_scale)

    def with_head(self, canvas: Canvas, rows: Tensor, name: str, others: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K, V], and what the head `name` says, [B, G], at the canvas positions `others` [B, G], of which -1
        is the prompt's last row.

        Raises:
            ValueError: a request without a prompt may grow in front of its first token.
        """
        if not self.stream.all_given:
            self.stream.follow(canvas.requests)
            empty = self.stream.lengths[: len(canvas)] == 0
            if bool((empty if canvas.closed is None else empty & ~canvas.closed[:, 0]).any()):
                raise ValueError(
                    "A request has an empty prompt, and no row stands in front of its answer; begin with a token such "
                    "as bos, as the training texts did."
                )
        asked = torch.cat([rows, others], 1)
        logits, said = self._feed(canvas, asked, _asking(name, rows.shape[1]))
        return guided(logits, self.cfg_scale), guided(said, self.cfg_scale)

    def said_by(self, canvas: Canvas, rows: Tensor, name: str) -> Tensor:
        """What the head `name` says, [B, K, F], at the canvas positions `rows` [B, K]."""
        return guided(self._feed(canvas, rows, _asking(name, 0))[1], self.cfg_scale)

    @torch.no_grad()
    def _feed(self, canvas: Canvas, rows: Tensor, call: Call | None = None) -> Any:
        stream = self.stream
        stream.follow(canvas.requests)
        lengths, cached = stream.lengths, stream.cache is not None
        opened = torch.full_like(lengths, stream.length)
        if self._blocks_ahead is not None:
            last = canvas.block.clamp(min=0).repeat(stream.copies) + self._blocks_ahead
            opened = opened.minimum((last + 1) * self._block_length)
        if canvas.extent is not None:
            opened = canvas.extent.repeat(stream.copies)
        window = stream.run(
            lengths if cached else torch.zeros_like(lengths),
            lengths + opened,
            stream.length if cached else stream.given + stream.length,
        )
        asked = (rows.repeat(stream.copies, 1) + lengths[:, None]).clamp(min=0)
        ids, soft = asked_twice(canvas, self.cfg_scale, self._masks_draft), None
        if canvas.latents is not None:
            soft = canvas.latents.repeat(stream.copies, 1, 1), ~canvas.committed.repeat(stream.copies, 1)
        heard = heard_of(canvas, stream.copies) if self.hears else None
        time = canvas.time.repeat(stream.copies)
        return stream.feed(ids, *window, asked, time, call=call, soft=soft, heard=heard)


@lru_cache(maxsize=256)
def _asking(name: str, count: int) -> Callable[..., Any]:
    """As `stream.call_model`, for logits of the first `count` rows asked for and what a head says of the others."""

    def call(model: Any, cache: KVCache | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        rows = inputs[-2]
        output = ask(model, cache, inputs, rows=rows[:, :count], heads={name: rows[:, count:]})
        return output.logits, output.heads[name]

    return call
