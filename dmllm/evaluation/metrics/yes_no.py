"""POPE: does the model say yes to objects that are not there? Accuracy, precision, recall, F1 and the share of yes.

Source: Li et al., arXiv:2305.10355. "Yes" is the positive class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dmllm.evaluation.metrics import Corpus, Metric, Truths

_WORD = re.compile(r"[a-z']+")


def parse_yes_no(answer: str) -> str:
    """'no' when the first sentence has no, not or a word in n't; 'yes' when it says yes; else 'unclear'.

    The published script counts all that is not 'no' as yes; so does `pope`, and reports the share of unclear answers.
    """
    words = _WORD.findall(answer.replace("\u2019", "'").lower().split(".")[0])
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else "unclear"


def yes_no_right(answer: str, truths: Truths) -> float:
    """1 when the answer, read as yes or no, is the truth. Raises ValueError for a truth that is neither."""
    return float((parse_yes_no(answer) != "no") == _truth(truths))


def pope(answers: Sequence[str], truths: Sequence[Truths]) -> Corpus:
    """Scores are right or wrong; details hold precision, recall, F1 (None where undefined), yes and unclear ratio."""
    parsed = [parse_yes_no(answer) for answer in answers]
    yes = [answer != "no" for answer in parsed]
    true = [_truth(t) for t in truths]
    both = sum(y and t for y, t in zip(yes, true, strict=True))
    return Corpus(
        scores=[float(y == t) for y, t in zip(yes, true, strict=True)],
        details={
            "precision": _ratio(both, sum(yes)),
            "recall": _ratio(both, sum(true)),
            "f1": _ratio(2 * both, sum(yes) + sum(true)),
            "yes_ratio": _ratio(sum(yes), len(yes)),
            "unclear_ratio": _ratio(parsed.count("unclear"), len(parsed)),
        },
    )


def _truth(truths: Truths) -> bool:
    said = parse_yes_no(truths[0])
    if len(truths) != 1 or said == "unclear":
        raise ValueError(f"POPE needs one truth, yes or no, not {list(truths)}.")
    return said == "yes"


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


POPE = Metric(name="pope", each=yes_no_right, corpus=pope)
