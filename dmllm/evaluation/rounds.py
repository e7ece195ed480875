"""Measuring in rounds: everything takes its turn (A, B, C, A, B, C, ...), and what else a machine does meets all alike.

Ratios are taken within a round. A quantity is its median over rounds, with the least and the greatest in brackets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Taken = list[tuple[float, Any]]  # round by round, an action's seconds and what it returned


@dataclass(frozen=True)
class Spread:
    """A quantity over rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of its values, one a round."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{short(self.median)} [{short(self.least)}, {short(self.greatest)}]"

    def percent(self) -> str:
        """A fraction in percent."""
        return str(Spread(*(100 * value for value in (self.median, self.least, self.greatest)))).replace(" ", " % ", 1)


def in_turn(
    actions: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float, device: torch.device
) -> dict[str, Taken]:
    """Run all actions round by round, after a first round that does not count.

    Args:
        rounds: at least so many.
        seconds: and for about so long for each action.
    """
    taken: dict[str, Taken] = {name: [] for name in actions}
    for action in actions.values():
        action()
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < seconds * len(actions):
        for name, action in actions.items():
            before = _now(device)
            found = action()
            taken[name].append((_now(device) - before, found))
        done += 1
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """above / below, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def sheet(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "   ".join([first.ljust(widths[0]), *cells]))
    return lines


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
