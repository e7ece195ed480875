"""Prompts in front of a canvas: pictures encoded, ids embedded, and what of them need not be computed again.

The pictures are encoded once and the prompts embedded once. Where no prompt row sees the canvas, which the visibility
rule itself tells, the prompts' keys and values are computed once too; that changes no result.

Shapes: B requests, P prompt rows (padded on the right), N canvas tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.computed import Kept, is_timed
from dmllm.nn.graphs import Workspaces
from dmllm.nn.visibility import ORDERED, check_layout
from dmllm.samplers import process_of
from dmllm.samplers.policy import CachePolicy
from dmllm.samplers.stream import Stream
from dmllm.types import PADDING, PREFIX, TEXT, Batch


def predicts_next(model: Any, kind: str) -> bool:
    """Whether, under the visibility `kind`, a row says what follows all that it sees: then one is fed at a time."""
    return kind == "causal" and bool(model.config.shift) and process_of(model).masks


def keeps_cache(
    model: Any, prompts: Batch, kind: str, use_cache: bool | None, policy: CachePolicy | None = None
) -> bool:
    """Whether keys and values are kept: by the policy, or else where that changes nothing.

    Raises:
        ValueError: visibility `kind` or `use_cache` goes against it.
    """
    if policy is not None and kind != "full":
        raise ValueError(
            f"cache={policy.kind} is for models with full attention; with visibility={kind!r} what can be kept is "
            "kept anyway, exactly. Leave cache out."
        )
    if policy is not None and use_cache is not None:
        raise ValueError(f"use_cache={use_cache} and cache={policy.kind} say different things; give one of them.")
    if policy is not None or use_cache is False or check_layout(kind) is not None:
        return use_cache is not False
    timed = is_timed(model)
    changes = timed or kind == "full"
    if changes and use_cache:
        why = "is told the time" if timed else "sees the canvas"
        raise ValueError(
            f"use_cache=True: with visibility={kind!r} the prompt {why}, so what is cached would change; leave "
            "use_cache out."
        )
    return not changes and (prompts.input_ids.shape[1] > 0 or kind == ORDERED)


@torch.no_grad()
def stream_of(
    model: Any,
    prompts: Batch,
    length: int,
    visibility: str,
    *,
    cached: bool,
    blank: int | None = None,
    workspaces: Workspaces | None = None,
    kept: Kept | None = None,
    streams: int = 1,
) -> Stream:
    """The prompts, pictures encoded, with a canvas of `length` tokens behind each.

    Args:
        cached: whether the stream keeps keys and values.
        blank: a mask token that takes the place of every prompt row, image rows included, in a second copy below.
        workspaces: where a GPU's cache comes from.
        kept: what earlier requests have computed.
        streams: how many times the canvas stands there, at the same positions.
    """
    kept = Kept.of(0, 0) if kept is None else kept
    features, given = kept.images(model, prompts), prompts
    prompts = prompts.to(model.device)
    stream = model.embed(prompts.input_ids, prompts.image_slots, features)
    positions, length = _positions(prompts, length, streams), length * streams
    lengths, copies = lengths_of(model, prompts), 1 if blank is None else 2
    if blank is not None:
        hidden = torch.full_like(prompts.input_ids, blank)
        stream = torch.cat([stream, model.embed(hidden, torch.full_like(prompts.image_slots, TEXT))])
        positions, lengths = torch.cat([positions, positions], -2), lengths.repeat(2)
    size, where = stream.shape[1] + length, Workspaces(0) if workspaces is None else workspaces
    cache = where.take(len(stream), size, model) if cached else None
    per_tile = 0 if features is None or given.pixel_values is None else len(features) // len(given.pixel_values)
    loaded, keep = kept.prompts.load(model, cache, visibility, given, per_tile, blank)
    told = {
        "prefix": (prompts.documents == PREFIX).sum(1).repeat(copies),
        "counts": (given.documents != PADDING).sum(1).tolist() * copies,
        "loaded": loaded,
        "keep": keep,
    }
    return Stream(model, stream, positions, lengths, length, visibility, cache, copies=copies, **told)


def lengths_of(model: Any, prompts: Batch) -> Tensor:
    return (prompts.documents != PADDING).sum(1).to(model.device)


def _positions(prompts: Batch, length: int, streams: int) -> Tensor:
    """Positions [B, P + N] or [4, B, P + N]: the canvas continues each prompt from its own last one, which on three
    axes is the largest of the three; once for each stream."""
    real, positions = prompts.documents != PADDING, prompts.positions
    after = F.pad(torch.where(real, positions, -1), (1, 0), value=-1).amax(-1, keepdim=True) + 1
    if positions.ndim == 3:
        after = torch.cat([after[:1], after[1:].amax(0, keepdim=True).expand(3, -1, -1)])
    following = after + torch.arange(length, device=real.device)  # [B, N] or [4, B, N]
    return torch.cat([positions, *[following] * streams], -1)
