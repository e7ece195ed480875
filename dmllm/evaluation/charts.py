"""A loss curve as inline SVG: no library, no script, scales with the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
MOST_POINTS = 300  # more are averaged in equal stretches of steps
SMOOTHING = 0.03  # of all points, to either side: the bold line is their mean

Points = Sequence[tuple[float, float]]


def loss_curve(training: Points, validation: Points) -> Markup | None:
    """Training loss (faint, and smoothed) and validation loss (dots) over steps; None when there is nothing to draw."""
    training = averaged([p for p in training if math.isfinite(p[1])])
    validation = averaged([p for p in validation if math.isfinite(p[1])])
    points = [*training, *validation]
    if len(points) < 2:
        return None
    steps = ticks(min(p[0] for p in points), max(p[0] for p in points))
    losses = ticks(min(p[1] for p in points), max(p[1] for p in points))
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(losses[0], min(p[1] for p in points)), max(losses[-1], max(p[1] for p in points))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - left) / ((right - left) or 1)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / ((high - low) or 1)

    def line(name: str, path: Points) -> str:
        drawn = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in path)
        return f'<polyline class="{name}" points="{drawn}"/>'

    parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss over training steps">']
    for loss in losses:
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in steps:
        if left <= step <= right:
            parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:,.0f}</text>')
    parts += [line("raw", training), line("smooth", smoothed(training))] if training else []
    if validation:
        parts.append(line("validation", validation))
        parts += [f'<circle class="validation" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>' for a, b in validation]
    return Markup("".join([*parts, "</svg>"]))  # numbers and fixed words only


def averaged(points: Points) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, in order of steps, each the mean of as many neighbours."""
    ordered = sorted(points)
    size = math.ceil(len(ordered) / MOST_POINTS)
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size or 1)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The mean of each point and its neighbours to both sides, as many on the one as on the other (so without lag)."""
    reach, line = round(SMOOTHING * len(points)), []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        values = [value for _, value in points[i - near : i + near + 1]]
        line.append((step, sum(values) / len(values)))
    return line


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about `count` of them, that span [low, high]."""
    rough = (high - low) / count or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [round(step * i, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
