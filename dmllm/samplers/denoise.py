"""THE loop: model -> logits -> a process moves the canvas -> yield it, until every row is done.

Every row of the batch walks its own blocks and steps and draws from its own generator, so it gets the tokens that it
would get alone, whatever the other rows are. Streaming, step pictures and saved trajectories are this loop's yields.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Generator

from dmllm.samplers.absorbing import ABSORBING
from dmllm.samplers.ahead import ahead
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.constraint import Constraint
from dmllm.samplers.process import Predict, Process
from dmllm.samplers.stream import is_static
from dmllm.types import Step


def denoise(
    predict: Predict,
    canvas: Canvas,
    config: DecodeConfig,
    draws: list[Generator],
    constraint: Constraint | None = None,
    *,
    process: Process = ABSORBING,
) -> Iterator[Step]:
    """Fill the canvas; one `Step` after each model call, or a single one where nothing is unknown.

    Rows that are finished (all known, or known in order up to an end of sequence) take no part in later calls.

    Args:
        predict: the model, already given its prompts.
        canvas: `Canvas.of` or `Canvas.blank`; what is known stays as it is, and the canvas itself is not changed.
        config: how; its `max_new_tokens` plays no part, the canvas has its length.
        draws: one generator for each row of the canvas.
        constraint: what the texts must match, for a canvas that leaves room for it (`Constraint.check`).
        process: what the model undoes, one of `PROCESSES`.
    """
    assert len(draws) == len(canvas), (len(draws), len(canvas))
    canvas = process.begin(canvas, config, draws)
    if is_static(canvas.ids.device):
        yield from ahead(
            canvas,
            lambda now: process.advance(predict, now, config, draws, constraint),
            lambda now: process.finished(now, config),
        )
        return
    whole = part = canvas
    finished = process.finished(whole, config)
    if bool(finished.all()):
        yield Step(ids=whole.ids, committed=whole.committed, num_forwards=whole.forwards, finished=finished)
    while True:
        alive = (~process.finished(part, config)).nonzero().squeeze(1)
        if not len(alive):
            return
        if len(alive) < len(part):
            part = part.take(alive)
            draws = [draws[i] for i in alive.tolist()]
        part = process.advance(predict, part, config, draws, constraint)
        whole = whole.put(part)
        finished = process.finished(whole, config)
        yield Step(ids=whole.ids, committed=whole.committed, num_forwards=whole.forwards, finished=finished)
