"""A model that has been given its prompts: what the denoising loop calls.

The pictures are encoded once and the prompts embedded once. Where no prompt row sees the canvas, which the visibility
rule itself tells, the prompts' keys and values are computed once too, and a call feeds the canvas alone; that changes
no result. Otherwise a call feeds prompts and canvas together.

Shapes: B requests, P prompt rows (padded on the right), N canvas tokens, K positions asked for, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmllm.models.projectors import resize_maps
from dmllm.nn.cache import KVCache
from dmllm.nn.visibility import Visibility, layout
from dmllm.requests import fingerprint
from dmllm.samplers.canvas import Canvas
from dmllm.types import PADDING, TEXT, Batch


@dataclass(frozen=True)
class _Prompts:
    """The prompts of some requests, ready to be fed."""

    stream: Tensor  # [B, P, D] embeddings
    positions: Tensor  # [B, P + N]
    visibility: Visibility  # of P + N rows
    cache: KVCache | None

    def select(self, rows: Tensor) -> _Prompts:
        cache = None if self.cache is None else self.cache.select(rows)
        return _Prompts(self.stream[rows], self.positions[rows], self.visibility.select(rows), cache)


class Predictor:
    """`predictor(canvas, rows) -> logits [B, K, V]` for `samplers.denoise`.

    Args:
        model: a `MultimodalModel`, or what is called like one.
        prompts: one row a request, without labels.
        length: N.
        mask_id: the mask token.
        cfg_scale: above 0, each request is also asked without its prompt (every prompt row a mask token, image rows
            included) and the logits are un + (cfg_scale + 1)(cond - un).
        use_cache: None caches where it is exact; False never.

    Raises:
        ValueError: `use_cache=True` where a cache would change the result.
    """

    def __init__(
        self,
        model: Any,
        prompts: Batch,
        length: int,
        mask_id: int,
        *,
        cfg_scale: float = 0.0,
        use_cache: bool | None = None,
    ):
        self.model, self.cfg_scale = model, cfg_scale
        with torch.no_grad():
            features = encode_distinct(model, prompts)
            prompts = prompts.to(model.device)
            stream = model.embed(prompts.input_ids, prompts.image_slots, features)
            documents, positions = _with_canvas(prompts, length)
            if cfg_scale:
                masked = torch.full_like(prompts.input_ids, mask_id)
                stream = torch.cat([stream, model.embed(masked, torch.full_like(prompts.image_slots, TEXT))])
                documents, positions = documents.repeat(2, 1), positions.repeat(2, 1)
            canvas = torch.arange(documents.shape[1], device=documents.device) >= stream.shape[1]
            visibility = layout(model.config.visibility, documents=documents, canvas=canvas.expand_as(documents))
            cache = self._cache(stream, positions, visibility, use_cache)
        self._all = self._now = _Prompts(stream, positions, visibility, cache)
        self._requests: Tensor | None = None

    @torch.no_grad()
    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K]."""
        now = self._prompts_of(canvas.requests)
        given = now.stream.shape[1]
        ids = canvas.ids
        if self.cfg_scale:
            ids, rows = ids.repeat(2, 1), rows.repeat(2, 1)
        stream, positions, visibility = self.model.embed(ids), now.positions, now.visibility
        if now.cache is None:
            stream, rows = torch.cat([now.stream, stream], 1), rows + given
        else:
            positions, visibility = positions[:, given:], _columns(visibility, slice(given, None))
        logits = self.model(
            inputs_embeds=stream, positions=positions, visibility=visibility, cache=now.cache, rows=rows
        ).logits
        if not self.cfg_scale:
            return logits
        with_prompt, without = logits.float().chunk(2)
        return without + (self.cfg_scale + 1) * (with_prompt - without)

    def _prompts_of(self, requests: Tensor) -> _Prompts:
        """The prompts of the rows that are left; selected anew only when rows have left."""
        if self._requests is not requests:
            whole = len(self._all.stream) // (2 if self.cfg_scale else 1)
            if len(requests) == whole:
                self._now = self._all
            else:
                self._now = self._all.select(torch.cat([requests, requests + whole]) if self.cfg_scale else requests)
            self._requests = requests
        return self._now

    def _cache(
        self, stream: Tensor, positions: Tensor, visibility: Visibility, use_cache: bool | None
    ) -> KVCache | None:
        """The prompts' keys and values; None where there are none, or where they depend on the canvas."""
        given = stream.shape[1]
        if use_cache is False or not given:
            return None
        if bool(visibility.dense()[:, :, :given, given:].any()):
            if use_cache:
                raise ValueError(
                    f"use_cache=True: with visibility={self.model.config.visibility!r} the prompt sees the canvas, so "
                    "what is cached would change; leave use_cache out."
                )
            return None
        cache = KVCache()
        none = torch.zeros(0, dtype=torch.int64, device=stream.device)
        self.model(
            inputs_embeds=stream,
            positions=positions[:, :given],
            visibility=_columns(visibility, slice(given)),
            cache=cache,
            rows=none,
        )
        cache.storing = False
        return cache


def encode_distinct(model: Any, prompts: Batch) -> Tensor | None:
    """The image features of a batch [T * rows, D], each distinct tile encoded once; None without images."""
    if prompts.pixel_values is None:
        return None
    places: dict[str, int] = {}
    order = [places.setdefault(fingerprint(tile), len(places)) for tile in prompts.pixel_values]
    first = [order.index(k) for k in range(len(places))]
    features = model.encode_images(prompts.pixel_values[first].to(model.device))
    per_tile = features.view(len(places), -1, features.shape[-1])
    features = per_tile[torch.tensor(order, device=features.device)].flatten(0, 1)
    return features if prompts.image_resizes is None else resize_maps(features, prompts.image_resizes, model.image_grid)


def _with_canvas(prompts: Batch, length: int) -> tuple[Tensor, Tensor]:
    """Documents and positions [B, P + N]: the canvas continues each prompt's document from its own last position."""
    real = prompts.documents != PADDING
    following = torch.where(real, prompts.positions, -1).amax(1, keepdim=True) + 1 if real.shape[1] else _zero(real)
    places = following + torch.arange(length, device=real.device)
    documents = torch.cat([prompts.documents, torch.zeros_like(places)], 1)
    return documents, torch.cat([prompts.positions, places], 1)


def _zero(like: Tensor) -> Tensor:
    return torch.zeros(like.shape[0], 1, dtype=torch.int64, device=like.device)


def _columns(visibility: Visibility, which: slice) -> Visibility:
    return Visibility(visibility.rank[:, which], visibility.canvas[:, which], visibility.document[:, which])
