"""What a model has said last of every place of the canvas, for one that hears it in its next call (self-conditioning).

Shapes: B rows, N canvas tokens, K places asked for, V ids.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.estimate import Heard
from dmllm.samplers.process import Predict


def remembered(predict: Predict, canvas: Canvas, rows: Tensor, logits: Tensor, open_: Tensor) -> Canvas:
    """The canvas with what the model has said last of every place, for one that hears it: now of `rows` [B, K] where
    `open_`."""
    if not getattr(predict, "hears", False):
        return canvas
    batch, size = canvas.ids.shape
    before = canvas.heard
    if before is None:
        nothing = logits.new_zeros(batch, size, logits.shape[-1])
        before = Heard(torch.full_like(canvas.ids, -1), nothing)
    there = put(torch.zeros_like(canvas.committed), rows, open_, open_)
    index = torch.where(open_, rows, size)  # what is no place of its own goes past the end
    said = torch.cat([before.logits, before.logits[:, :1]], 1)
    said = said.scatter(1, index[..., None].expand_as(logits), logits)[:, :size]
    places = torch.arange(size, device=rows.device).expand_as(canvas.ids)
    return replace(canvas, heard=Heard(torch.where(there, places, before.rows), said))


def for_hearing(canvas: Canvas) -> Canvas:
    """What was said of blocks that are finished is heard no more: they are a part of what is given."""
    if canvas.heard is None or canvas.block_length is None:
        return canvas
    places = torch.arange(canvas.ids.shape[1], device=canvas.ids.device) + canvas.offset[:, None]
    now = places // canvas.block_length == canvas.block[:, None]
    return replace(canvas, heard=Heard(canvas.heard.rows.masked_fill(~now, -1), canvas.heard.logits))


def put(values: Tensor, rows: Tensor, new: Tensor, where: Tensor) -> Tensor:
    """`values` [B, N] with `new` [B, K] at `rows` [B, K] where `where`, elsewhere rows are padding."""
    there = torch.zeros(values.shape, dtype=torch.int64, device=values.device).scatter_add_(1, rows, where.long())
    found = torch.zeros_like(values, dtype=new.dtype if new.dtype != torch.bool else torch.int64)
    found = found.scatter_add_(1, rows, new.to(found.dtype) * where)
    return torch.where(there.bool(), found.to(values.dtype), values)
