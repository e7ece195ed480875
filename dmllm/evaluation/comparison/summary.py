"""Means over seeds, with their 95 % intervals by Student's t.

Seeds draw the initial weights, the data's order and the noise; data and questions are the same under all of them. What
all seeds agree on has an interval without width: it says nothing of other questions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# Quantiles of Student's t that leave 2.5 % above, for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def over_seeds(values: Sequence[float | None], *, share: bool = False) -> dict[str, Any] | None:
    """mean, low, high and the number of seeds; low and high are None for a single one. None where nothing was measured.

    Args:
        share: whether values are in [0, 1], where an interval ends.
    """
    known = [v for v in values if v is not None]
    if not known:
        return None
    mean, low, high = statistics.mean(known), None, None
    if len(known) > 1:
        quantile = STUDENT[min(len(known) - 1, len(STUDENT)) - 1]
        half = quantile * statistics.stdev(known) / math.sqrt(len(known))
        low, high = mean - half, mean + half
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
    return {"mean": mean, "low": low, "high": high, "seeds": len(known)}


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """study -> paradigm -> what was measured, each figure over seeds, in the order of the results."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for one in results:
        grouped.setdefault(one["study"], {}).setdefault(one["paradigm"], []).append(one)
    return {study: {paradigm: _paradigm(runs) for paradigm, runs in own.items()} for study, own in grouped.items()}


def _paradigm(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    found: dict[str, Any] = {
        "seeds": [one["seed"] for one in runs],
        "objective": first["settings"]["train"]["objective"],
        "start": first["settings"]["paradigm"]["start"],
        "parameters": first["parameters"],
        "examples": first["training"]["examples"],
        "steps": first["training"]["steps"],
        "seconds": over_seeds([one["training"]["seconds"] for one in runs]),
        "validation": _paths([one["training"]["validation"] for one in runs]),
    }
    for part in ("holes", "ranked"):
        if part in first:
            found[part] = {kind: _answered([one[part][kind] for one in runs]) for kind in first[part]}
    for part in ("free", "alone"):
        if part in first:
            found[part] = _answered([one[part] for one in runs])
    if "bound" in first:
        keys = [k for k in ("text", "token") if k in first["bound"]]
        found["bound"] = {k: over_seeds([one["bound"][k] for one in runs]) for k in keys}
        found["bound"] |= {k: first["bound"].get(k) for k in ("least", "tokens", "count", "standard_error")}
    if "suite" in first:
        found["suite"] = {
            task: {kind: _scores([one["suite"][task][kind] for one in runs]) for kind in kinds}
            for task, kinds in first["suite"].items()
        }
    found["curves"] = {
        kind: [
            {"settings": points[0]["settings"], **_answered(list(points))}
            for points in zip(*(one["curves"][kind] for one in runs), strict=True)
        ]
        for kind in first["curves"]
    }
    return found


def _answered(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if "refused" in rows[0]:
        return {"refused": rows[0]["refused"]}
    return {
        "score": over_seeds([row["score"] for row in rows], share=True),
        "forwards": over_seeds([row["forwards"] for row in rows]),
        "seconds": over_seeds([row["seconds"] for row in rows]),
        "count": rows[0]["count"],
        "how": rows[0]["how"],
    }


def _scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "score": over_seeds([row["value"] for row in rows], share=True),
        "forwards": over_seeds([row["forwards"] for row in rows]),
        "count": rows[0]["count"],
        "chance": rows[0]["chance"],
    }


def _paths(paths: list[list[list[float]]]) -> list[dict[str, Any]]:
    """A loss over steps, over seeds."""
    return [{"step": points[0][0], **(over_seeds([p[1] for p in points]) or {})} for points in zip(*paths)]
