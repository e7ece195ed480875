"""A moving average of the weights that learn: what is validated and saved when `ema` is on.

average <- decay * average + (1 - decay) * weights after every step, with decay at most (1 + step) / (10 + step), so
that a short run's average is not its initialisation (the rule of TensorFlow's ExponentialMovingAverage).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dmllm.training.distributed import local, reshard


class Ema:
    """The averages by parameter name; sharded where the parameters are."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = self._pairs()
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model holds the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._pairs(), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        reshard(self.model)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        parameters = dict(self.model.named_parameters())
        return [local(a) for a in self.averages.values()], [local(parameters[n].detach()) for n in self.averages]
