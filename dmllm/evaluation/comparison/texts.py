"""Stories with holes: filled, ranked, drawn freely; the oracle of the data says what holds.

A model that sees both sides fills a hole where it is (`Pipeline.infill`). One that writes from left to right is given
what stands before the hole and writes as many tokens as are missing; what stands behind, it has not seen. Any model
that says how probable a text is can choose among given fillings by the whole text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dmllm.data.builtin.stories import holds
from dmllm.data.holes import gapped


@dataclass(frozen=True, kw_only=True)
class Hole:
    """A text, what is missing in it, and wrong fillings of the same length."""

    prompt: str
    before: str
    missing: str
    behind: str
    wrong: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """How questions of one kind were answered."""

    score: float  # share that holds
    count: int
    forwards: float | None  # model calls an answer, where they were counted
    seconds: float  # of this process an answer, as many at once as were asked together
    how: str

    def row(self) -> dict[str, Any]:
        return vars(self)


def read_holes(folder: str | Path, kind: str, number: int) -> list[Hole]:
    """The first `number` holes of a kind in a folder of `stories`. Raises ValueError where there are none."""
    found = []
    with (Path(folder) / "truth.jsonl").open(encoding="utf-8") as lines:
        for truth in map(json.loads, lines):
            if kind in truth.get("holes", {}) and len(found) < number:
                hole = truth["holes"][kind]
                found.append(Hole(prompt=truth["kind"], **{**hole, "wrong": tuple(hole["wrong"])}))
    if not found:
        raise ValueError(
            f"{folder} has no holes of kind {kind!r}; texts of val and test have continuation, infilling, "
            "reversal, recall and reversal of facts."
        )
    return found


def fill(
    pipeline: Any, holes: Sequence[Hole], decode: dict[str, Any], batch_size: int, written: str = "[MASK:{}]"
) -> Answered:
    """Every hole filled, from both sides where the model can; `written` is how a hole of so many tokens is."""
    start, found, refused = time.process_time(), [], []
    ways = {"both sides": _from_both_sides, "both sides, as a draft": _over_a_draft, "left alone": _from_the_left}
    for first in range(0, len(holes), batch_size):
        part = holes[first : first + batch_size]
        for how, fill_in in list(ways.items()):
            try:
                found += fill_in(pipeline, part, decode, written)
                break
            except ValueError as error:
                if first:
                    raise
                refused.append(f"{how}: {error}")
                del ways[how]
        if not ways:
            raise ValueError(f"Holes are filled in no way: {' '.join(refused)}")
    texts, calls = [text for text, _ in found], [number for _, number in found]
    seconds = time.process_time() - start
    right = [holds(text) and text.startswith(h.before) and text.endswith(h.behind) for text, h in zip(texts, holes)]
    return Answered(
        score=sum(right) / len(right),
        count=len(right),
        forwards=sum(calls) / len(calls),
        seconds=seconds / len(holes),
        how=next(iter(ways)),
    )


def _tokens(pipeline: Any, hole: Hole) -> int:
    """How many tokens are missing."""
    text = f" {hole.missing}" if hole.before.endswith(" ") else hole.missing
    return len(pipeline.processor.tokens.encode(text)[0])


def _from_both_sides(
    pipeline: Any, holes: Sequence[Hole], decode: dict[str, Any], written: str
) -> list[tuple[str, int]]:
    given = [h.before + written.format(_tokens(pipeline, h)) + h.behind for h in holes]
    found = pipeline.infill(given, [h.prompt for h in holes], generator=0, **decode)
    return [(one.text, one.num_forwards) for one in found]


def _over_a_draft(pipeline: Any, holes: Sequence[Hole], decode: dict[str, Any], written: str) -> list[tuple[str, int]]:
    """By a model that denoises what is open on a canvas, the rest of which is known."""
    prompts, drafts = [], []
    for hole in holes:
        length = _tokens(pipeline, hole)
        own = gapped(pipeline.processor, f"{hole.before}[MASK:{length}]{hole.behind}", [_asked(hole)])
        drafts.append(own.lay([length]).ids)
        prompts.append(pipeline.processor.prompt(hole.prompt).input_ids.tolist())
    if len({len(row) for row in prompts}) > 1 or len({len(row) for row in drafts}) > 1:
        raise ValueError("texts of several lengths make no one draft.")
    size = len(drafts[0])
    done = pipeline.generate(prompts, draft=drafts, max_new_tokens=size, eos_token_id=[], generator=0, **decode)
    answers = done.sequences[:, len(prompts[0]) :].tolist()
    return [(pipeline.processor.decode(a), n) for a, n in zip(answers, done.num_forwards.tolist())]


def _from_the_left(pipeline: Any, holes: Sequence[Hole], decode: dict[str, Any], written: str) -> list[tuple[str, int]]:
    """The texts and calls of a model that writes on from what stands before the holes, all of one length."""
    rows, lengths = [], [_tokens(pipeline, hole) for hole in holes]
    for hole in holes:
        own = gapped(pipeline.processor, f"{hole.before}[MASK]{hole.behind}", [_asked(hole)])
        asked = pipeline.processor.prompt(hole.prompt).input_ids.tolist()
        rows.append(torch.tensor([*asked, *own.before, *own.parts[0]]))
    ids = pad_sequence(rows, batch_first=True, padding_value=pipeline.special.pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    done = pipeline.generate(ids, mask, max_new_tokens=max(lengths), eos_token_id=[], generator=0, **decode)
    found = []
    answers = done.sequences[:, ids.shape[1] :].tolist()
    for hole, length, answer, calls in zip(holes, lengths, answers, done.num_forwards.tolist()):
        said = pipeline.processor.decode(answer[:length])
        before = hole.before.removesuffix(" ") if said.startswith(" ") else hole.before
        found.append((before + said + hole.behind, calls))
    return found


def _asked(hole: Hole) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": hole.prompt}]}


def choose(pipeline: Any, holes: Sequence[Hole], num_samples: int) -> Answered:
    """Of the true filling and the wrong ones, that with which the whole text is the most probable."""
    start, right = time.process_time(), 0
    for number, hole in enumerate(holes):
        fillings = [*hole.wrong, hole.missing]  # of equal ones, the first is taken
        texts = [hole.before + filling + hole.behind for filling in fillings]
        ranked = pipeline.rank(hole.prompt, texts, num_samples=num_samples, generator=number)
        right += ranked[0].index == len(hole.wrong)
    return Answered(
        score=right / len(holes),
        count=len(holes),
        forwards=None,
        seconds=(time.process_time() - start) / len(holes),
        how=f"ranked among {1 + len(holes[0].wrong)}",
    )


def draw_freely(
    pipeline: Any, prompt: str, number: int, length: int, decode: dict[str, Any], batch_size: int
) -> tuple[Answered, list[str]]:
    """Texts drawn at temperature 1, each from its own generator, and how many of them hold."""
    start, replies = time.process_time(), []
    settings = {"temperature": 1.0, "max_new_tokens": length, **decode}
    for first in range(0, number, batch_size):
        seeds = [torch.Generator().manual_seed(i) for i in range(first, min(first + batch_size, number))]
        replies += pipeline.chat([prompt] * len(seeds), generator=seeds, **settings)
    texts = [reply.text for reply in replies]
    answered = Answered(
        score=sum(map(holds, texts)) / number,
        count=number,
        forwards=sum(float(reply.num_forwards) for reply in replies) / number,
        seconds=(time.process_time() - start) / number,
        how=f"{len(set(texts))} of {number} texts differ",
    )
    return answered, texts
