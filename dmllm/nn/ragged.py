"""Rows without the waste: real ones laid end to end, and the visibility rule document by document.

A dense mask over a packed row of L computes L x L scores, most of which are hidden, and every padding row passes
through every layer. Here padding is left out, rows are sorted by document, and each document attends to the shared
prefix of its row and to itself. Results are those of the dense form (tests/nn/test_ragged.py). Shapes depend on the
data, which is free on a CPU and would be a synchronisation on a GPU. With a cache, rows that are fed windows of
different lengths are laid end to end for all but attention itself (`compact`).

Shapes: N real rows of the batch, G documents, Q and K the longest query and key lists, H heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.nn.cache import KVCache
from dmllm.nn.visibility import Visibility
from dmllm.types import PADDING, PREFIX

SHORTEST = 16  # rows; shorter documents are grouped together


@dataclass(frozen=True)
class Group:
    """Documents that are attended together, padded to the longest; indices count the sorted rows."""

    queries: Tensor  # [G, Q]
    keys: Tensor  # [G, K]
    mask: Tensor  # [G, 1, Q, K] bool
    real: Tensor  # int64 indices into G * Q of the queries that are not padding


@dataclass(frozen=True)
class EndToEnd:
    """Which rows of a batch [B, L] are real, in the order in which they are laid: `order` [N] indexes B * L."""

    order: Tensor
    shape: torch.Size  # B, L

    def gather(self, rows: Tensor) -> Tensor:
        """[B, L, ...] -> the real rows, in order, [1, N, ...]."""
        return rows.flatten(0, 1).index_select(0, self.order)[None]

    def scatter(self, rows: Tensor) -> Tensor:
        """[1, N, D] back into [B, L, D]; padding rows are zero."""
        empty = rows.new_zeros(self.shape.numel(), rows.shape[-1])
        return empty.index_copy(0, self.order, rows[0]).view(*self.shape, -1)


@dataclass(frozen=True)
class Compact(EndToEnd):
    """Rows fed to a cache, which attend by the mask of the whole batch."""

    mask: Any


def compact(visibility: Visibility, cache: KVCache, mask: Any) -> Any:
    """`mask` for rows laid end to end, where some are padding and how many is known without waiting; else `mask`."""
    if visibility.document.device.type != "cpu":
        return mask
    if "compact" not in cache.plan:
        order = (visibility.document != PADDING).flatten().nonzero().squeeze(1)
        padded = 0 < len(order) < visibility.document.numel()
        cache.plan["compact"] = Compact(order, visibility.document.shape, mask) if padded else mask
    return cache.plan["compact"]


@dataclass(frozen=True)
class Ragged(EndToEnd):
    """How the rows of one batch are sorted and grouped, without a cache."""

    groups: tuple[Group, ...]
    fused: bool = True  # whether float32 may take the fused kernel

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, N, d], k and v [1, H', N, d] -> [1, H, N, d]."""
        heads, shared = q.shape[1], k.shape[1]
        q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (q, k, v))  # [N, H * d]
        mixed = []
        for group in self.groups:
            keys, values = (_take(x, group.keys, shared).repeat_interleave(heads // shared, 1) for x in (k, v))
            part = _attend(_take(q, group.queries, heads), keys, values, group.mask, self.fused)
            mixed.append(part.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, group.real))
        return torch.cat(mixed).unflatten(1, (heads, -1)).transpose(0, 1)[None]


def ragged(visibility: Visibility, *, fused: bool = True) -> Ragged:
    """Sort and group the rows of a batch: prefixes first, then documents by the power of two that holds them."""
    batch, length = visibility.document.shape
    document = visibility.document.flatten()
    row = torch.arange(batch, device=document.device).repeat_interleave(length)
    real = (document != PADDING).nonzero().squeeze(1)
    place = row[real] * (int(document.max()) + 2) + document[real] + 1  # one number for each document of each row
    _, member, sizes = place.unique(return_inverse=True, return_counts=True)
    size = torch.where(document[real] == PREFIX, 0, (sizes[member] - 1).clamp(min=SHORTEST - 1).log2().int() + 1)
    sorting = (size * len(sizes) + member).argsort(stable=True)
    order = real[sorting]
    look = tuple(x.flatten()[order] for x in visibility.columns)

    _, lengths = member[sorting].unique_consecutive(return_counts=True)
    starts = lengths.cumsum(0) - lengths
    rows, kinds = row[order][starts], size[sorting][starts]
    is_prefix = kinds == 0
    prefix_start, prefix_length = (torch.zeros(batch, dtype=torch.int64, device=row.device) for _ in range(2))
    prefix_start[rows[is_prefix]], prefix_length[rows[is_prefix]] = starts[is_prefix], lengths[is_prefix]
    groups = []
    for kind in kinds.unique_consecutive().tolist():
        chosen = kinds == kind
        keys = queries = _span(starts[chosen], lengths[chosen])
        if kind:
            shared = _span(prefix_start[rows[chosen]], prefix_length[rows[chosen]])
            keys = tuple(torch.cat(pair, 1) for pair in zip(shared, queries))
        groups.append(_group(queries, keys, look, visibility))
    return Ragged(order, visibility.document.shape, tuple(groups), fused)


def _span(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Indices start, start + 1, ... of each list, padded to the longest, and which of them are real: [G, longest]."""
    steps = torch.arange(int(lengths.max()), device=starts.device)
    real = steps < lengths[:, None]
    return torch.where(real, starts[:, None] + steps, 0), real


def _group(
    queries: tuple[Tensor, Tensor], keys: tuple[Tensor, ...], look: tuple[Tensor, ...], visibility: Visibility
) -> Group:
    (q, q_real), (k, k_real) = queries, keys
    q_look, k_look = ([x[i].unsqueeze(d) for x in look] for i, d in ((q, 2), (k, 1)))
    mask = (visibility.sees(q_look, k_look) | (q[:, :, None] == k[:, None])) & k_real[:, None]
    return Group(q, k, mask[:, None], q_real.flatten().nonzero().squeeze(1))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fused: bool) -> Tensor:
    """Attention in plain steps: for short lists in bfloat16 on a CPU its backward takes a sixth of the fused kernel's
    time. A query that sees nothing (padding) gets a mean that is dropped. In float32, where nothing is hidden, it is
    the fused kernel, and rounds as published code does, which caches the prompt; or not `fused`, as older code."""
    if q.dtype == torch.float32 and bool(mask.all()):
        if fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    if q.dtype == torch.float32 and fused and len(q) == 1 and not torch.is_grad_enabled():
        seen = mask[0, 0]
        all_seen = seen.all(1)
        if bool(((seen == seen[0]).all(1) | all_seen).all()):  # a prompt that sees itself, an answer that sees both
            mixed = F.scaled_dot_product_attention(q, k, v)
            own = F.scaled_dot_product_attention(q[:, :, ~all_seen], k[:, :, seen[0]], v[:, :, seen[0]])
            mixed[:, :, ~all_seen] = own
            return mixed
    hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min / 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + hidden
    return scores.softmax(-1, dtype=torch.float32 if q.dtype == torch.float16 else q.dtype).to(v.dtype) @ v


def _take(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """Rows [N, H * d] at index [G, Q] -> [G, H, Q, d]. An embedding look-up, whose backward adds up in parallel."""
    return F.embedding(index, x).unflatten(2, (heads, -1)).transpose(1, 2)
