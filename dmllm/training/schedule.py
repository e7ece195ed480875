"""The learning rate's multiple as a pure function of the step, so that resuming needs no scheduler state.

The curves are transformers' own; they are read off a throw-away optimiser.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from dmllm.training.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """factor(step) for step = 0 ... steps - 1, in (0, 1]: the first step and the last move the weights too."""
    warmup, decay = _steps(config.warmup, steps), _steps(config.decay, steps)
    if config.name == "wsd" and warmup + decay > steps:
        raise ValueError(
            f"schedule.warmup ({warmup} steps) and schedule.decay ({decay} steps) exceed the run's {steps} steps; "
            f"try --schedule.decay={max(steps - warmup, 0)}."
        )
    optimiser = torch.optim.SGD([torch.zeros(())], lr=1.0)
    if config.name == "cosine":
        schedule = get_cosine_with_min_lr_schedule_with_warmup(optimiser, warmup, steps, min_lr_rate=config.min_ratio)
    elif config.name == "wsd":
        schedule = get_wsd_schedule(
            optimiser,
            warmup,
            decay,
            num_stable_steps=steps - warmup - decay,
            decay_type="linear",
            min_lr_ratio=config.min_ratio,
        )
    else:
        schedule = get_constant_schedule_with_warmup(optimiser, warmup)
    curve = schedule.lr_lambdas[0]
    return lambda step: curve(step + 1 if step < warmup else step)


def _steps(value: float, steps: int) -> int:
    """A number of steps given as such, or as a fraction of the run."""
    return round(value * steps) if value < 1 else round(value)
