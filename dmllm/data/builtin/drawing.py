"""Drawing small pictures quickly: backgrounds, anti-aliased shapes, blending, PNG.

Masks are drawn eight times too large, averaged down and cached by their quarter-pixel place, so that painting an object
is one blend of a small window. Lengths are pixels; pictures are float32 [size, size, 3] in 0..255 until `finish`.
"""

import io
import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from dmllm.data.builtin.picture import pick

BACKGROUNDS = ("plain", "gradient", "noise", "checks")
OVERSAMPLE = 8
# Places and diameters are multiples of this, in pixels, so that few different masks exist.
QUANTUM = 0.25


def _star() -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        radius, angle = (1.0, 0.42)[corner % 2], math.pi * (corner / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    width, low = max(x for x, _ in points), max(y for _, y in points)
    return [(x / width, (y + 1) / (low + 1) * 2 - 1) for x, y in points]


def _cross(arm: float = 0.34) -> list[tuple[float, float]]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    turns = (lambda x, y: (x, y), lambda x, y: (-y, x), lambda x, y: (-x, -y), lambda x, y: (y, -x))
    return [turn(x, y) for turn in turns for x, y in quarter]


# Corners in the unit box [-1, 1] x [-1, 1], y down. Every shape touches all four sides of the box.
POLYGONS = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "star": _star(),
    "cross": _cross(),
}


def quantise(length: float) -> float:
    """The nearest multiple of QUANTUM."""
    return round(length / QUANTUM) * QUANTUM


@lru_cache(maxsize=4096)
def shape_mask(shape: str, diameter: float, left: float, top: float) -> np.ndarray:
    """Coverage in 0..1 of a shape whose box begins `left`, `top` (each in [0, 1)) after the corner. [h, w, 1]"""
    side = math.ceil(diameter + 1)
    image = Image.new("L", (side * OVERSAMPLE, side * OVERSAMPLE))
    x0, y0, span = left * OVERSAMPLE, top * OVERSAMPLE, diameter * OVERSAMPLE
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x0, y0, x0 + span - 1, y0 + span - 1), fill=255)
    else:
        corners = [(x0 + (x + 1) / 2 * (span - 1), y0 + (y + 1) / 2 * (span - 1)) for x, y in POLYGONS[shape]]
        draw.polygon(corners, fill=255)
    return np.asarray(image.reduce(OVERSAMPLE), dtype=np.float32)[:, :, None] / 255


def blend(canvas: np.ndarray, mask: np.ndarray, left: int, top: int, ink: np.ndarray) -> None:
    """Lay `ink` [3] over the canvas where the mask [h, w, 1] says so; what lies beyond the canvas is cut off."""
    window = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    window += (ink - window) * mask[: window.shape[0], : window.shape[1]]


@lru_cache(maxsize=8)
def _ramps(size: int) -> tuple[np.ndarray, np.ndarray]:
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    return ramp[None, :, None], ramp[:, None, None]


def muted(rng: np.random.Generator, level: float) -> np.ndarray:
    """A colour near the grey `level`, tinted a little. [3]"""
    return (level + rng.uniform(-12, 12, 3)).astype(np.float32)


def background(rng: np.random.Generator, size: int, level: float) -> tuple[str, np.ndarray]:
    """One of BACKGROUNDS around the grey `level`: its name and a fresh canvas. [size, size, 3]"""
    kind, colour = pick(rng, BACKGROUNDS), muted(rng, level)
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = colour
    contrast = muted(rng, 0) + (16 if rng.random() < 0.5 else -16)
    if kind == "gradient":
        across, down = _ramps(size)
        angle = rng.random() * 2 * math.pi
        canvas += (across * math.cos(angle) + down * math.sin(angle)) * (1.6 * contrast)
    elif kind == "noise":
        grain = max(1, size // 32)
        grains = rng.uniform(-14, 14, (size // grain + 1, size // grain + 1)).astype(np.float32)
        canvas += grains.repeat(grain, 0).repeat(grain, 1)[:size, :size, None]
    elif kind == "checks":
        period = pick(rng, (8, 12, 16)) * size / 64
        phase = rng.random(2) * 2 * period
        rows, columns = (((np.arange(size) + shift) // period).astype(np.int64) % 2 for shift in phase)
        canvas += (rows[:, None] ^ columns[None, :]).astype(np.float32)[:, :, None] * (0.7 * contrast)
    return kind, canvas


def finish(canvas: np.ndarray) -> np.ndarray:
    """The canvas as uint8."""
    return np.clip(canvas, 0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """The picture [height, width, 3] uint8 as a PNG file, compressed lightly because speed matters here."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
