"""Decoding block-causal models: block after block, each seeing itself and those before it, which are computed once.

Blocks are counted from the first token of the prompt, so the first one to be filled may begin with the prompt's last
tokens, and the last one is filled whole. A call feeds the active block and what is complete before it but not stored
yet. What is stored is what was fed: where a token has been replaced since, its block and those after it are fed again.
The keys and values of the active block can be stored too, so that its sub-blocks are fed one by one; they are those of
an earlier call, so that this alone is not exact.

Source: BD3-LM, arXiv:2503.09573, section 3.1; SDAR, arXiv:2510.06303; sub-blocks, Fast-dLLM v2,
arXiv:2509.26328. Shapes: B rows of the batch (twice the requests under guidance), P prompt rows (padded on the right),
N canvas tokens, K positions asked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.stream import Stream, guided, heard_of


def whole_blocks(
    lengths: Tensor,
    length: int,
    block_length: int,
    mask_id: int,
    *,
    store_calls: bool = False,
    prompt_first: bool = False,
) -> Canvas:
    """A blank canvas of at least `length` tokens behind prompts of `lengths` [B], to the end of each row's last block.

    Rows that end before the longest one have known tokens there, which nothing sees.

    Args:
        store_calls: each row's first call is one that stores its prompt's whole blocks, where it has any.
        prompt_first: a last token that is the first of its block ends the canvas: what is before it predicts it.
    """
    own = length + (-(lengths + length)) % block_length
    if prompt_first:
        own = torch.where((lengths + length) % block_length == 1, length, own)
    places = torch.arange(int(own.max()), device=lengths.device)
    beyond = places >= own[:, None]
    canvas = Canvas.of(torch.full_like(beyond, mask_id, dtype=torch.int64), beyond, mask_id)
    post = (lengths >= block_length).long() if store_calls else canvas.post
    return replace(canvas, offset=lengths % block_length, block_length=block_length, post=post)


class BlockPredictor:
    """`predictor(canvas, rows) -> logits [B, K, V]` for `denoise`, on a canvas of `whole_blocks`.

    Args:
        stream: the requests, with guidance twice, the second time without their prompts; without a cache everything up
            to the active block's end is fed in every call.
        canvas: the one that will be filled.
        cfg_scale: guidance, 0 for none.
        sub_block_length: feed only so much of the active block where that was fed and the rest is stored; not exact.
        behind: whether the place behind the active block is asked for too.
    """

    def __init__(
        self,
        stream: Stream,
        canvas: Canvas,
        *,
        cfg_scale: float = 0.0,
        sub_block_length: int | None = None,
        behind: bool = False,
    ):
        assert canvas.block_length is not None
        self.stream, self.block_length, self.cfg_scale = stream, canvas.block_length, cfg_scale
        self._behind = behind
        self._ids = canvas.ids.repeat(stream.copies, 1)  # of the canvas, as they were fed last
        self._stored = torch.tensor(stream.loaded, device=stream.lengths.device) // self.block_length  # blocks
        self._sub_block_length = sub_block_length if stream.cache is not None else None
        self._begun = torch.full_like(stream.lengths, -1)  # the block whose keys and values are those of other calls
        if stream.cache is not None:
            stream.cache.exact = sub_block_length is None
        if stream.cache is not None and stream.static:  # so that every call is as wide: the active block and one before
            stream.store(self.block_length)

    @property
    def hears(self) -> bool:
        """Whether the model goes on from what it has said (`canvas.heard`)."""
        return getattr(self.stream.model, "takes_feedback", False)

    @torch.no_grad()
    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K], in each row's active block or right behind it."""
        if (kept := self.stream.follow(canvas.requests)) is not None:
            self._ids, self._stored, self._begun = self._ids[kept], self._stored[kept], self._begun[kept]
        twice, lengths = self.stream.copies, self.stream.lengths
        ids, block = canvas.ids.repeat(twice, 1), canvas.block.repeat(twice)
        block = block + lengths // self.block_length  # from here on counted from the prompt's first token
        of_token = (lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)) // self.block_length
        complete = (canvas.committed.repeat(twice, 1) | (of_token != block[:, None])).all(1).long()
        changed = (ids != self._ids) & (of_token < self._stored[:, None])
        first = torch.where(changed, of_token, self._stored[:, None]).amin(1).minimum(block)
        if self.stream.static and self.stream.cache is not None:
            first = (block - 1).clamp(min=0)
        self._ids = ids
        start, end = first * self.block_length, (block + 1) * self.block_length
        if self._sub_block_length is not None:
            place = lengths + canvas.committed.repeat(twice, 1).long().argmin(1)  # the first unknown one
            sub_block = place // self._sub_block_length * self._sub_block_length
            alone = (place > sub_block) & (self._begun == block) & (complete == 0)
            start = torch.where(alone, sub_block, start)
            end = torch.where(alone, sub_block + self._sub_block_length, end).minimum(end)
            self._begun = block
        asked = rows.repeat(twice, 1) + lengths[:, None]
        width = (
            2 * self.block_length + self._behind
            if self.stream.cache is not None
            else self.stream.given + self.stream.length
        )
        window = self.stream.run(start, torch.cat([end[:, None], asked + 1], 1).amax(1), width)
        active = window[0] // self.block_length == block[:, None]  # what is stored is told that it is clean
        time = torch.where(active, canvas.time.repeat(twice)[:, None], 0.0)
        heard = heard_of(canvas, twice) if self.hears else None
        logits = self.stream.feed(ids, *window, asked, time, heard=heard)
        self.stream.stored()
        self._stored = block + complete if self.stream.cache is not None else self._stored
        return guided(logits, self.cfg_scale)
