"""A model with its requests' streams: each a prompt and the canvas right behind it, of which a call feeds a part.

Rows of the batch need not be fed the same part, nor all of them. What is fed sees what has been fed before, through a
cache in which each place of the stream has its own.

Shapes: B rows of the batch (twice the requests under guidance), P prompt rows (padded on the right), N canvas tokens,
S = P + N places, W rows fed, K positions asked for, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmllm.nn.cache import KVCache
from dmllm.nn.visibility import layout
from dmllm.samplers.canvas import Canvas
from dmllm.types import PADDING


class Stream:
    """What a model was given, and which rows of it each call feeds.

    Args:
        model: what is called like a `MultimodalModel`.
        prompts: [B, P, D], the prompts' embeddings.
        positions: [B, S] or [4, B, S], of the prompts and of the canvas behind each.
        lengths: [B], how many of the P are real.
        length: N.
        visibility: a name of `LAYOUTS` or block:N; places are counted from each prompt's first row.
        cache: with S places; None feeds everything that is to be seen.
    """

    def __init__(
        self,
        model: Any,
        prompts: Tensor,
        positions: Tensor,
        lengths: Tensor,
        length: int,
        visibility: str,
        cache: KVCache | None,
    ):
        self.model, self.lengths, self.length, self.visibility, self.cache = model, lengths, length, visibility, cache
        self._prompts, self._positions = prompts, positions
        self._window: tuple[Tensor, ...] | None = None

    def run(self, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The places from `first` to `end` [B], [B, W], and which of them are real; the same ones as in the last call,
        if nothing has moved."""
        window = (first, end)
        if self._window is not None and all(map(torch.equal, window, self._window[:2])):
            return self._window[2], self._window[3]
        places = first[:, None] + torch.arange(int((end - first).max()), device=first.device)
        self._window = (*window, places, places < end[:, None])
        return self._window[2], self._window[3]

    def feed(
        self, ids: Tensor, places: Tensor, real: Tensor, asked: Tensor, time: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Logits [B, K, V].

        Args:
            ids: [B, N], the canvas.
            places: [B, W] ascending, what is fed, where `real` [B, W].
            asked: [B, K], the places whose tokens are asked for, each among those fed, or for models of which a row
                predicts the next token right behind one.
            time: [B], for models conditioned on it.
            rows: [B] int64, of which rows of the batch all this is; None is all.
        """
        prompts, lengths, positions = self._prompts, self.lengths[:, None], self._positions
        if rows is not None:
            prompts, lengths, positions = prompts[rows], lengths[rows], positions.index_select(-2, rows)
        given = prompts.shape[1]
        of_prompt = places < lengths
        stream = self.model.embed(ids.gather(1, (places - lengths).clamp(0, self.length - 1)))
        if given:
            column = places.clamp(max=given - 1)[..., None].expand(-1, -1, prompts.shape[-1])
            stream = torch.where(of_prompt[..., None], prompts.gather(1, column), stream)
        column = torch.where(of_prompt, places, places - lengths + given).clamp(max=positions.shape[-1] - 1)
        if self.cache is not None:
            self.cache.put(self._stored(places, real), rows)
        return self.model(
            inputs_embeds=stream,
            positions=positions.gather(-1, column.expand(*positions.shape[:-1], -1)),
            visibility=layout(
                self.visibility,
                documents=torch.where(real, 0, PADDING),
                canvas=~of_prompt,
                positions=places,
            ),
            cache=self.cache,
            time=time,
            rows=torch.searchsorted(places, asked).clamp(max=places.shape[1] - 1),
        ).logits

    def keep(self, rows: Tensor) -> None:
        """Only some rows of the batch from now on, [B'] int64."""
        self._prompts, self.lengths = self._prompts[rows], self.lengths[rows]
        self._positions, self._window = self._positions.index_select(-2, rows), None
        self.cache = None if self.cache is None else self.cache.select(rows)

    def _stored(self, places: Tensor, real: Tensor) -> Tensor:
        """Where the rows are written; the same tensor as for the same window before."""
        assert self.cache is not None
        if self._window is None or places is not self._window[2]:
            return torch.where(real, places, self.cache.size)
        if len(self._window) == 4:
            self._window = (*self._window, torch.where(real, places, self.cache.size))
        return self._window[4]


def asked_twice(canvas: Canvas, cfg_scale: float, masks_draft: bool) -> Tensor:
    """The canvas's ids [B, N] as rows with their prompts see them; under guidance, then as those without do [2 B, N].

    Args:
        masks_draft: whether what was given on the canvas is a part of the prompt in this.
    """
    if not cfg_scale:
        return canvas.ids
    without = canvas.ids.masked_fill(~canvas.editable, canvas.mask_id) if masks_draft else canvas.ids
    return torch.cat([canvas.ids, without])


def guided(logits: Tensor, cfg_scale: float) -> Tensor:
    """Logits [B, K, V] of rows with their prompts, then of the same without: un + (cfg_scale + 1)(cond - un)."""
    if not cfg_scale:
        return logits
    with_prompt, without = logits.float().chunk(2)
    return without + (cfg_scale + 1) * (with_prompt - without)
