"""A model with its requests' streams: each a prompt and the canvas right behind it, of which a call feeds a part.

Rows of the batch need not be fed the same part, nor all of them. What is fed sees what has been fed before, through a
cache in which each place of the stream has its own. On a GPU no shape depends on data and the host never waits: windows
have the width that is asked for, and calls with few rows are replayed as CUDA graphs.

Shapes: B rows of the batch (twice the requests under guidance), P prompt rows (padded on the right), N canvas tokens,
S >= P + N places, W rows fed, K positions asked for, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmllm.nn.cache import KVCache
from dmllm.nn.graphs import ROWS, Graphed, capturable
from dmllm.nn.visibility import Visibility, layout
from dmllm.samplers.canvas import Canvas
from dmllm.types import PADDING, PREFIX

Call = Callable[..., Tensor]
"""(model, cache, *tensors) -> what is asked of the rows fed, as `call_model`."""


class Stream:
    """What a model was given, and which rows of it each call feeds.

    Args:
        model: what is called like a `MultimodalModel`.
        prompts: [B, P, D], the prompts' embeddings.
        positions: [B, P + N] or [4, B, P + N], of the prompts and of the canvas behind each.
        lengths: [B], how many of the P are real.
        length: N.
        visibility: a name of `LAYOUTS` or block:N; places are counted from each prompt's first row.
        cache: with S places; None feeds everything that is to be seen.
        copies: rows for each request: 2 under guidance, the second time without their prompts.
        prefix: [B], how many of the prompts' first rows are of document PREFIX; None is none.
        counts: `lengths` as numbers on the host; None reads them.
        loaded: how many of each prompt's first rows stand in the cache already; None is none.
        keep: called once those rows of all prompts stand there that are the same whatever comes behind them.
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
        *,
        copies: int = 1,
        prefix: Tensor | None = None,
        counts: Sequence[int] | None = None,
        loaded: Sequence[int] | None = None,
        keep: Callable[[], None] | None = None,
    ):
        self.model, self.lengths, self.length, self.visibility, self.cache = model, lengths, length, visibility, cache
        self.copies = copies
        self.static = is_static(lengths.device)
        self.loaded = [0] * len(lengths) if loaded is None else list(loaded)
        self._counts, self._keep = lengths.tolist() if counts is None else list(counts), keep
        self._prompts, self._positions = prompts, positions
        self._prefix = torch.zeros_like(lengths) if prefix is None else prefix
        self._captures = self.static and cache is not None and capturable(model)
        self._requests = torch.arange(len(lengths) // copies, device=lengths.device)
        self._window: tuple[Tensor, ...] | None = None

    @property
    def given(self) -> int:
        """P."""
        return self._prompts.shape[1]

    @property
    def all_given(self) -> bool:
        """Whether every request has a prompt."""
        return min(self._counts, default=0) > 0

    def shared(self, copies: int) -> Stream:
        """This stream, its rows being `copies` times those of the requests, the first of each, then the second ones:
        the same canvas behind other prompts."""
        assert self.copies == 1, "rows are shared once"
        self.copies, self._requests = copies, self._requests[: len(self.lengths) // copies]
        return self

    def follow(self, requests: Tensor) -> Tensor | None:
        """Only the rows of `requests` [B'] from now on; which of the rows these are, None if nothing has changed."""
        if requests is self._requests:
            return None
        known, self._requests = self._requests, requests
        if len(known) == len(requests) and (self.static or torch.equal(known, requests)):
            return None
        rows = torch.searchsorted(known, requests)
        rows = torch.cat([rows + copy * len(known) for copy in range(self.copies)])
        self._prompts, self.lengths, self._prefix = self._prompts[rows], self.lengths[rows], self._prefix[rows]
        self._positions, self._window = self._positions.index_select(-2, rows), None
        self.cache, self._keep = None if self.cache is None else self.cache.select(rows), None
        return rows

    def fork(self, count: int) -> Stream:
        """`count` streams that start where this one, of a single request, is; it stays as it is."""
        assert len(self._requests) == 1, "a fork is of one request"
        rows = torch.arange(self.copies, device=self.lengths.device).repeat_interleave(count)
        other = copy.copy(self)
        other._requests, other._window = self._requests.repeat(count), None
        other._prompts, other.lengths, other._prefix = self._prompts[rows], self.lengths[rows], self._prefix[rows]
        other._positions = self._positions.index_select(-2, rows)
        other.cache = None if self.cache is None else self.cache.select(rows)
        return other

    def run(self, first: Tensor, end: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The places from `first` to `end` [B], [B, W], and which of them are real; the same ones as in the last call,
        if nothing has moved. `width` is the largest W may be."""
        if self.static:
            places = first[:, None] + torch.arange(width, device=first.device)
            return places, places < end[:, None]
        window = (first, end)
        if self._window is not None and all(map(torch.equal, window, self._window[:2])):
            return self._window[2], self._window[3]
        places = first[:, None] + torch.arange(int((end - first).max()), device=first.device)
        self._window = (*window, places, places < end[:, None])
        return self._window[2], self._window[3]

    @torch.no_grad()
    def store(self, multiple: int = 1, left: int = 0) -> None:
        """Computes the prompts for the cache alone, as far as they are whole multiples of so many rows, but for the
        last `left`; what has been loaded, in whole multiples too, is not computed again."""
        ends = [(count - left) // multiple * multiple for count in self._counts]
        if (width := max((end - known for end, known in zip(ends, self.loaded, strict=True)), default=0)) > 0:
            first, end = (torch.tensor(places, device=self.lengths.device) for places in (self.loaded, ends))
            nothing = torch.zeros(len(end), max(self.length, 1), dtype=torch.int64, device=end.device)
            window = self.run(first, end, width)
            self.feed(nothing, *window, nothing[:, :0], nothing[:, 0].float())
        if not left:
            self.stored()

    def stored(self) -> None:
        """Says that the prompts' rows are in place, as far as they do not depend on the canvas."""
        if self._keep is not None:
            self._keep()
            self._keep = None

    def feed(
        self,
        ids: Tensor,
        places: Tensor,
        real: Tensor,
        asked: Tensor,
        time: Tensor,
        rows: Tensor | None = None,
        call: Call | None = None,
        order: tuple[Tensor, Tensor] | None = None,
        soft: tuple[Tensor, Tensor] | None = None,
        heard: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits [B, K, V], or what `call` makes of the model.

        Args:
            ids: [B, N], the canvas.
            places: [B, W] ascending, what is fed, where `real` [B, W].
            asked: [B, K], the places whose tokens are asked for, each among those fed.
            time: [B] or [B, W], for models conditioned on it.
            rows: [B] int64, of which rows of the batch all this is; None is all.
            call: what is asked of the model, a function as `call_model`, which it is where this is None.
            order: [B, N] each, ranks of the canvas's tokens and which are known, where the layout does not say it.
            heard: [B, K', V] and [B, K'], what the model has said before, of which of the canvas's places; -1 of none.
            soft: [B, N, F] and [B, N], what stands in place of the canvas's tokens (the model's `enter`), and where.
        """
        call = call_model if call is None else call
        prompts, positions = self._prompts, self._positions
        lengths, prefix = self.lengths[:, None], self._prefix[:, None]
        if rows is not None:
            prompts, positions = prompts[rows], positions.index_select(-2, rows)
            lengths, prefix = lengths[rows], prefix[rows]
        of_prompt = places < lengths
        of_canvas = (places - lengths).clamp(0, self.length - 1)
        stream = self.model.embed(ids.gather(1, of_canvas))
        if soft is not None:
            latents = soft[0].gather(1, of_canvas[..., None].expand(-1, -1, soft[0].shape[-1]))
            stream = torch.where(soft[1].gather(1, of_canvas)[..., None], self.model.enter(latents), stream)
        if self.given:
            column = places.clamp(max=self.given - 1)[..., None].expand(-1, -1, prompts.shape[-1])
            stream = torch.where(of_prompt[..., None], prompts.gather(1, column), stream)
        if heard is not None:
            stream = self._told(stream, places - lengths, *heard)
        column = torch.where(of_prompt, places, places - lengths + self.given).clamp(max=positions.shape[-1] - 1)
        rule = layout(
            self.visibility,
            documents=torch.where(real, torch.where(places < prefix, PREFIX, 0), PADDING),
            canvas=~of_prompt,
            positions=places,
        )
        if order is not None:
            rank, known = (x.gather(1, of_canvas) for x in order)
            rule = replace(rule, rank=torch.where(of_prompt, rule.rank, rank), canvas=rule.canvas & ~known)
        inputs = (
            stream,
            positions.gather(-1, column.expand(*positions.shape[:-1], -1)),
            *(rule.rank, rule.canvas, rule.document),
            torch.searchsorted(places, asked).clamp(max=places.shape[1] - 1),
            time,
        )
        if self.cache is None:
            return call(self.model, None, *inputs)
        stored = self._stored(places, real)
        if self._captures and rows is None and places.numel() <= ROWS and asked.numel():
            key = (call, *(x.shape for x in inputs))
            graph = self.cache.graphs.setdefault(key, Graphed(Cached(self.model, self.cache, call)))
            return graph(*inputs, stored)
        self.cache.put(stored, rows)
        return call(self.model, self.cache, *inputs)

    def _told(self, stream: Tensor, fed: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        """The stream [B, W, D], told what the model has said of the canvas's places `rows` where these are `fed`."""
        at = torch.searchsorted(fed.contiguous(), rows).clamp(max=fed.shape[1] - 1)
        there = (fed.gather(1, at) == rows) & (rows >= 0)
        first = fed.shape[1] * torch.arange(len(fed), device=fed.device)[:, None]
        return self.model.hear(stream, logits.flatten(0, 1), torch.where(there, first + at, -1).flatten())

    def _stored(self, places: Tensor, real: Tensor) -> Tensor:
        """Where the rows are written; the same tensor as for the same window before."""
        assert self.cache is not None
        if self._window is None or places is not self._window[2]:
            return torch.where(real, places, self.cache.size)
        if len(self._window) == 4:
            self._window = (*self._window, torch.where(real, places, self.cache.size))
        return self._window[4]


def is_static(device: torch.device) -> bool:
    """Whether no shape may depend on data, for which the host would wait."""
    return device.type == "cuda"


class Cached:
    """The model on one cache, as a function of tensors alone; not of a request, so that another can take it over."""

    def __init__(self, model: Any, cache: KVCache, call: Call):
        self.model, self.cache, self.call = model, cache, call

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As `call_model`; the last of the inputs says where rows are written."""
        self.cache.put(inputs[-1][:])  # other places, even in the same memory
        return self.call(self.model, self.cache, *inputs[:-1])


def ask(model: Any, cache: KVCache | None, inputs: Sequence[Tensor], **asked: Any) -> Any:
    """The model's output for the stream [B, W, D] of `inputs`: it, its positions, the three columns of the rule, the
    rows asked for [B, K], the time. `asked` says what of it: rows, parts, heads, ..."""
    stream, positions, *rule, _, time = inputs
    given = {"inputs_embeds": stream, "positions": positions, "visibility": Visibility(*rule), "cache": cache}
    return model(**given, time=time, **asked)


def call_model(model: Any, cache: KVCache | None, *inputs: Tensor) -> Tensor:
    """Logits [B, K, V] of the rows asked for; `inputs` as those of `ask`."""
    return ask(model, cache, inputs, rows=inputs[-2]).logits


def asked_twice(canvas: Canvas, cfg_scale: float, masks_draft: bool) -> Tensor:
    """The canvas's ids [B, N] as rows with their prompts see them; under guidance, then as those without do [2 B, N].

    Args:
        masks_draft: whether what was given on the canvas is a part of the prompt in this.
    """
    if not cfg_scale:
        return canvas.ids
    without = canvas.ids.masked_fill(~canvas.editable, canvas.mask_id) if masks_draft else canvas.ids
    return torch.cat([canvas.ids, without])


def heard_of(canvas: Canvas, copies: int) -> tuple[Tensor, Tensor] | None:
    """What the model has said of the canvas, for each copy of its rows: as `Stream.feed` takes it."""
    if canvas.heard is None:
        return None
    return canvas.heard.logits.repeat(copies, 1, 1), canvas.heard.rows.repeat(copies, 1)


def guided(logits: Tensor, cfg_scale: float) -> Tensor:
    """Logits [B, K, V] of rows with their prompts, then of the same without: un + (cfg_scale + 1)(cond - un)."""
    if not cfg_scale:
        return logits
    with_prompt, without = logits.float().chunk(2)
    return without + (cfg_scale + 1) * (with_prompt - without)
