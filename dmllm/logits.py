"""Logits of rows of ids at the caller's columns, for `Pipeline.logits`: whatever stands between them in the stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmllm.encoded import EncodedImages
from dmllm.nn.rope import places
from dmllm.nn.visibility import check_layout, layout
from dmllm.requests import Asked
from dmllm.types import Batch


@torch.no_grad()
def aligned_logits(
    model: Any,
    asked: list[Asked],
    batch: Batch,
    time: Tensor | None,
    canvas: Tensor | None,
    visibility: str | None,
    feedback: Tensor | None,
    images: EncodedImages,
) -> Tensor:
    """Logits [B, P, V] of the rows `asked` about, which `batch` holds; the rest is as in `Pipeline.logits`."""
    if feedback is not None and not getattr(model, "takes_feedback", False):
        raise ValueError("This model is not conditioned on its own logits; leave feedback out.")
    if visibility is not None and hasattr(model, "denoise"):
        raise ValueError("visibility= is not for a model that transformers computes in its own way; leave it out.")
    features = images(model, batch)
    columns = torch.zeros_like(batch.input_ids)
    for row, own in enumerate(asked):
        columns[row, : len(own.columns)] = own.columns
    batch, device = batch.to(model.device), model.device

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if values.ndim == 3:
            return values.cpu().gather(1, columns[..., None].expand(-1, -1, values.shape[-1])).to(device)
        return (values.cpu().gather(1, columns) if values.ndim == 2 else values).to(device)

    rule, noised = None, spread(canvas)
    if visibility is not None:
        check_layout(visibility)
        noised = batch.documents >= 0 if noised is None else noised
        rule = layout(visibility, documents=batch.documents, canvas=noised, positions=places(batch.positions))
    return model(
        input_ids=batch.input_ids,
        image_slots=batch.image_slots,
        image_features=features,
        documents=batch.documents,
        positions=batch.positions,
        canvas=noised,
        visibility=rule,
        time=spread(time),
        rows=torch.stack([own.rows for own in asked]).to(device),
        **({} if feedback is None else {"feedback": spread(feedback)}),
    ).logits
