"""What can be answered without looking: the accuracy of guessing from the wording of a question alone.

A guesser learns, from half of the records, the most frequent answer to each question template (the question with
colours, shapes, sizes and single characters blanked out), and is scored on the other half; then the halves change
roles. An accuracy measured on the answers that were learned from would flatter rare templates.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from dmllm.data.builtin.questions import WORDS

_CHARACTER = re.compile(r"\b[A-Z]\b")
_SLOTS = [
    *((re.compile(rf"\b(?:{'|'.join(words)})(?:e?s)?\b"), f"[{name}]") for name, words in WORDS.items()),
    (re.compile(r"\d"), "[digit]"),
]


def template_of(question: str) -> str:
    """The question without the image marker, in lower case, its words of content blanked out."""
    text = _CHARACTER.sub("[character]", question.replace("<image>", "").strip()).lower()
    for pattern, slot in _SLOTS:
        text = pattern.sub(slot, text)
    return text


def majority_baseline(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """For each kind of question in LLaVA records, the accuracy of the best guess given its template, cross-fitted."""
    halves: tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]] = ([], [])
    for index, record in enumerate(records):
        turns = record["conversations"]
        for human, model in zip(turns[::2], turns[1::2], strict=True):
            halves[index % 2].append((human["kind"], template_of(human["value"]), model["value"]))
    right, total = Counter(), Counter()
    for learned, scored in (halves, halves[::-1]):
        seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for kind, template, answer in learned:
            seen[kind, template][answer] += 1
            seen[kind, ""][answer] += 1
        guess = {key: answers.most_common(1)[0][0] for key, answers in seen.items()}
        for kind, template, answer in scored:
            right[kind] += guess.get((kind, template), guess.get((kind, ""))) == answer
            total[kind] += 1
    return {kind: right[kind] / total[kind] for kind in sorted(total)}
