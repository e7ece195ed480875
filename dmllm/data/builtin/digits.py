"""`digits`: real handwriting. One to six scanned digits a picture, in one or two rows, with questions about them.

The scans are the 1797 of 8 x 8 pixels that come with scikit-learn, so nothing is downloaded. Eight in ten of each digit
are used in train, one in ten in val and one in ten in test: a test picture shows handwriting never seen in training.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

import hashlib
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image

from dmllm.data.builtin import drawing
from dmllm.data.builtin.picture import (
    COUNT,
    EXIST,
    NEIGHBOR,
    Asked,
    Dataset,
    Picture,
    Turn,
    collect,
    phrased,
    pick,
    spread,
)

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError("The data set `digits` uses the scans in scikit-learn; type: pip install scikit-learn") from error

KINDS = ("neighbor", "count", "exist", "sum", "read")
MAX_IN_ROW = 3
# Lengths are fractions of the picture's side.
SCAN_SIDES = tuple(side / 64 for side in range(16, 25))
# The scans of one row stand this far above or below its middle at most, so that rows are told apart.
JITTER = 3 / 64


@dataclass(frozen=True, kw_only=True)
class DigitOptions:
    """What may be chosen about `digits`."""

    # Questions a picture, on average; with 10, two of each kind, about different things where there are two.
    turns: int = 5

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ValueError(f"turns={self.turns}: a picture needs at least one question; try turns=5.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """One scan in a picture: its digit, its number in the collection, its box in pixels."""

    digit: int
    index: int
    left: int
    top: int
    side: int


Rows = tuple[tuple[Scan, ...], ...]


# The collection


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """Every scan [1797, 8, 8] uint8 in 0..255, and its digit [1797]."""
    images, digits = (np.asarray(part) for part in load_digits(return_X_y=True))
    return np.clip(images.reshape(-1, 8, 8) * 16, 0, 255).astype(np.uint8), digits


@cache
def partition(split: str) -> tuple[tuple[int, ...], ...]:
    """For each digit 0..9 the scans of this split: the same 80, 10 and 10 % on every machine."""
    _, digits = scans()
    chosen = []
    for digit in range(10):
        order = sorted(np.flatnonzero(digits == digit).tolist(), key=_hash)
        tenth = len(order) // 10
        parts = {"val": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
        chosen.append(tuple(parts[split]))
    return tuple(chosen)


def _hash(index: int) -> bytes:
    return hashlib.blake2b(f"digit scan {index}".encode(), digest_size=8).digest()


# A picture


def compose(rng: np.random.Generator, split: str, size: int, options: DigitOptions) -> Picture:
    """One picture of `split`, `size` pixels wide and high."""
    rows = draw_rows(rng, split, size)
    turns = ask(rng, rows, options.turns)
    dark = rng.random() < 0.5
    backdrop, canvas = drawing.background(rng, size, level=rng.uniform(20, 70) if dark else rng.uniform(175, 230))
    truth = {
        "picture": "digits",
        "background": backdrop,
        "rows": [
            [{"digit": s.digit, "scan": s.index, "box": [s.left, s.top, s.left + s.side, s.top + s.side]} for s in row]
            for row in rows
        ],
    }
    return Picture(turns=turns, truth=truth, paint=lambda: paint(rng, rows, canvas, dark=dark))


def draw_rows(rng: np.random.Generator, split: str, size: int) -> Rows:
    """How many (uniform over 1..6), in which rows (uniform over what fits), which scans (digit first), and where."""
    number = 1 + int(rng.random() * 2 * MAX_IN_ROW)
    upper = range(max(1, number - MAX_IN_ROW), min(MAX_IN_ROW, number) + 1)
    first = pick(rng, upper)
    lengths = [first, number - first] if number > first else [number]
    pool, height = partition(split), size // len(lengths)
    rows = []
    for row, length in enumerate(lengths):
        width, scanned = size // length, []
        room = min(width, height) - 1
        sides = [side for share in SCAN_SIDES if (side := round(share * size)) <= room]
        # The row's middle, in the picture, such that the largest scan has its place above and below it.
        middle = row * height + sides[-1] / 2 + (height - sides[-1]) * rng.random()
        for column in range(length):
            digit, side = int(rng.random() * 10), pick(rng, sides)
            left = column * width + int(rng.random() * (width - side + 1))
            top = round(middle - side / 2 + (rng.random() * 2 - 1) * JITTER * size)
            top = min(max(top, row * height), (row + 1) * height - side)
            scanned.append(Scan(digit=digit, index=pick(rng, pool[digit]), left=left, top=top, side=side))
        rows.append(tuple(scanned))
    return tuple(rows)


@lru_cache(maxsize=8192)
def _enlarged(index: int, side: int) -> np.ndarray:
    image = Image.fromarray(scans()[0][index]).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)[:, :, None] / 255  # [side, side, 1]


def paint(rng: np.random.Generator, rows: Rows, canvas: np.ndarray, *, dark: bool) -> np.ndarray:
    """The scans as ink over the background: light ink on dark ground or the reverse. uint8 [size, size, 3]"""
    for scan in (scan for row in rows for scan in row):
        ink = np.float32(rng.uniform(190, 250) if dark else rng.uniform(0, 60)) + rng.uniform(-30, 30, 3)
        drawing.blend(canvas, _enlarged(scan.index, scan.side), scan.left, scan.top, ink.astype(np.float32))
    return drawing.finish(canvas)


# Questions


def ask_neighbor(rng: np.random.Generator, rows: Rows) -> Asked | None:
    """Which digit is next to a digit that occurs once; above and below only in rows of one length, in line."""
    shown = [scan.digit for row in rows for scan in row]
    found = []
    for row in rows:
        for one, other in pairwise(row):
            found += [("left of", other.digit, one.digit), ("right of", one.digit, other.digit)]
    if len(rows) == 2 and len(rows[0]) == len(rows[1]):
        for one, other in zip(*rows, strict=True):
            if abs(one.left + one.side / 2 - other.left - other.side / 2) < min(one.side, other.side) / 2:
                found += [("above", other.digit, one.digit), ("below", one.digit, other.digit)]
    found = [entry for entry in found if shown.count(entry[1]) == 1]
    if not found:
        return None
    word, known, answer = pick(rng, found)
    return phrased(rng, NEIGHBOR, "digit", word, str(known), answer=str(answer))


def ask_count(rng: np.random.Generator, rows: Rows) -> Asked:
    return phrased(rng, COUNT, "digits", answer=str(sum(len(row) for row in rows)))


def ask_exist(rng: np.random.Generator, rows: Rows) -> Asked:
    shown, yes = {scan.digit for row in rows for scan in row}, rng.random() < 0.5
    digit = pick(rng, [digit for digit in range(10) if (digit in shown) == yes])
    phrase = f"{'an' if digit == 8 else 'a'} {digit}"
    return phrased(rng, EXIST, phrase, answer="yes" if yes else "no")


def ask_sum(rng: np.random.Generator, rows: Rows) -> Asked | None:
    """The sum of two or three digits: all of them, or those of one row."""
    sums = [(" in the picture", [scan for row in rows for scan in row])]
    if len(rows) == 2:
        sums += [(f" in the {place} row", list(row)) for place, row in zip(("top", "bottom"), rows, strict=True)]
    sums = [(place, chosen) for place, chosen in sums if len(chosen) in (2, 3)]
    if not sums:
        return None
    place, chosen = pick(rng, sums)
    templates = ("what is the sum of the digits{}?", "what do the digits{} add up to?", "add up the digits{}.")
    return phrased(rng, templates, place, answer=str(sum(scan.digit for scan in chosen)))


def ask_read(rng: np.random.Generator, rows: Rows) -> Asked:
    """All digits, rows joined by one space."""
    templates = (
        "read the digits.",
        "which digits are shown, in order?",
        "transcribe all digits.",
        "which digits do you see?",
    )
    return phrased(rng, templates, answer=" ".join("".join(str(scan.digit) for scan in row) for row in rows))


FORMS = {"neighbor": ask_neighbor, "count": ask_count, "exist": ask_exist, "sum": ask_sum, "read": ask_read}


def form_rates(rows: Rows, turns: int) -> dict[str, float]:
    """How often each kind is asked, `turns` in total, so that over all pictures the kinds are balanced.

    Three pictures in four have a row of two digits or more; five in six have two digits or more.
    """
    even = turns / len(KINDS)
    fixed = {
        "count": even,
        "neighbor": even * 4 / 3 if max(len(row) for row in rows) > 1 else 0.0,
        "sum": even * 6 / 5 if sum(len(row) for row in rows) > 1 else 0.0,
    }
    rest = [kind for kind in KINDS if kind not in fixed]
    return fixed | dict.fromkeys(rest, (turns - sum(fixed.values())) / len(rest))


def ask(rng: np.random.Generator, rows: Rows, turns: int) -> tuple[Turn, ...]:
    """The picture's questions, no two alike."""
    return tuple(collect(rng, rows, [(kind, FORMS[kind]) for kind in spread(rng, form_rates(rows, turns))]))


DATASET = Dataset(
    description=(
        "Real handwriting: 1 to 6 of the 1797 scanned digits that come with scikit-learn, in one or two rows, with "
        "questions about them. The scans of val and test pictures are never used in train."
    ),
    kinds=KINDS,
    options=DigitOptions,
    compose=compose,
)
