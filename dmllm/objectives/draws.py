"""Random numbers of training, keyed by (seed, step, global example index).

An example draws the same numbers however the step is split into micro-batches and processes, whatever the padding and
on whatever device; a resumed run draws what the uninterrupted one would have. Philox is a counter-based generator
(Salmon et al., SC'11), so a key costs microseconds and no state is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The draws of one micro-batch of one step."""

    seed: int
    step: int
    num_examples: int  # in the whole step, over all micro-batches and processes
    indices: Tensor  # [B] int64, global example indices
    num_steps: int | None = None  # of the run; None where nothing is trained: as at its end

    def uniform(self, length: int, stream: int = 0) -> Tensor:
        """[B, length] in [0, 1), float32, on the CPU; a prefix of what a greater length would give. Another `stream`
        gives other numbers, for what is drawn besides."""
        rows = [self._generator(int(index), stream).random(length, dtype=np.float32) for index in self.indices]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, length)

    def shared(self, length: int, stream: int = 0) -> Tensor:
        """[length] in [0, 1), float32, the same for all of the step; a prefix of what a greater length would give."""
        return torch.from_numpy(self._generator(-1, stream + 1).random(length, dtype=np.float32))

    def passed(self, moment: float) -> bool:
        """Whether training has reached a moment: a step or, below 1, a fraction of all steps."""
        return self.num_steps is None or self.step >= (moment if moment >= 1 else moment * self.num_steps)

    def stratified(self, strata: int = 1) -> Tensor:
        """[B, strata] in [0, 1): one offset a step, examples spread evenly over the whole step's interval.

        Each entry alone is uniform; together they cover [0, 1) far more evenly than independent draws (the low
        variance of MDLM's antithetic sampler), and further columns (documents of a packed row) are spread by the
        golden ratio.
        """
        offset = float(self._generator(-1).random())
        place = (self.indices % self.num_examples).double() / self.num_examples
        column = torch.arange(strata, dtype=torch.float64) * GOLDEN
        return ((offset + place[:, None] + column) % 1.0).float().clamp(max=1 - 2**-24)

    def _generator(self, index: int, stream: int = 0) -> np.random.Generator:
        counter = [0, stream, index + 1, self.step]  # the first word is the generator's own running count
        return np.random.Generator(np.random.Philox(counter=counter, key=self.seed))
