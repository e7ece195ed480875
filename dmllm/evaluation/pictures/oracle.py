"""An oracle for pictures of `scenes`: which objects one shows, by colour, connected parts and geometry. No model.

    pixels -> how much of each ink covers each pixel -> connected parts of an ink -> the shape whose outline fits best

It has only to tell apart what the data set can paint: six shapes, eight inks, two sizes, on muted backgrounds. What
resembles none of them well enough is reported as no shape, so that a smear does not count as an object.

Lengths are pixels; y grows downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmllm.data.builtin.drawing import POLYGONS, quantise, shape_mask
from dmllm.data.builtin.scenes import DIAMETERS, INKS

SHAPES = ("circle", *POLYGONS)
LEAST = 0.25  # share of the smallest object's box that a part must cover to be one
FIT = 0.72  # intersection over union with an outline from which on it is that shape
BETWEEN = (DIAMETERS["small"][-1] + DIAMETERS["large"][0]) / 2  # of the side: larger is large


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An object: words, centre, diameter, and how well its outline fits (intersection over union, 0 to 1)."""

    shape: str | None  # None: like none of them
    color: str
    size: str
    x: float
    y: float
    diameter: float
    fit: float


def read(pixels: np.ndarray) -> list[Seen]:
    """The objects of a picture uint8 [H, W, 3], from left to right; specks are left out.

    Raises:
        ValueError: not a picture of three channels.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"A picture is [height, width, 3], not {list(pixels.shape)}; img.convert('RGB') makes it so.")
    side = max(pixels.shape[:2])
    ink, cover = covered(pixels.astype(np.float32))
    seen = []
    for number, color in enumerate(INKS):
        own = np.where(ink == number, cover, 0.0)
        for part in parts(own > 0.5):
            if part.sum() >= LEAST * (DIAMETERS["small"][0] * side) ** 2:
                seen.append(_object(np.where(_grown(part), own, 0.0), color, side))
    return sorted(seen, key=lambda thing: thing.x)


def covered(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which ink is in each pixel, [H, W], and how much of it covers the background, 0 to 1."""
    spread = pixels.max(2) - pixels.min(2)
    muted = (spread < 60) & (pixels.mean(2) < 150)
    ground = np.median(pixels[muted], 0) if muted.any() else np.full(3, 58, np.float32)
    inks = np.asarray(list(INKS.values()), np.float32)
    way = inks - ground  # [C, 3]
    share = ((pixels - ground)[:, :, None] * way).sum(-1) / (way**2).sum(-1)  # [H, W, C]
    share = share.clip(0, 1)
    missed = np.linalg.norm(pixels[:, :, None] - ground - share[..., None] * way, axis=-1)
    ink = missed.argmin(-1)
    return ink, np.take_along_axis(share, ink[..., None], -1)[..., 0]


def parts(there: np.ndarray) -> list[np.ndarray]:
    """The connected parts of [H, W] bool, by sides; each as a mask of the same size."""
    label = np.where(there, np.arange(1, there.size + 1).reshape(there.shape), 0)
    while True:
        padded = np.pad(label, 1)
        near = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]]
        found = np.where(there, np.maximum.reduce([label, *near]), 0)
        if (found == label).all():
            return [label == name for name in np.unique(label[there])]
        label = found


def _grown(part: np.ndarray) -> np.ndarray:
    """The part with the pixels at its border, which an object covers less than half."""
    padded = np.pad(part, 1)
    rows, columns = part.shape
    return np.logical_or.reduce([padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)])


def _object(cover: np.ndarray, color: str, side: int) -> Seen:
    """What covers the picture so, [H, W]."""
    left, right = _ends(cover.max(0))
    top, bottom = _ends(cover.max(1))
    diameter = max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    fits = {shape: _fit(cover, shape, x, y, diameter) for shape in SHAPES}
    best = max(fits, key=lambda shape: fits[shape])
    return Seen(
        shape=best if fits[best] >= FIT else None,
        color=color,
        size="large" if diameter > BETWEEN * side else "small",
        x=x,
        y=y,
        diameter=diameter,
        fit=fits[best],
    )


def _ends(profile: np.ndarray) -> tuple[float, float]:
    """Where a profile of coverage begins and ends, the pixels at its border counted by how far they are covered."""
    inside = np.flatnonzero(profile > 0.5)
    first, last = inside[0], inside[-1]
    before = profile[first - 1] if first else 0.0
    behind = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first + 1 - max(profile[first], 0.5) - before, last + max(profile[last], 0.5) + behind


def _fit(cover: np.ndarray, shape: str, x: float, y: float, diameter: float) -> float:
    """The best intersection over union of the coverage with an outline of about this place and size."""
    best = 0.0
    for grow in (-0.5, 0.0, 0.5):
        size = max(quantise(diameter + grow), 2.0)
        for dx in (-0.5, 0.0, 0.5):
            for dy in (-0.5, 0.0, 0.5):
                best = max(best, _overlap(cover, shape, quantise(x + dx - size / 2), quantise(y + dy - size / 2), size))
    return best


def _overlap(cover: np.ndarray, shape: str, left: float, top: float, size: float) -> float:
    mask = shape_mask(shape, size, left % 1, top % 1)[..., 0]
    column, row = int(np.floor(left)), int(np.floor(top))
    over = np.zeros((cover.shape[0] + 2 * len(mask), cover.shape[1] + 2 * len(mask)), np.float32)
    over[row + len(mask) : row + 2 * len(mask), column + len(mask) : column + 2 * len(mask)] = mask
    over = over[len(mask) : len(mask) + cover.shape[0], len(mask) : len(mask) + cover.shape[1]]
    return float(np.minimum(cover, over).sum() / (np.maximum(cover, over).sum() + mask.sum() - over.sum()))
