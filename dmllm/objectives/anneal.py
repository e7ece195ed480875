"""Attention annealing: a causal model gets to see what is behind a token little by little.

    row q sees row k of what its visibility shows it  if  k is not behind q,  or  with probability r,

r rising evenly from 0 to 1 over the first steps of training. Which pairs of places are open is drawn anew each step and
is the same for all rows, layers and heads. At r = 0 a model under full attention computes what the causal one did that
it was made of, at r = 1 it is what will be saved (tests/objectives/test_anneal.py).

Source: DiffuLLaMA, arXiv:2410.17891, section 3.2, and its code: r = (step + 1) / steps. Shapes: B rows, L tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmllm.nn.visibility import Visibility
from dmllm.objectives.draws import Draws

STREAM = 7  # of the step's random numbers


def openness(draws: Draws, over: float) -> float:
    """r at this step, if it reaches 1 after `over` steps (below 1: that fraction of all steps); 1 outside training."""
    if draws.num_steps is None or not over:
        return 1.0
    return min(1.0, (draws.step + 1) / (over if over >= 1 else over * draws.num_steps))


def anneal(look: Visibility, places: Tensor, draws: Draws, r: float) -> Visibility:
    """The visibility of rows at `places` [B, L] of their documents, with what is behind a row open to the share r."""
    if r >= 1:
        return look
    length = int(places.max()) + 1
    row, column = torch.tril_indices(length, length, -1)
    extra = torch.ones(length, length, dtype=torch.bool).tril()
    extra[column, row] = draws.shared(len(row), STREAM) < r  # in an order that a longer batch continues
    return replace(look, place=places, extra=extra.to(places.device))
