"""Decoding on one canvas: a call feeds it whole, with the prompts or, where these do not see it, behind their cache.

Or as far as it has been opened: its blocks one after the other, until a reply ends. A length need not be known then,
which DAEDAL (Li et al., arXiv:2508.00819) reaches by looking for the end of the sequence and inserting mask tokens.

Shapes: B rows of the batch (twice the requests under guidance), K positions asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.stream import Stream, asked_twice, guided


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

    @torch.no_grad()
    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K]."""
        stream = self.stream
        stream.follow(canvas.requests)
        lengths, cached = stream.lengths, stream.cache is not None
        opened = torch.full_like(lengths, stream.length)
        if self._blocks_ahead is not None:
            last = canvas.block.clamp(min=0).repeat(stream.copies) + self._blocks_ahead
            opened = opened.minimum((last + 1) * self._block_length)
        window = stream.run(
            lengths if cached else torch.zeros_like(lengths),
            lengths + opened,
            stream.length if cached else stream.given + stream.length,
        )
        asked = rows.repeat(stream.copies, 1) + lengths[:, None]
        ids = asked_twice(canvas, self.cfg_scale, self._masks_draft)
        return guided(stream.feed(ids, *window, asked, canvas.time.repeat(stream.copies)), self.cfg_scale)
