"""How a canvas is denoised: how it begins, what a call makes of it, and when it is done.

What a model was trained to undo (its `process`) says which it is; `denoise` is the loop around all of them.
Shapes: B rows, N canvas tokens, K positions asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.constraint import Constraint

Predict = Callable[[Canvas, Tensor], Tensor]
"""(canvas, rows [B, K] int64) -> logits [B, K, V] at those positions; `canvas.requests` says whose rows they are."""

Advance = Callable[[Predict, Canvas, Any, list[Generator], Constraint | None], Canvas]
"""(predict, canvas, config, draws, constraint) -> the canvas after a model call; one generator for each row."""


def as_it_is(canvas: Canvas, config: Any, draws: list[Generator]) -> Canvas:
    """A canvas of masks is where denoising begins."""
    return canvas


@dataclass(frozen=True)
class Process:
    """The three verbs. None of them lets the host wait for a GPU."""

    advance: Advance
    finished: Callable[[Canvas, Any], Tensor]  # (canvas, config) -> [B] bool: needs no further call
    begin: Callable[[Canvas, Any, list[Generator]], Canvas] = as_it_is  # before the first call
    log_likelihood: Any = None  # (predict, answer, generator, num_samples, batch_size) -> a bound in nats, where known
    grows: bool = False  # whether tokens are inserted, so that a hole need not have a length
    masks: bool = False  # whether what is not known is a mask, so that what it hides at random has a likelihood
