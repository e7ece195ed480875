"""Pictures of one to six characters in one or two rows, and questions about them: printed or handwritten.

Where characters come from and what they look like is the caller's: `scenes` prints them (large_print.py), `digits`
pastes scans of handwriting. Characters are uniform and independent: what is named in a question says nothing of its
answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dmllm.data.builtin import drawing
from dmllm.data.builtin.picture import COUNT, EXIST, NEIGHBOR, Asked, Picture, Turn, collect, phrased, pick, spread

DIGITS = "0123456789"
KINDS = ("neighbor", "count", "exist", "sum", "read")
MAX_IN_ROW = 3
# Lengths are fractions of the picture's side.
SIDES = tuple(side / 64 for side in range(16, 25))
# The characters of one row stand this far above or below its middle at most, so that rows are told apart.
JITTER = 3 / 64
# Those whose names begin with a vowel: "an F", "an 8".
WITH_AN = "AEFHLMNRX8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One character in a picture: which, which of its images (any number), and its square box in pixels."""

    character: str
    image: int
    left: int
    top: int
    side: int

    @property
    def box(self) -> list[int]:
        return [self.left, self.top, self.left + self.side, self.top + self.side]


Rows = tuple[tuple[Placed, ...], ...]
# rng -> a character and the number of its image
Draw = Callable[[np.random.Generator], tuple[str, int]]
# (character, image, side) -> coverage in 0..1, [side, side, 1]
Mask = Callable[[str, int, int], np.ndarray]


def compose(
    rng: np.random.Generator, rows: Rows, *, size: int, alphabet: str, turns: int, mask: Mask, truth: dict[str, Any]
) -> Picture:
    """The picture of these rows, `size` pixels wide and high, with `turns` questions about characters of `alphabet`."""
    asked = ask(rng, rows, alphabet, turns)
    dark = rng.random() < 0.5
    backdrop, canvas = drawing.background(rng, size, level=rng.uniform(20, 70) if dark else rng.uniform(175, 230))
    return Picture(
        turns=asked,
        truth={**truth, "background": backdrop},
        paint=lambda: paint(rng, rows, canvas, mask, dark=dark),
    )


def draw_rows(rng: np.random.Generator, size: int, draw: Draw) -> Rows:
    """How many (uniform over 1..6), in which rows (uniform over what fits), which characters, and where."""
    number = 1 + int(rng.random() * 2 * MAX_IN_ROW)
    upper = range(max(1, number - MAX_IN_ROW), min(MAX_IN_ROW, number) + 1)
    first = pick(rng, upper)
    lengths = [first, number - first] if number > first else [number]
    height = size // len(lengths)
    rows = []
    for row, length in enumerate(lengths):
        width, placed = size // length, []
        room = min(width, height) - 1
        sides = [side for share in SIDES if (side := round(share * size)) <= room]
        # The row's middle, in the picture, such that the largest character has its place above and below it.
        middle = row * height + sides[-1] / 2 + (height - sides[-1]) * rng.random()
        for column in range(length):
            side, (character, image) = pick(rng, sides), draw(rng)
            left = column * width + int(rng.random() * (width - side + 1))
            top = round(middle - side / 2 + (rng.random() * 2 - 1) * JITTER * size)
            top = min(max(top, row * height), (row + 1) * height - side)
            placed.append(Placed(character=character, image=image, left=left, top=top, side=side))
        rows.append(tuple(placed))
    return tuple(rows)


def paint(rng: np.random.Generator, rows: Rows, canvas: np.ndarray, mask: Mask, *, dark: bool) -> np.ndarray:
    """The characters as ink over the background: light on dark ground or the reverse. uint8 [size, size, 3]"""
    for placed in (placed for row in rows for placed in row):
        ink = np.float32(rng.uniform(190, 250) if dark else rng.uniform(0, 60)) + rng.uniform(-30, 30, 3)
        shape = mask(placed.character, placed.image, placed.side)
        drawing.blend(canvas, shape, placed.left, placed.top, ink.astype(np.float32))
    return drawing.finish(canvas)


# Questions


def text_of(rows: Rows) -> str:
    """All characters in reading order."""
    return "".join(placed.character for row in rows for placed in row)


def noun(text: str) -> str:
    """What all of these are."""
    return "digit" if text.isdigit() else "letter" if text.isalpha() else "character"


def ask_neighbor(rng: np.random.Generator, rows: Rows) -> Asked | None:
    """Which character is next to one that occurs once; above and below only in rows of one length, in line."""
    found = []
    for row in rows:
        for one, other in pairwise(row):
            found += [("left of", other.character, one.character), ("right of", one.character, other.character)]
    if len(rows) == 2 and len(rows[0]) == len(rows[1]):
        for one, other in zip(*rows, strict=True):
            if abs(one.left + one.side / 2 - other.left - other.side / 2) < min(one.side, other.side) / 2:
                found += [("above", other.character, one.character), ("below", one.character, other.character)]
    found = [entry for entry in found if text_of(rows).count(entry[1]) == 1]
    if not found:
        return None
    word, known, answer = pick(rng, found)
    return phrased(rng, NEIGHBOR, noun(text_of(rows)), word, known, answer=answer)


def ask_count(rng: np.random.Generator, rows: Rows) -> Asked:
    text = text_of(rows)
    return phrased(rng, COUNT, f"{noun(text)}s", answer=str(len(text)))


def ask_exist(rng: np.random.Generator, rows: Rows, alphabet: str) -> Asked:
    shown, yes = text_of(rows), rng.random() < 0.5
    character = pick(rng, [character for character in alphabet if (character in shown) == yes])
    phrase = f"{'an' if character in WITH_AN else 'a'} {character}"
    return phrased(rng, EXIST, phrase, answer="yes" if yes else "no")


def ask_sum(rng: np.random.Generator, rows: Rows) -> Asked | None:
    """The sum of two or three digits, all of them or those of one row, written out: "3+7+2=12"."""
    sums = [(" in the picture", [placed for row in rows for placed in row])]
    if len(rows) == 2:
        sums += [(f" in the {place} row", list(row)) for place, row in zip(("top", "bottom"), rows, strict=True)]
    sums = [(place, chosen) for place, chosen in sums if len(chosen) in (2, 3)]
    if not sums or not text_of(rows).isdigit():
        return None
    place, chosen = pick(rng, sums)
    digits = [placed.character for placed in chosen]
    templates = ("what is the sum of the digits{}?", "what do the digits{} add up to?", "add up the digits{}.")
    return phrased(rng, templates, place, answer="+".join(digits) + f"={sum(map(int, digits))}")


def ask_read(rng: np.random.Generator, rows: Rows) -> Asked:
    """All characters, rows joined by one space."""
    things = f"{noun(text_of(rows))}s"
    templates = ("read the {}.", "which {} are shown, in order?", "transcribe all {}.", "which {} do you see?")
    return phrased(rng, templates, things, answer=" ".join(text_of((row,)) for row in rows))


def form_rates(rows: Rows, turns: int) -> dict[str, float]:
    """How often each kind is asked, `turns` in total, so that over all pictures of digits the kinds are balanced.

    Three pictures in four have a row of two or more; five in six have two characters or more.
    """
    text, even = text_of(rows), turns / len(KINDS)
    fixed = {
        "count": even,
        "neighbor": even * 4 / 3 if max(len(row) for row in rows) > 1 else 0.0,
        "sum": even * 6 / 5 if len(text) > 1 and text.isdigit() else 0.0,
    }
    rest = [kind for kind in KINDS if kind not in fixed]
    return fixed | dict.fromkeys(rest, (turns - sum(fixed.values())) / len(rest))


def ask(rng: np.random.Generator, rows: Rows, alphabet: str, turns: int) -> tuple[Turn, ...]:
    """The picture's questions, no two alike."""
    forms: dict[str, Callable[[np.random.Generator, Rows], Asked | None]] = {
        "neighbor": ask_neighbor,
        "count": ask_count,
        "exist": lambda rng, rows: ask_exist(rng, rows, alphabet),
        "sum": ask_sum,
        "read": ask_read,
    }
    return tuple(collect(rng, rows, [(kind, forms[kind]) for kind in spread(rng, form_rates(rows, turns))]))
