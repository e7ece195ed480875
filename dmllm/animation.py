"""Watching a canvas being denoised: live in the terminal, or as an animated GIF.

Both draw one row of the steps that `Pipeline.stream` yields: tokens just committed stand out, those known for longer
recede into plain text, unknown ones are blanks. In a GIF every token has its final place from the first frame on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.ImageColor import getrgb
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from dmllm.data.images import load_image
from dmllm.types import Step

TokenTexts = Callable[[Sequence[int]], list[str]]
"""Token ids -> the text of each, as `Pipeline.token_texts`."""

BLANK = "░"
UNKNOWN = -1


@dataclass(frozen=True)
class Cell:
    """One token of a frame."""

    text: str  # printable, as it was decoded; empty while unknown
    age: int  # calls since it was committed, 0 for just now; UNKNOWN before
    ends: bool  # a special token such as the end of sequence, and whatever follows it


@dataclass(frozen=True)
class Frame:
    """One step of one row."""

    cells: list[Cell]
    forwards: int
    known: int
    finished: bool


def trace(steps: Iterable[Step], token_texts: TokenTexts, row: int = 0) -> Iterator[Frame]:
    """The frames of one row, as the steps come."""
    since: list[int] = []
    for step in steps:
        ids, committed = step.ids[row].tolist(), step.committed[row].tolist()
        forwards, finished = int(step.num_forwards[row]), bool(step.finished[row])
        since = since or [UNKNOWN] * len(ids)
        since = [(forwards if s == UNKNOWN else s) if c else UNKNOWN for s, c in zip(since, committed, strict=True)]
        texts = token_texts(ids)
        cells, ended = [], False
        for text, at in zip(texts, since, strict=True):
            special = at != UNKNOWN and is_special(text)
            ended = ended or (special and finished)  # the reply stops at the first one
            shown = "" if at == UNKNOWN or special else printable(text)
            cells.append(Cell(shown, UNKNOWN if at == UNKNOWN else forwards - at, special or ended))
        yield Frame(cells, forwards, sum(committed), finished)


def is_special(text: str) -> bool:
    """Whether a token's text is the name of a special token: <|end|>, </s>, [EOS]."""
    text = text.strip()
    return len(text) > 2 and (text[0] + text[-1]) in ("<>", "[]") and " " not in text


def printable(text: str) -> str:
    """The text without control characters, line breaks kept."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def frames(
    steps: Iterable[Step], token_texts: TokenTexts, *, prompt: str | None = None, row: int = 0
) -> Iterator[Group]:
    """Rich renderables, one a step: committed tokens plain, fresh ones highlighted, unknown ones as ░."""
    for frame in trace(steps, token_texts, row):
        answer = Text(overflow="fold")
        for cell in frame.cells:
            if cell.age == UNKNOWN:
                if not cell.ends:
                    answer.append(BLANK * 2, "bright_black")
            elif cell.ends:
                answer.append("·", "bright_black")
            else:
                answer.append(cell.text, ("black on bright_yellow", "yellow")[cell.age] if cell.age < 2 else "")
        counts = f"{frame.known} of {len(frame.cells)} tokens · {frame.forwards} model calls"
        border = "green" if frame.finished else "yellow"
        panel = Panel(answer, title=counts, title_align="left", border_style=border)
        yield Group(Text(prompt, "bold cyan"), panel) if prompt else Group(panel)


def play(
    steps: Iterable[Step],
    token_texts: TokenTexts,
    *,
    delay: float = 0.0,
    prompt: str | None = None,
    row: int = 0,
    console: Console | None = None,
) -> None:
    """Draw the steps in the terminal, as they come, at least `delay` seconds apart."""
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for frame in frames(steps, token_texts, prompt=prompt, row=row):
            live.update(frame, refresh=True)
            time.sleep(delay)


# ---- GIF: everything is drawn at SCALE times its size and reduced, for smooth edges --------------------------------

SCALE = 2
WIDTH, MARGIN, GAP = 800, 28, 6
LONGEST = 24  # letters of a token that are written
PICTURE = 264  # side of the square that holds the picture
PAPER, INK, FAINT, RULE = "#ffffff", "#1c1f2b", "#8a90a2", "#e6e8f0"
FILL_BLANK, FILL_END = "#e9ebf2", "#f4f5f9"
FILL_AGE = ("#5145cd", "#c9cdfb", "#eceefe")  # just committed, one call ago, two; then none
INK_AGE = ("#ffffff", "#2a2380", INK)
DONE = "#16a34a"


def save_gif(
    steps: Iterable[Step],
    path: str | Path,
    token_texts: TokenTexts,
    *,
    image: Any = None,
    question: str | None = None,
    row: int = 0,
    seconds: float = 0.32,
) -> Path:
    """Save the denoising as an animated GIF, written beside its place and renamed.

    Args:
        image: the picture that was asked about: a path, bytes, data URL or PIL image.
        question: drawn above the answer.
        seconds: for each step; the last frame stays for several.

    Raises:
        ValueError: there are no steps, or the image cannot be read.
    """
    return save_pictures(draw_frames(steps, token_texts, image=image, question=question, row=row), path, seconds)


def save_pictures(pages: Sequence[Image.Image], path: str | Path, seconds: float = 0.32) -> Path:
    """Pictures of one size as an animated GIF, such as those of `Pipeline.imagining`; further as `save_gif`."""
    pages = [*pages, *pages[-1:]] if len(pages) == 1 else pages
    palette = _palette(pages[len(pages) // 2], pages[-1])
    indexed = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    each = max(40, min(int(seconds * 1000), 20000 // len(pages)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    durations = [each * 2, *[each] * (len(pages) - 2), 3200]
    indexed[0].save(
        temporary, format="GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=False
    )
    temporary.replace(path)
    return path


def draw_frames(
    steps: Iterable[Step],
    token_texts: TokenTexts,
    *,
    image: Any = None,
    question: str | None = None,
    row: int = 0,
) -> list[Image.Image]:
    """RGB pages of one size: the canvas before the first call, after each, and come to rest. Raises as `save_gif`."""
    traced = list(trace(steps, token_texts, row))
    if not traced:
        raise ValueError("There are no steps to draw; pass what Pipeline.stream yields.")
    blank = Frame([Cell("", UNKNOWN, False)] * len(traced[0].cells), 0, 0, False)
    rest = replace(traced[-1], cells=[replace(c, age=c.age if c.age < 0 else len(FILL_AGE)) for c in traced[-1].cells])
    picture = None if image is None else _framed(load_image(image))
    page = _Page.plan(traced[-1], question, picture)
    return [page.draw(frame) for frame in [blank, *traced, rest]]


@dataclass(frozen=True)
class _Box:
    """Where a token stands, in unscaled pixels; `label` is its final text."""

    x: float
    y: float
    width: float


@dataclass(frozen=True)
class _Page:
    """What stays the same in all frames."""

    height: int
    question: list[str]
    picture: Image.Image | None
    boxes: list[_Box]
    left: int
    top: int  # of the answer
    size: int  # of its letters

    @staticmethod
    def plan(last: Frame, question: str | None, picture: Image.Image | None) -> _Page:
        left = MARGIN if picture is None else MARGIN * 2 + PICTURE
        room = WIDTH - MARGIN - left
        words = _wrapped(question, 21, room) if question else []
        top = MARGIN + len(words) * 30 + (16 if words else 0)
        size = 20 if len(last.cells) <= 48 else 16 if len(last.cells) <= 128 else 13
        line = size + 18
        boxes, x, y = [], 0.0, 0.0
        for cell in last.cells:
            label = _label(cell)
            width = _text_width(label, size) + 14 if label else size * 0.9
            if x and x + width > room:
                x, y = 0.0, y + line
            boxes.append(_Box(left + x, top + y, width))
            x += width + GAP
            if "\n" in cell.text:
                x, y = 0.0, y + line
        height = int(max(top + y + line, MARGIN + PICTURE if picture is not None else 0)) + MARGIN + 30
        return _Page(height, words, picture, boxes, left, top, size)

    def draw(self, frame: Frame) -> Image.Image:
        page = Image.new("RGB", (WIDTH * SCALE, self.height * SCALE), PAPER)
        pen = ImageDraw.Draw(page)
        if self.picture is not None:
            page.paste(self.picture, (MARGIN * SCALE, MARGIN * SCALE), self.picture)
        for number, words in enumerate(self.question):
            _write(pen, self.left, MARGIN + number * 30, words, 21, INK, bold=True)
        for cell, box in zip(frame.cells, self.boxes, strict=True):
            self._token(pen, cell, box)
        self._progress(pen, frame)
        return page.resize((WIDTH, self.height), Image.Resampling.LANCZOS)

    def _token(self, pen: ImageDraw.ImageDraw, cell: Cell, box: _Box) -> None:
        high = self.size + 12
        edges = [v * SCALE for v in (box.x, box.y, box.x + box.width, box.y + high)]
        label = _label(cell)
        if cell.age == UNKNOWN:
            pen.rounded_rectangle(edges, 7 * SCALE, FILL_END if cell.ends else FILL_BLANK)
            return
        if cell.age < len(FILL_AGE) or cell.ends:
            pen.rounded_rectangle(edges, 7 * SCALE, (*FILL_AGE, FILL_END)[min(cell.age, len(FILL_AGE))])
        if cell.ends:
            x, y, r = box.x + box.width / 2, box.y + high / 2, 2.5
            pen.ellipse([v * SCALE for v in (x - r, y - r, x + r, y + r)], "#ffffff" if cell.age == 0 else "#b9bece")
            return
        ink = INK_AGE[min(cell.age, len(INK_AGE) - 1)]
        pen.text((edges[0] + 7 * SCALE, (edges[1] + edges[3]) / 2), label, ink, _font(self.size * SCALE), anchor="lm")

    def _progress(self, pen: ImageDraw.ImageDraw, frame: Frame) -> None:
        y = self.height - MARGIN - 18
        share = frame.known / len(frame.cells)
        right = WIDTH - MARGIN
        colour = DONE if frame.finished else FILL_AGE[0]
        done = f"{frame.known} of {len(frame.cells)} tokens"
        calls = f"{frame.forwards} model call{'' if frame.forwards == 1 else 's'}"
        _write(pen, MARGIN, y, calls, 14, FAINT)
        pen.text((right * SCALE, y * SCALE), done, FAINT, _font(14 * SCALE), anchor="ra")
        bar = [v * SCALE for v in (MARGIN, y + 24, right, y + 28)]
        pen.rounded_rectangle(bar, 2 * SCALE, RULE)
        if share:
            pen.rounded_rectangle([bar[0], bar[1], bar[0] + (bar[2] - bar[0]) * share, bar[3]], 2 * SCALE, colour)


def _label(cell: Cell) -> str:
    """What is written on a token's chip."""
    if cell.ends or cell.age == UNKNOWN:
        return ""
    text = cell.text.replace("\n", "↵").strip() or "␣"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _framed(picture: Image.Image) -> Image.Image:
    """The picture within its square, small ones enlarged by whole pixels, with round corners."""
    side = PICTURE * SCALE
    scale = min(side / picture.width, side / picture.height)
    resample = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resample)
    corners = Image.new("L", picture.size, 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, picture.width - 1, picture.height - 1), 12 * SCALE, 255)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, 0), corners)
    return square


def _palette(*pages: Image.Image) -> Image.Image:
    """Colours for all frames: the drawing's own exactly, the rest from the picture."""
    beside = Image.new("RGB", (sum(p.width for p in pages), max(p.height for p in pages)), PAPER)
    x = 0
    for page in pages:
        beside.paste(page, (x, 0))
        x += page.width
    own = [getrgb(name) for name in (PAPER, INK, FAINT, RULE, FILL_BLANK, FILL_END, DONE, *FILL_AGE)]
    found = beside.quantize(256 - len(own)).getpalette() or []
    others = [tuple(found[i : i + 3]) for i in range(0, len(found), 3)]
    distinct = [c for c in others if all(max(abs(a - b) for a, b in zip(c, o, strict=True)) > 6 for o in own)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for colour in [*own, *distinct[: 256 - len(own)]] for channel in colour])
    return palette


def _write(
    pen: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, colour: str, *, bold: bool = False
) -> None:
    pen.text((x * SCALE, y * SCALE), text, colour, _font(size * SCALE, bold))


def _text_width(text: str, size: int, bold: bool = False) -> float:
    return _font(size * SCALE, bold).getlength(text) / SCALE


def _wrapped(text: str, size: int, room: float) -> list[str]:
    """Lines of at most `room` pixels, broken between words, and at most four of them."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _text_width(longer, size, True) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= 4 else [*lines[:3], f"{lines[3]} ..."]


@lru_cache(maxsize=32)
def _font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans where it is installed (many scripts), else the face that comes with Pillow."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
