"""Decoding block-causal models: block after block, each seeing itself and those before it, which are computed once.

Blocks are counted from the first token of the prompt, so the first one to be filled may begin with the prompt's last
tokens, and the last one is filled whole. A call feeds the active block and what is complete before it but not stored
yet. What is stored is what was fed: where a token has been replaced since, its block and those after it are fed again.
The keys and values of the active block can be stored too, so that its sub-blocks are fed one by one; they are those of
an earlier call, so that this alone is not exact.

Source: BD3-LM, arXiv:2503.09573, section 3.1; SDAR, arXiv:2510.06303; sub-blocks, Fast-dLLM v2,
arXiv:2509.26328. Shapes: B rows of the batch (twice the requests under guidance), P prompt rows (padded on the right),
N canvas tokens, W rows fed, K positions asked for, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmllm.nn.cache import PlacedCache
from dmllm.nn.visibility import layout
from dmllm.samplers.canvas import Canvas
from dmllm.types import PADDING


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
        model: what is called like a `MultimodalModel`.
        stream: [B, P, D], the prompts' embeddings.
        positions: [B, P + N] or [4, B, P + N], of the prompts and of the canvas behind each.
        lengths: [B], how many of the P are real.
        canvas: the one that will be filled; with guidance, B is twice its rows.
        cfg_scale: guidance, 0 for none.
        use_cache: False feeds everything up to the active block's end in every call.
        sub_block_length: feed only so much of the active block where that was fed and the rest is stored; not exact.
    """

    def __init__(
        self,
        model: Any,
        stream: Tensor,
        positions: Tensor,
        lengths: Tensor,
        canvas: Canvas,
        *,
        cfg_scale: float = 0.0,
        use_cache: bool = True,
        sub_block_length: int | None = None,
    ):
        assert canvas.block_length is not None
        self.model, self.block_length, self.cfg_scale = model, canvas.block_length, cfg_scale
        self._stream, self._positions, self._lengths = stream, positions, lengths
        self._requests = canvas.requests
        self._ids = canvas.ids.repeat(2 if cfg_scale else 1, 1)  # of the canvas, as they were fed last
        self._stored = torch.zeros_like(lengths)  # blocks
        self._cache = PlacedCache(stream.shape[1] + canvas.ids.shape[1]) if use_cache else None
        self._sub_block_length = sub_block_length if use_cache else None
        self._begun = torch.full_like(lengths, -1)  # the block whose keys and values are those of different calls
        if self._cache is not None:
            self._cache.exact = sub_block_length is None

    @torch.no_grad()
    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K], in each row's active block or right behind it."""
        self._keep(canvas.requests)
        twice = 2 if self.cfg_scale else 1
        ids, block, rows = canvas.ids.repeat(twice, 1), canvas.block.repeat(twice), rows.repeat(twice, 1)
        block = block + self._lengths // self.block_length  # from here on counted from the prompt's first token
        of_token = (self._lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)) // self.block_length
        complete = (canvas.committed.repeat(twice, 1) | (of_token != block[:, None])).all(1).long()
        changed = (ids != self._ids) & (of_token < self._stored[:, None])
        first = torch.where(changed, of_token, self._stored[:, None]).amin(1).minimum(block)
        self._ids = ids
        start, end, done = (blocks * self.block_length for blocks in (first, block + 1, block + complete))
        if self._sub_block_length is not None:
            place = self._lengths + canvas.committed.repeat(twice, 1).long().argmin(1)  # the first unknown one
            sub_block = place // self._sub_block_length * self._sub_block_length
            alone = (place > sub_block) & (self._begun == block) & (complete == 0)
            start = torch.where(alone, sub_block, start)
            done = end = torch.where(alone, sub_block + self._sub_block_length, end).minimum(end)
            self._begun = block
        logits = self._feed(start, end, done, rows + self._lengths[:, None])
        self._stored = block + complete if self._cache is not None else self._stored
        if not self.cfg_scale:
            return logits
        with_prompt, without = logits.float().chunk(2)
        return without + (self.cfg_scale + 1) * (with_prompt - without)

    def _feed(self, first: Tensor, end: Tensor, done: Tensor, asked: Tensor) -> Tensor:
        """Logits at the places `asked` [B, K], from the rows `first` to `end` [B]; those before `done` are stored."""
        given, lengths = self._stream.shape[1], self._lengths[:, None]
        first, done = first[:, None], done[:, None]
        end = torch.cat([end[:, None], asked + 1], 1).amax(1, keepdim=True)
        place = first + torch.arange(int((end - first).max()), device=first.device)  # [B, W]
        real, prompt = place < end, place < lengths
        stream = self.model.embed(self._ids.gather(1, (place - lengths).clamp(0, self._ids.shape[1] - 1)))
        if given:
            column = place.clamp(max=given - 1)[..., None].expand_as(stream)
            stream = torch.where(prompt[..., None], self._stream.gather(1, column), stream)
        column = torch.where(prompt, place, place - lengths + given).clamp(max=self._positions.shape[-1] - 1)
        if self._cache is not None:
            self._cache.forget(first[:, 0], end[:, 0])
            self._cache.places = torch.where(real & (place < done), place, self._cache.size)
        return self.model(
            inputs_embeds=stream,
            positions=self._positions.gather(-1, column.expand(*self._positions.shape[:-1], -1)),
            visibility=layout(
                f"block:{self.block_length}",
                documents=torch.where(real, 0, PADDING),
                canvas=torch.zeros_like(real),
                positions=place,
            ),
            cache=self._cache,
            rows=(asked - first).clamp(min=0),
        ).logits

    def _keep(self, requests: Tensor) -> None:
        """Only what belongs to the rows that are left."""
        if self._requests is requests:
            return
        if len(requests) < len(self._requests):
            rows = torch.searchsorted(self._requests, requests)
            if self.cfg_scale:
                rows = torch.cat([rows, rows + len(self._requests)])
            self._stream, self._lengths, self._ids = self._stream[rows], self._lengths[rows], self._ids[rows]
            self._positions, self._stored = self._positions.index_select(-2, rows), self._stored[rows]
            self._begun = self._begun[rows]
            self._cache = None if self._cache is None else self._cache.select(rows)
        self._requests = requests
