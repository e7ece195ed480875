"""In which order the codes of a picture are found: noise on how sure each is, or a fixed order that spreads them.

MaskGIT ranks codes by log p(chosen) + temperature (1 - r) Gumbel, r being the share of calls that are over. Halton's
sequence in bases 2 and 3 puts codes found in one call far from each other, since neighbours tell most of one another.

Sources: Chang et al., MaskGIT, arXiv:2202.04200, section 3.2 and its code (parallel_decode.py); Besnier et al., Halton
scheduler, arXiv:2503.17076. Shapes: B rows of the batch, K positions asked for, N places of the canvas.
"""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import REMASKING, DecodeConfig
from dmllm.samplers.estimate import Estimate
from dmllm.samplers.schedules import MASKGIT, cooled

TINY = 1e-20  # below which the authors see no probability


def doubts(canvas: Canvas, config: DecodeConfig, seen: Estimate, rows: Tensor, uniform: Tensor, steps: int) -> Tensor:
    """The doubt about each position `rows` [B, K] by the settings' rule, the least doubtful being committed first.

    Args:
        uniform: [B, K] in [0, 1), for orders that are drawn.
        steps: calls on the block.
    """
    if config.remasking == "sequential" and canvas.order is not None:
        return canvas.order.gather(1, rows).float()
    if config.remasking != "low_confidence" or not (config.order_temperature or config.schedule in MASKGIT):
        return REMASKING.load(config.remasking)(seen, uniform)
    unsure = (seen.others.log1p() - seen.chosen.log()).clamp(max=-math.log(TINY))
    if not config.order_temperature:
        return unsure
    scales = cooled(config.order_temperature, config.order_cooling, steps, rows.device)
    noise = -(-uniform.clamp(min=TINY).log()).clamp(min=TINY).log()
    return unsure - scales[canvas.calls.clamp(max=steps - 1)][:, None] * noise


@lru_cache(maxsize=64)
def halton(rows: int, columns: int) -> tuple[int, ...]:
    """When the turn of each code of a picture is, in reading order: 0, 1, ... by the first point of Halton's sequence
    (base 2 across, base 3 down) that falls into it."""
    turn: dict[tuple[int, int], int] = {}
    point = 0
    while len(turn) < rows * columns:
        place = int(_inverse(point, 3) * rows), int(_inverse(point, 2) * columns)
        turn.setdefault(place, len(turn))
        point += 1
    return tuple(turn[row, column] for row in range(rows) for column in range(columns))


def _inverse(number: int, base: int) -> float:
    """The digits of a number behind the point, in reverse."""
    found, part = 0, 1
    while number:
        number, digit = divmod(number, base)
        found, part = found * base + digit, part * base
    return found / part
