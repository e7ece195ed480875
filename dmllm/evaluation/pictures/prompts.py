"""What is asked to be drawn, and whether a picture shows it, as GenEval asks and judges, with an oracle for a detector.

    single_object   a circle                              two_object         a circle and a star
    counting        three squares                         colors             a red cross
    position        a circle to the left of a star        color_attribution  a red circle and a blue star

A picture may show more than was asked for, but not more of what was to be counted. Objects read as no shape count for
nothing. Source: Ghosh et al., GenEval, arXiv:2310.11513, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmllm.data.builtin.picture import noun_phrase, pick, shuffled
from dmllm.data.builtin.questions import COLORS, OFFSET, SHAPES, plural
from dmllm.evaluation.pictures.oracle import Seen

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text, and what has to be seen: things as (shape, colour or None)."""

    kind: str
    text: str
    things: tuple[tuple[str, str | None], ...]
    number: int = 1  # how many of the first thing, exactly, where it is counted
    relation: str | None = None  # of the first thing to the second

    def holds(self, seen: Sequence[Seen], side: int) -> bool:
        """Whether a picture `side` pixels wide that shows these objects is what was asked for."""
        found = [
            [one for one in seen if one.shape == shape and color in (None, one.color)] for shape, color in self.things
        ]
        if self.kind == "counting":
            return len(found[0]) == self.number
        if self.relation is None:
            return all(found)
        x, y = RELATIONS[self.relation]
        return any(
            (first.x - second.x) * x + (first.y - second.y) * y >= OFFSET * side
            for first in found[0]
            for second in found[1]
        )


def draw_prompt(rng: np.random.Generator, kind: str) -> Prompt:
    """A prompt of one of KINDS, all words equally likely, two things never of one shape.

    Raises:
        ValueError: an unknown kind.
    """
    shapes, colors = shuffled(rng, SHAPES), shuffled(rng, COLORS)
    things: tuple[tuple[str, str | None], ...] = ((shapes[0], None), (shapes[1], None))
    if kind == "counting":
        number = pick(rng, tuple(NUMBERS))
        return Prompt(kind=kind, text=f"{NUMBERS[number]} {plural(shapes[0])}", things=things[:1], number=number)
    if kind == "position":
        relation = pick(rng, tuple(RELATIONS))
        return Prompt(kind=kind, text=f"a {shapes[0]} {relation} a {shapes[1]}", things=things, relation=relation)
    if kind in ("colors", "color_attribution"):
        things = ((shapes[0], colors[0]), (shapes[1], colors[1]))
    if kind in ("single_object", "colors"):
        things = things[:1]
    elif kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    named = [noun_phrase("a", " ".join(filter(None, (color, shape)))) for shape, color in things]
    return Prompt(kind=kind, text=" and ".join(named), things=things)


def draw_prompts(number: int, seed: int = 0) -> list[Prompt]:
    """`number` prompts of each kind."""
    return [
        draw_prompt(np.random.default_rng([seed, order, index]), kind)
        for order, kind in enumerate(KINDS)
        for index in range(number)
    ]
