"""Metrics: how right an answer is, and how sure we are of the mean.

A metric scores one answer against its truths (in [0, 1], 1 is right) and may add figures that only exist for a whole
set of answers (precision, BLEU). Each function's docstring names the published definition it follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dmllm.registry import Table

Truths = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What a whole set of answers scores."""

    scores: list[float]
    """One score an answer; their mean is the headline number."""
    details: dict[str, Any]
    """Further figures by name, among them how they were computed."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named way to score answers; at least one of `each` and `corpus` is given."""

    name: str
    each: Callable[[str, Truths], float] | None = None
    """Score of one answer in [0, 1], written beside it as it comes; None when one answer alone has no score."""
    corpus: Callable[[Sequence[str], Sequence[Truths]], Corpus] | None = None
    """Scores and further figures of all answers together; None when the mean of `each` says everything."""
    bounded: bool = True
    """Whether scores lie in [0, 1] and are read as percentages; CIDEr does not."""

    def summarise(self, answers: Sequence[str], truths: Sequence[Truths]) -> Corpus:
        """Score all answers together. Raises ValueError for truths that the metric has no meaning for."""
        if self.corpus is not None:
            return self.corpus(answers, truths)
        assert self.each is not None
        return Corpus(scores=[self.each(a, t) for a, t in zip(answers, truths, strict=True)], details={})


METRICS = Table(
    "metric",
    {
        "exact_match": "dmllm.evaluation.metrics.text:EXACT_MATCH",
        "char_accuracy": "dmllm.evaluation.metrics.text:CHAR_ACCURACY",
        "anls": "dmllm.evaluation.metrics.text:ANLS",
        "relaxed": "dmllm.evaluation.metrics.text:RELAXED",
        "vqa": "dmllm.evaluation.metrics.vqa:VQA",
        "pope": "dmllm.evaluation.metrics.yes_no:POPE",
        "caption": "dmllm.evaluation.metrics.caption:CAPTION",
    },
)
