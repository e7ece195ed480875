"""Decoding block-causal models: block after block, each seeing itself and those before it, which are computed once.

Blocks are counted from the first token of the prompt, so the first one to be filled may begin with the prompt's last
tokens, and the last one is filled whole. A call feeds the active block and what is complete before it but not stored
yet. What is stored is what was fed: where a token has been replaced since, its block and those after it are fed again.

Source: BD3-LM, arXiv:2503.09573, section 3.1; SDAR, arXiv:2510.06303. Shapes: B rows of the batch (twice the requests
under guidance), P prompt rows (padded on the right), N canvas tokens, W rows fed, K positions asked for, D hidden.
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


def whole_blocks(lengths: Tensor, length: int, block_length: int, mask_id: int) -> Canvas:
    """A blank canvas of at least `length` tokens behind prompts of `lengths` [B], to the end of each row's last block.

    Rows that end before the longest one have known tokens there, which nothing sees.
    """
    own = length + (-(lengths + length)) % block_length
    places = torch.arange(int(own.max()), device=lengths.device)
    beyond = places >= own[:, None]
    canvas = Canvas.of(torch.full_like(beyond, mask_id, dtype=torch.int64), beyond, mask_id)
    return replace(canvas, offset=lengths % block_length, block_length=block_length)


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
        store_calls: store the prompts' whole blocks now, in a call that counts (`spent` [B]).
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
        store_calls: bool = False,
    ):
        assert canvas.block_length is not None
        self.model, self.block_length, self.cfg_scale = model, canvas.block_length, cfg_scale
        self._stream, self._positions, self._lengths = stream, positions, lengths
        self._requests = canvas.requests
        self._ids = canvas.ids.repeat(2 if cfg_scale else 1, 1)  # of the canvas, as they were fed last
        self._stored = torch.zeros_like(lengths)  # blocks
        self._cache = PlacedCache(stream.shape[1] + canvas.ids.shape[1]) if use_cache else None
        whole = lengths // self.block_length
        if use_cache and store_calls and bool(whole.any()):
            with torch.no_grad():
                self._feed(torch.zeros_like(whole), whole, whole, lengths[:, None][:, :0])
            self._stored = whole
        self.spent = self._stored.clamp(max=1)[: len(canvas)]

    @torch.no_grad()
    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K], all in each row's active block."""
        self._keep(canvas.requests)
        twice = 2 if self.cfg_scale else 1
        ids, block, rows = canvas.ids.repeat(twice, 1), canvas.block.repeat(twice), rows.repeat(twice, 1)
        block = block + self._lengths // self.block_length  # from here on counted from the prompt's first token
        of_token = (self._lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)) // self.block_length
        complete = (canvas.committed.repeat(twice, 1) | (of_token != block[:, None])).all(1).long()
        changed = (ids != self._ids) & (of_token < self._stored[:, None])
        first = torch.where(changed, of_token, self._stored[:, None]).amin(1).minimum(block)
        self._ids = ids
        logits = self._feed(first, block + 1, block + complete, rows + self._lengths[:, None])
        self._stored = block + complete if self._cache is not None else self._stored
        if not self.cfg_scale:
            return logits
        with_prompt, without = logits.float().chunk(2)
        return without + (self.cfg_scale + 1) * (with_prompt - without)

    def _feed(self, first: Tensor, end: Tensor, done: Tensor, asked: Tensor) -> Tensor:
        """Logits at the places `asked` [B, K], from the blocks `first` to `end` [B]; those before `done` are stored."""
        length, given, lengths = self.block_length, self._stream.shape[1], self._lengths[:, None]
        first, end, done = first[:, None] * length, end[:, None] * length, done[:, None] * length
        place = first + torch.arange(int((end - first).max()), device=first.device)  # [B, W]
        real, prompt = place < end, place < lengths
        stream = self.model.embed(self._ids.gather(1, (place - lengths).clamp(0, self._ids.shape[1] - 1)))
        if given:
            column = place.clamp(max=given - 1)[..., None].expand_as(stream)
            stream = torch.where(prompt[..., None], self._stream.gather(1, column), stream)
        column = torch.where(prompt, place, place - lengths + given).clamp(max=self._positions.shape[-1] - 1)
        if self._cache is not None:
            self._cache.forget(first[:, 0])
            self._cache.places = torch.where(real & (place < done), place, self._cache.size)
        return self.model(
            inputs_embeds=stream,
            positions=self._positions.gather(-1, column.expand(*self._positions.shape[:-1], -1)),
            visibility=layout(
                f"block:{length}",
                documents=torch.where(real, 0, PADDING),
                canvas=torch.zeros_like(real),
                positions=place,
            ),
            cache=self._cache,
            rows=asked - first,
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
            self._cache = None if self._cache is None else self._cache.select(rows)
        self._requests = requests
