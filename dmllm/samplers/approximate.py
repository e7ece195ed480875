"""Decoding full-attention models with a cache: most calls feed the active block and see the others as they were.

What a row's keys and values are depends on every other row, so that what is kept goes stale; how stale is for the
policy to say (`samplers.policy`). A call that refreshes is an ordinary one: it commits tokens as well.

Shapes: B rows of the batch (twice the requests under guidance), N canvas tokens, S places, K positions asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.policy import CachePolicy
from dmllm.samplers.stream import Stream, asked_twice, guided


class ApproximatePredictor:
    """`predictor(canvas, rows) -> logits [B, K, V]` for `denoise`.

    Args:
        stream: the requests, with guidance twice, the second time without their prompts; with a cache.
        policy: what is fed when.
        block_length: of the canvas.
        images: [B, S] bool, the places of the prompts' image rows.
        cfg_scale: guidance, 0 for none.
        cfg_masks_draft: whether it leaves out what was given on the canvas too.
        period: calls on each block, where all rows take as many; then a GPU need not be asked when one is entered.
    """

    def __init__(
        self,
        stream: Stream,
        policy: CachePolicy,
        block_length: int,
        images: Tensor,
        *,
        cfg_scale: float = 0.0,
        cfg_masks_draft: bool = False,
        period: int | None = None,
    ):
        assert stream.cache is not None
        stream.cache.exact = policy.exact
        self.stream, self.policy, self.block_length, self.cfg_scale = stream, policy, block_length, cfg_scale
        self._images, self._masks_draft, self._period, self._calls = images, cfg_masks_draft, period, 0
        self._filled = False  # whether every place has been written

    @torch.no_grad()
    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K], in each row's active block."""
        if (kept := self.stream.follow(canvas.requests)) is not None:
            self._images = self._images[kept]
        twice, lengths = self.stream.copies, self.stream.lengths
        block, time = canvas.block.repeat(twice), canvas.time.repeat(twice)
        ids, asked = asked_twice(canvas, self.cfg_scale, self._masks_draft), rows.repeat(twice, 1) + lengths[:, None]
        self._calls += 1
        if self._period is not None and self.stream.static:
            number, call = divmod(self._calls - 1, self._period)
            refreshes = not call and not number % self.policy.refresh
            return guided(self._feed(ids, block, asked, time, refreshes, None), self.cfg_scale)
        anew = (canvas.calls.repeat(twice) == 0) & (block % self.policy.refresh == 0) | (not self._filled)
        logits: Tensor | None = None
        for refreshes in (True, False):
            part = (anew == refreshes).nonzero().squeeze(1)
            if not len(part):
                continue
            if len(part) == len(anew):
                return guided(self._feed(ids, block, asked, time, refreshes, None), self.cfg_scale)
            some = self._feed(ids[part], block[part], asked[part], time[part], refreshes, part)
            logits = some.new_empty(len(anew), *some.shape[1:]) if logits is None else logits
            logits[part] = some
        assert logits is not None
        return guided(logits, self.cfg_scale)

    def _feed(
        self, ids: Tensor, block: Tensor, asked: Tensor, time: Tensor, refreshes: bool, rows: Tensor | None
    ) -> Tensor:
        """Logits of some rows of the batch, all of which refresh or none."""
        lengths = self.stream.lengths if rows is None else self.stream.lengths[rows]
        if not refreshes:
            begin, near, last = lengths + block * self.block_length, self.policy.vicinity, lengths + self.stream.length
            dual, width = self.policy.kind == "dual", self.block_length + 2 * near
            end = (begin + self.block_length + near).minimum(last) if dual else last
            window = self.stream.run((begin - near).clamp(min=0), end, width if dual else self.stream.length + near)
        elif self.policy.images or not self._filled:
            whole = self.stream.given + self.stream.length
            window = self.stream.run(torch.zeros_like(lengths), lengths + self.stream.length, whole)
        else:
            images = self._images if rows is None else self._images[rows]
            window = self._text(images, lengths)
        self._filled = self._filled or refreshes
        return self.stream.feed(ids, *window, asked, time, rows)

    def _text(self, images: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """All places but those of images, in order, [B, W]; and which of them are real."""
        text = ~images & (torch.arange(images.shape[1], device=images.device) < (lengths + self.stream.length)[:, None])
        count = text.sum(1)
        places = (~text).long().argsort(dim=1, stable=True)[:, : int(count.max())]
        real = torch.arange(places.shape[1], device=places.device) < count[:, None]
        return places.masked_fill(~real, images.shape[1]), real
