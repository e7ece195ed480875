"""Metrics that compare two strings: exact match, character accuracy, ANLS and ChartQA's relaxed accuracy.

With several truths the best one counts.
"""

from __future__ import annotations

import math

from dmllm.evaluation.metrics import Metric, Truths

ANLS_THRESHOLD = 0.5  # a distance of half the characters or more scores nothing
RELAXED_TOLERANCE = 0.05  # of the true number


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: what 'the same answer' means for exact match."""
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def exact_match(answer: str, truths: Truths) -> float:
    """1 when the normalised answer is one of the normalised truths, else 0."""
    return float(normalise(answer) in {normalise(truth) for truth in truths})


def char_accuracy(answer: str, truths: Truths) -> float:
    """1 - edit distance / length of the longer string, so in [0, 1]; case counts, runs of white space are one space.

    This is 1 minus the character error rate of reading tasks, with the longer of the two strings as its denominator so
    that long wrong answers do not go below 0.
    """
    return max(1.0 - distance(" ".join(answer.split()), " ".join(truth.split())) for truth in truths)


def anls(answer: str, truths: Truths) -> float:
    """Normalised Levenshtein similarity, case-insensitive, 0 where the distance is half the longer string or more.

    Its average over questions is ANLS. Source: Biten et al., arXiv:1905.13648, section 4, threshold 0.5; used by
    DocVQA and InfographicVQA.
    """
    nearest = min(distance(answer.strip().lower(), truth.strip().lower()) for truth in truths)
    return 1.0 - nearest if nearest < ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, truths: Truths) -> float:
    """1 for a number within 5 % of the true one, or for other answers when the strings match but for case.

    A percent sign divides by 100 on both sides, as in the published evaluation; nothing is fished out of a sentence.
    A true zero asks for zero. Source: Masry et al. (ChartQA), arXiv:2203.10244, section 5.1, after Methani et al.
    """
    return float(any(_close(answer.strip(), truth.strip()) for truth in truths))


def distance(a: str, b: str) -> float:
    """Levenshtein distance divided by the length of the longer string: 0 for equal strings, 1 for nothing in common."""
    return edit_distance(a, b) / max(len(a), len(b), 1)


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of one character that turn `a` into `b` (Levenshtein 1966)."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char != other))
    return row[-1]


def _close(answer: str, truth: str) -> bool:
    given, true = _number(answer), _number(truth)
    if given is None or true is None:
        return normalise(answer) == normalise(truth)
    return abs(given - true) <= RELAXED_TOLERANCE * abs(true)


def _number(text: str) -> float | None:
    """'12.5' or '12.5%' as a float, None for anything else."""
    try:
        value = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


EXACT_MATCH = Metric(name="exact_match", each=exact_match)
CHAR_ACCURACY = Metric(name="char_accuracy", each=char_accuracy)
ANLS = Metric(name="anls", each=anls)
RELAXED = Metric(name="relaxed", each=relaxed_accuracy)
