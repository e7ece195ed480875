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


def interval(
    scores: Sequence[float], groups: Sequence[Hashable] | None = None, *, shares: bool = True
) -> tuple[float, float, str]:
    """(low, high, method) around the mean of `scores`; method is "wilson" or "bootstrap".

    Args:
        groups: what each score shares with others (its picture); None, or one group for all, is independent scores.
        shares: whether scores lie in [0, 1]; others always get the bootstrap.

    Equal scores leave the bootstrap without width; all right or all wrong, they get Wilson's interval on the groups.
    Raises ValueError without scores.
    """
    if not scores:
        raise ValueError("An interval needs at least one score.")
    names = list(dict.fromkeys(groups if groups is not None else ()))
    number = {name: i for i, name in enumerate(names)}
    index = np.arange(len(scores)) if groups is None or len(names) == 1 else np.array([number[g] for g in groups])
    counts = np.bincount(index)
    if shares and set(scores) <= {0.0, 1.0} and (len(counts) == len(scores) or len(set(scores)) == 1):
        return *wilson(sum(scores) / len(scores) * len(counts), len(counts)), "wilson"
    return *bootstrap(np.bincount(index, weights=np.asarray(scores)), counts), "bootstrap"


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for `right` successes in `count` independent trials."""
    share, spread = right / count, Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (0.0 if right <= 0 else centre - half), (1.0 if right >= count else centre + half)


def bootstrap(totals: np.ndarray, counts: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of means over groups drawn with replacement; totals[i] sums the counts[i] scores of group i."""
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = generator.integers(0, len(totals), size=len(totals))
        means[i] = totals[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
