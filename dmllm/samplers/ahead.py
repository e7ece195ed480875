"""The denoising loop where the host must not wait: one call ahead of what is known to be finished.

On a GPU the host learns a call late whether a row is finished. Until then such a row is computed with the others and
stays as it is; a call that turns out to serve no row is not counted among the forwards, but beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.types import Step


@dataclass(frozen=True)
class Flag:
    """A boolean on its way from a GPU to the host."""

    value: Tensor
    arrived: torch.cuda.Event

    @staticmethod
    def send(value: Tensor) -> Flag:
        """`value` is a bool scalar on a GPU; nothing waits for it."""
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Flag(host, event)

    def read(self) -> bool:
        """Waits for it alone, not for what was launched after it."""
        self.arrived.synchronize()
        return bool(self.value)


def ahead(
    canvas: Canvas, advance: Callable[[Canvas], Canvas], is_finished: Callable[[Canvas], Tensor]
) -> Iterator[Step]:
    """What `denoise` yields, for a canvas on a GPU, each step once it is known whether the one before was the last.

    Args:
        advance: one model call.
        is_finished: [B] bool, the rows that need no further one.
    """
    finished = is_finished(canvas)
    known: tuple[Step, Flag] = step_of(canvas, finished), Flag.send(finished.all())
    if known[1].read():
        yield known[0]
        return
    before: tuple[Step, Flag] | None = None
    while True:
        canvas = advance(canvas).keep(finished, canvas)
        finished = is_finished(canvas)
        now = step_of(canvas, finished), Flag.send(finished.all())
        if before is not None:
            if before[1].read():
                yield replace(before[0], num_wasted=1)
                return
            yield before[0]
        before = now


def step_of(canvas: Canvas, finished: Tensor) -> Step:
    """What is known after a call."""
    return Step(ids=canvas.ids, committed=canvas.committed, num_forwards=canvas.forwards, finished=finished)
