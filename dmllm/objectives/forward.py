"""The model called on a batch that an objective has laid out: one place that knows its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dmllm.nn.visibility import Visibility
from dmllm.types import Batch


def forward(
    model: Callable[..., Any],
    batch: Batch,
    visibility: Visibility,
    rows: Tensor,
    time: Tensor | None = None,
    **more: Any,
) -> Any:
    """What the model says of a batch; `logits` [N, V] of the `rows` [N] of it, flat. `more` is for further heads."""
    return model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        image_resizes=batch.image_resizes,
        image_grids=batch.image_grids,
        image_slots=batch.image_slots,
        positions=batch.positions,
        visibility=visibility,
        time=time,
        rows=rows,
        **more,
    )
