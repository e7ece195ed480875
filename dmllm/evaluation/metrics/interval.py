"""95 % intervals for a mean score.

Right-or-wrong scores of independent questions get Wilson's interval (J. Am. Stat. Assoc. 22, 1927), which stays inside
[0, 1] and has width even when everything is right. Scores between 0 and 1, and questions that share a picture and so
are not independent, get a percentile bootstrap over pictures (Efron 1979; seeded, so a rerun gives the same numbers).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

Z = 1.959964  # the normal quantile that leaves 2.5 % on each side
RESAMPLES = 1000


def interval(scores: Sequence[float], groups: Sequence[Hashable] | None = None) -> tuple[float, float, str]:
    """(low, high, method) around the mean of `scores`; `groups` names what each score shares (its picture).

    Method is "wilson" or "bootstrap". When all scores are equally right or wrong the bootstrap has no width, so
    Wilson's interval on the number of groups is given. Raises ValueError without scores.
    """
    if not scores:
        raise ValueError("An interval needs at least one score.")
    groups = list(range(len(scores))) if groups is None else groups
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    binary = set(scores) <= {0.0, 1.0}
    if binary and (len(number) == len(scores) or len(set(scores)) == 1):
        return *wilson(scores[0] * len(number) if len(set(scores)) == 1 else sum(scores), len(number)), "wilson"
    index = np.array([number[group] for group in groups])
    return *bootstrap(np.bincount(index, weights=np.asarray(scores)), np.bincount(index)), "bootstrap"


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for `right` successes in `count` independent trials."""
    share, spread = right / count, Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(totals: np.ndarray, counts: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of means over groups drawn again with replacement; group i holds counts[i] scores of sum totals[i]."""
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = generator.integers(0, len(totals), size=len(totals))
        means[i] = totals[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
