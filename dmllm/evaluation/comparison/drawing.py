"""Lines of several paradigms in one picture, as SVG that stands alone: no library, no script, no style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from dmllm.evaluation.charts import ticks

WIDTH, HEIGHT = 720, 300
LEFT, TOP, BOTTOM, LEGEND = 56, 14, 44, 176  # the legend is to the right
COLOURS = ("#5145cd", "#e07b00", "#15803d", "#c2273d", "#0e7490", "#a21caf", "#65a30d", "#475569", "#b45309", "#1d4ed8")
INK, RULE = "#666c80", "#e6e8f0"
STEPS = (1, 2, 5)  # where a logarithmic axis is marked, in each power of ten


@dataclass(frozen=True, kw_only=True)
class Line:
    """One paradigm's points (x, y, low, high), low and high where an interval is known."""

    label: str
    points: Sequence[tuple[float, float, float | None, float | None]]


def lines(drawn: Sequence[Line], *, across: str, up: str, log: bool = False, least: float | None = None) -> Markup:
    """The lines with their intervals; nothing where there is no point.

    Args:
        across, up: what the axes say.
        log: whether the axis across is logarithmic.
        least: a value that cannot be gone below, as a dashed line.
    """
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return Markup("")
    xs = [p[0] for one in drawn for p in one.points]
    ys = [v for one in drawn for p in one.points for v in p[1:] if v is not None] + ([] if least is None else [least])
    heights = ticks(min(ys), max(ys)) if max(ys) > min(ys) else [min(ys) - 0.1, min(ys), min(ys) + 0.1]
    places = _marks(min(xs), max(xs)) if log else ticks(min(xs), max(xs))
    low, high = min(heights[0], min(ys)), max(heights[-1], max(ys))
    first, last = (math.log(min(xs)), math.log(max(xs))) if log else (min(xs), max(xs))
    right, bottom = WIDTH - LEGEND, HEIGHT - BOTTOM

    def x(value: float) -> float:
        place = math.log(value) if log else value
        return LEFT + 8 + (right - LEFT - 16) * (place - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return TOP + (bottom - TOP) * (high - value) / ((high - low) or 1)

    parts = [_head(f"{up} against {across}")]
    for value in heights:
        parts.append(_rule(LEFT, right, y(value)) + _text(LEFT - 8, y(value) + 4, f"{value:g}", "end"))
    for value in places:
        if min(xs) <= value <= max(xs):
            parts.append(_text(x(value), bottom + 18, f"{value:g}", "middle"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 6, across, "middle") + _text(LEFT, TOP - 3, up, "start"))
    if least is not None:
        parts.append(_rule(LEFT, right, y(least), dashed=True))
    for number, one in enumerate(drawn):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in one.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-opacity=".85"/>')
        for place, value, under, over in one.points:
            if under is not None and over is not None:
                ends = f'x1="{x(place):.1f}" x2="{x(place):.1f}" y1="{y(under):.1f}" y2="{y(over):.1f}"'
                parts.append(f'<line {ends} stroke="{colour}" stroke-opacity=".45"/>')
            if len(one.points) < 20:
                parts.append(f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>')
        down = TOP + 12 + 20 * number
        parts.append(f'<rect x="{right + 14}" y="{down - 9}" width="12" height="9" rx="3" fill="{colour}"/>')
        parts.append(_text(right + 32, down, one.label, "start"))
    return Markup("".join([*parts, "</svg>"]))


def _marks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in STEPS]


def _head(said: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(said)}">'
    )


def _text(x: float, y: float, said: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(said)}</text>'


def _rule(left: float, right: float, y: float, *, dashed: bool = False) -> str:
    style = f'stroke="{INK}" stroke-dasharray="5 4"' if dashed else f'stroke="{RULE}"'
    return f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" {style}/>'
