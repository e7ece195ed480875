"""`digits`: real handwriting. One to six scanned digits a picture, in one or two rows, with questions about them.

The scans are the 1797 of 8 x 8 pixels that come with scikit-learn, so nothing is downloaded. Eight in ten of each digit
are used in train, one in ten in val and one in ten in test: a test picture shows handwriting never seen in training.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

import hashlib
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from dmllm.data.builtin import rows
from dmllm.data.builtin.picture import Dataset, Picture, pick

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError("The data set `digits` uses the scans in scikit-learn; type: pip install scikit-learn") from error


@dataclass(frozen=True, kw_only=True)
class DigitOptions:
    """What may be chosen about `digits`."""

    # Questions a picture, on average; with 10, two of each kind, about different things where there are two.
    turns: int = 5

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ValueError(f"turns={self.turns}: a picture needs at least one question; try turns=5.")


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


def compose(rng: np.random.Generator, split: str, size: int, options: DigitOptions) -> Picture:
    """One picture of `split`, `size` pixels wide and high."""
    pool = partition(split)

    def draw(rng: np.random.Generator) -> tuple[str, int]:
        digit = int(rng.random() * 10)
        return rows.DIGITS[digit], pick(rng, pool[digit])

    drawn = rows.draw_rows(rng, size, draw)
    shown = [[{"digit": int(p.character), "scan": p.image, "box": p.box} for p in row] for row in drawn]
    truth = {"picture": "digits", "rows": shown}
    return rows.compose(rng, drawn, size=size, alphabet=rows.DIGITS, turns=options.turns, mask=enlarged, truth=truth)


@lru_cache(maxsize=8192)
def enlarged(digit: str, index: int, side: int) -> np.ndarray:
    """Scan number `index` as coverage in 0..1, [side, side, 1]."""
    image = Image.fromarray(scans()[0][index]).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)[:, :, None] / 255


DATASET = Dataset(
    description=(
        "Real handwriting: 1 to 6 of the 1797 scanned digits that come with scikit-learn, in one or two rows, with "
        "questions about them. The scans of val and test pictures are never used in train."
    ),
    kinds=rows.KINDS,
    options=DigitOptions,
    compose=compose,
)
