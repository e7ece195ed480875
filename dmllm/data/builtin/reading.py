"""Pictures of characters to read: 8 to 16 letters and digits in one or two lines.

One question asks for all of them; the others, in the words of `digits`, make a reader look for a character, for its
neighbours, or count. Characters are uniform and independent: what is named in a question says nothing of its answer.

Each character has its own cell, an eighth of the picture wide and a quarter high, on a grid that falls on the patches
of a vision transformer with 8 x 8 patches a side. Of each pair that is hard to tell apart (O and 0, I and 1, S and 5,
Z and 2) the letter is left out: 32 characters remain.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmllm.data.builtin import drawing
from dmllm.data.builtin.picture import (
    COUNT,
    EXIST,
    NEIGHBOR,
    RELATION,
    Asked,
    Picture,
    Turn,
    collect,
    phrased,
    pick,
    shuffled,
    split_of,
    spread,
)

CHARACTERS = "ABCDEFGHJKLMNPQRTUVWXY0123456789"
# Those whose names begin with a vowel: "an F", "an 8".
WITH_AN = "AEFHLMNRX8"
COLUMNS, ROWS = 8, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of characters and the cell of the grid in which it begins."""

    text: str
    row: int
    column: int


Lines = tuple[Line, ...]


def compose(rng: np.random.Generator, split: str, size: int, turns: int) -> Picture:
    """One picture of `split`, `size` pixels wide and high, with `turns` questions."""
    texts = draw_texts(rng)
    while split_of(" ".join(texts)) != split:
        texts = draw_texts(rng)
    lines = place(rng, texts)
    asked = ask(rng, lines, turns)
    dark = rng.random() < 0.5
    backdrop, canvas = drawing.background(rng, size, level=rng.uniform(24, 64) if dark else rng.uniform(180, 226))
    ink = drawing.muted(rng, rng.uniform(222, 246) if dark else rng.uniform(10, 36))
    truth = {
        "picture": "reading",
        "background": backdrop,
        "lines": texts,
        "cells": [[line.row, line.column] for line in lines],
    }
    return Picture(turns=asked, truth=truth, paint=lambda: paint(rng, lines, canvas, ink))


def draw_texts(rng: np.random.Generator) -> list[str]:
    """One line of eight characters (one picture in four), or two of four to eight."""
    lengths = [COLUMNS] if rng.random() < 0.25 else [4 + int(rng.random() * (COLUMNS - 3)) for _ in range(2)]
    return ["".join(pick(rng, CHARACTERS) for _ in range(length)) for length in lengths]


def place(rng: np.random.Generator, texts: list[str]) -> Lines:
    """Where each line begins, from top to bottom."""
    rows = sorted(rng.permutation(ROWS)[: len(texts)].tolist())
    columns = [int(rng.random() * (COLUMNS - len(text) + 1)) for text in texts]
    return tuple(
        Line(text=text, row=row, column=column) for text, row, column in zip(texts, rows, columns, strict=True)
    )


# Painting


@lru_cache(maxsize=2048)
def glyph(character: str, height: int, width: int) -> np.ndarray:
    """A character as coverage in 0..1, `height` pixels high and at most `width` wide. [h, w, 1]"""
    image = _large_glyph(character, height, stroke=height / 8)
    natural = round(image.width * height / image.height)
    if natural > width:  # what is squeezed needs thinner strokes to stay open
        image = _large_glyph(character, height, stroke=height / 16)
    mask = np.asarray(image.resize((min(natural, width), height), Image.Resampling.LANCZOS), dtype=np.float32)
    return mask[:, :, None] / mask.max()


def _large_glyph(character: str, height: int, *, stroke: float) -> Image.Image:
    """The character about four times too large, cropped to its ink."""
    image = Image.new("L", (height * 8, height * 8))
    font = ImageFont.load_default(height * 4)
    ImageDraw.Draw(image).text((height, height), character, fill=255, font=font, stroke_width=round(stroke))
    return image.crop(image.getbbox())


def paint(rng: np.random.Generator, lines: Lines, canvas: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """The lines over the background, each character a little displaced and shaded. uint8 [size, size, 3]"""
    size = canvas.shape[0]
    cell_width, cell_height = size // COLUMNS, size // ROWS
    pixel = size / 64
    for line in lines:
        height = round(pick(rng, (12, 13, 14)) * pixel)
        for column, character in enumerate(line.text, start=line.column):
            mask = glyph(character, height, cell_width - round(pixel))
            room_x, room_y = cell_width - mask.shape[1], cell_height - height
            shift_x, shift_y = (round((rng.random() * 2 - 1) * pixel) for _ in range(2))
            left = column * cell_width + min(max(room_x // 2 + shift_x, 0), room_x)
            top = line.row * cell_height + min(max(room_y // 2 + shift_y, 0), room_y)
            drawing.blend(canvas, mask, left, top, ink + np.float32(rng.uniform(-12, 12)))
    return drawing.finish(canvas)


# Questions


def _singles(lines: Lines) -> list[str]:
    """The characters that occur exactly once, in reading order."""
    text = "".join(line.text for line in lines)
    return [character for character in text if text.count(character) == 1]


def ask_exist(rng: np.random.Generator, lines: Lines) -> Asked:
    shown, yes = {character for line in lines for character in line.text}, rng.random() < 0.5
    character = pick(rng, [character for character in CHARACTERS if (character in shown) == yes])
    phrase = f"{'an' if character in WITH_AN else 'a'} {character}"
    return phrased(rng, EXIST, phrase, answer="yes" if yes else "no")


def ask_count(rng: np.random.Generator, lines: Lines) -> Asked:
    """How many digits, letters or, of two lines, characters: one line always has eight."""
    text = "".join(line.text for line in lines)
    digits = sum(character.isdigit() for character in text)
    counts = {"digits": digits, "letters": len(text) - digits, "characters": len(text)}
    noun = pick(rng, list(counts)[: 1 + len(lines)])
    return phrased(rng, COUNT, noun, answer=str(counts[noun]))


def ask_relation(rng: np.random.Generator, lines: Lines) -> Asked | None:
    """Is one character directly left or right of another? If not, they are neighbours the other way round, or none."""
    singles = _singles(lines)
    neighbors = [pair for line in lines for pair in pairwise(line.text) if set(pair) <= set(singles)]
    if not neighbors:
        return None
    (left, right), yes = pick(rng, neighbors), rng.random() < 0.5
    if not yes:
        apart = [pair for pair in combinations(singles, 2) if pair not in neighbors]
        left, right = shuffled(rng, pick(rng, apart)) if apart and rng.random() < 0.5 else (right, left)
    names = (f"the {left}", "directly left of", f"the {right}")
    if rng.random() < 0.5:
        names = (f"the {right}", "directly right of", f"the {left}")
    return phrased(rng, RELATION, *names, answer="yes" if yes else "no")


def ask_neighbor(rng: np.random.Generator, lines: Lines) -> Asked | None:
    """Which character is next to one that occurs once; above and below where both lines have a character."""
    found = []
    for line in lines:
        for one, other in pairwise(line.text):
            found += [("left of", other, one), ("right of", one, other)]
    if len(lines) == 2:
        first = max(line.column for line in lines)
        for one, other in zip(*(line.text[first - line.column :] for line in lines), strict=False):
            found += [("above", other, one), ("below", one, other)]
    singles = _singles(lines)
    found = [entry for entry in found if entry[1] in singles]
    if not found:
        return None
    word, known, answer = pick(rng, found)
    noun = "character" if rng.random() < 0.5 else "digit" if answer.isdigit() else "letter"
    return phrased(rng, NEIGHBOR, noun, word, known, answer=answer)


def ask_reading(rng: np.random.Generator, lines: Lines) -> Asked:
    """All characters, lines from top to bottom, joined by one space."""
    templates = (
        "read the text.",
        "what does the text say?",
        "transcribe all characters.",
        "what is written in the picture?",
        "which characters do you see?",
    )
    return phrased(rng, templates, answer=" ".join(line.text for line in lines))


FORMS = {"exist": ask_exist, "count": ask_count, "relation": ask_relation, "neighbor": ask_neighbor}


def ask(rng: np.random.Generator, lines: Lines, turns: int) -> tuple[Turn, ...]:
    """The picture's questions, no two alike; the whole text, which gives everything away, comes last and once."""
    kinds = spread(rng, dict.fromkeys(FORMS, (turns - 1) / len(FORMS)))
    return tuple(collect(rng, lines, [*((kind, FORMS[kind]) for kind in kinds), ("reading", ask_reading)]))
