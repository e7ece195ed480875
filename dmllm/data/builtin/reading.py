"""Pictures of characters to read: 8 to 16 letters and digits in one or two lines.

One question asks for all of them.

Each character has its own cell, an eighth of the picture wide and a quarter high, on a grid that falls on the patches
of a vision transformer with 8 x 8 patches a side. Of each pair that is hard to tell apart (O and 0, I and 1, S and 5,
Z and 2) the letter is left out: 32 characters remain.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmllm.data.builtin import drawing
from dmllm.data.builtin.picture import Picture, Turn, pick, sentence, split_of

CHARACTERS = "ABCDEFGHJKLMNPQRTUVWXY0123456789"
COLUMNS, ROWS = 8, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of characters and the cell of the grid in which it begins."""

    text: str
    row: int
    column: int


Lines = tuple[Line, ...]


def compose(rng: np.random.Generator, split: str, size: int) -> Picture:
    """One picture of `split`, `size` pixels wide and high."""
    texts = draw_texts(rng)
    while split_of(" ".join(texts)) != split:
        texts = draw_texts(rng)
    lines = place(rng, texts)
    asked = ask(rng, lines)
    dark = rng.random() < 0.5
    backdrop, canvas = drawing.background(rng, size, level=rng.uniform(24, 64) if dark else rng.uniform(180, 226))
    ink = drawing.muted(rng, rng.uniform(222, 246) if dark else rng.uniform(10, 36))
    truth = {
        "picture": "reading",
        "background": backdrop,
        "lines": texts,
        "cells": [[line.row, line.column] for line in lines],
    }
    return Picture(turns=(asked,), truth=truth, paint=lambda: paint(rng, lines, canvas, ink))


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


def ask(rng: np.random.Generator, lines: Lines) -> Turn:
    """All characters, lines from top to bottom, joined by one space."""
    templates = (
        "read the text.",
        "what does the text say?",
        "transcribe all characters.",
        "what is written in the picture?",
        "which characters do you see?",
    )
    return Turn(kind="reading", question=sentence(rng, templates), answer=" ".join(line.text for line in lines))
