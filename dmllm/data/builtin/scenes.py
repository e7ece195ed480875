"""`scenes`: one to four coloured shapes on muted backgrounds, and shares of pictures with characters to read.

Every answer is as likely as the others of its kind whatever the question says, by symmetry rather than by filtering:
shapes, colours and sizes are drawn uniformly and exchangeably; places are drawn cell first on a 3 x 3 grid; the number
of objects is uniform. One scene in two is a *counting* scene: it fixes how often one word (a shape, colour or size)
occurs, uniformly over 0..4, and only that count is asked of a word; the other scenes are drawn from what then remains
for the number of objects (`FREE_NUMBER`).

Lengths are fractions of the picture's side where they are constants and pixels in a `Thing`; y grows downwards.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmllm.data.builtin import drawing, large_print, questions, reading, rows
from dmllm.data.builtin.picture import Dataset, Picture, pick, split_of
from dmllm.data.builtin.questions import COLORS, SHAPES, SIZES, WORDS, Scene, Thing

INKS = {
    "red": (222, 38, 44),
    "green": (40, 168, 62),
    "blue": (44, 88, 236),
    "yellow": (250, 228, 52),
    "purple": (164, 62, 206),
    "orange": (248, 138, 24),
    "cyan": (70, 222, 234),
    "white": (246, 246, 246),
}
assert tuple(INKS) == COLORS

MAX_OBJECTS = 4
DIAMETERS = {"small": (11 / 64, 12 / 64, 13 / 64), "large": (18 / 64, 19 / 64, 20 / 64)}
# Boxes of two objects stay this far apart, and inside the picture by as much.
GAP = 1 / 64
# P(number of objects = 1..4) in the scenes that count nothing, so that over all scenes it is uniform.
FREE_NUMBER = (0.4, 1 / 3, 7 / 30, 1 / 30)
KINDS = (*dict.fromkeys([*(kind for kind, _ in questions.FORMS.values()), "reading", *rows.KINDS]),)
# Two descriptions that fall into the same cells of this grid belong to the same split.
SPLIT_GRID = 16


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """What may be chosen about `scenes`."""

    # Questions a picture, on average.
    turns: int = 8
    # Share of the pictures that show characters to read instead of objects.
    reading: float = 0.18
    # Share of the pictures that show one to six large characters, with the kinds of questions that `digits` asks.
    large_print: float = 0.0
    # Keep only questions of these kinds, e.g. ["relation"]; none: all kinds.
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds={unknown} are not asked of scenes; known are: {', '.join(KINDS)}.")
        if self.turns < 1:
            raise ValueError(f"turns={self.turns}: a picture needs at least one question; try turns=8.")
        if not (0 <= self.reading <= 1 and 0 <= self.large_print <= 1 and self.reading + self.large_print <= 1):
            raise ValueError(
                f"reading={self.reading} and large_print={self.large_print} are not shares between 0 and 1 that leave "
                "a rest for objects; try reading=0.18 and large_print=0."
            )


def compose(rng: np.random.Generator, split: str, size: int, options: SceneOptions) -> Picture:
    """One picture of `split`, `size` pixels wide and high, with at least one question."""
    while True:
        picture = _compose(rng, split, size, options)
        turns = tuple(turn for turn in picture.turns if not options.kinds or turn.kind in options.kinds)
        if turns:
            return replace(picture, turns=turns)


def _compose(rng: np.random.Generator, split: str, size: int, options: SceneOptions) -> Picture:
    sort = rng.random()
    if sort < options.reading:
        return reading.compose(rng, split, size)
    if sort < options.reading + options.large_print:
        return large_print.compose(rng, split, size, options.turns)
    scene = draw_scene(rng, size)
    while split_of(canonical(scene)) != split:
        scene = draw_scene(rng, size)
    turns = questions.ask(rng, scene, options.turns)
    backdrop, canvas = drawing.background(rng, size, level=rng.uniform(24, 92))
    return Picture(turns=turns, truth=truth(scene, backdrop), paint=lambda: paint(rng, scene, canvas))


# What is in the scene


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """A scene with its places; see the module's docstring for the distribution."""
    counted = None
    if rng.random() < 0.5:
        times = int(rng.random() * (MAX_OBJECTS + 1))
        number = pick(rng, range(max(1, times), MAX_OBJECTS + 1))
        attribute = pick(rng, tuple(WORDS))
        counted = (attribute, pick(rng, WORDS[attribute]))
        looks = _looks(rng, number, counted, times)
    else:
        number = 1 + int(np.searchsorted(np.cumsum(FREE_NUMBER)[:-1], rng.random(), side="right"))
        looks = _looks(rng, number)
    diameters = [drawing.quantise(pick(rng, DIAMETERS[look[2]]) * size) for look in looks]
    places = draw_places(rng, diameters, size)
    things = [
        Thing(shape=shape, color=color, size=big, diameter=diameter, x=x, y=y)
        for (shape, color, big), diameter, (x, y) in zip(looks, diameters, places, strict=True)
    ]
    return Scene(things=tuple(sorted(things, key=lambda thing: thing.x)), side=size, counted=counted)


def _looks(
    rng: np.random.Generator, number: int, counted: tuple[str, str] | None = None, times: int = 0
) -> list[tuple[str, str, str]]:
    """(shape, colour, size) of each object, no two alike, `times` of them showing the counted word."""
    while True:
        looks = []
        for index in range(number):
            look = {attribute: pick(rng, words) for attribute, words in WORDS.items()}
            if counted:
                attribute, word = counted
                others = [other for other in WORDS[attribute] if other != word]
                look[attribute] = word if index < times else pick(rng, others)
            looks.append((look["shape"], look["color"], look["size"]))
        if len(set(looks)) == number:
            return looks


# Where it is


def draw_places(rng: np.random.Generator, diameters: list[float], size: int) -> list[tuple[float, float]]:
    """A centre for each diameter: boxes apart, centres apart in x, the first one well inside its grid cell.

    Each object gets its own cell of the 3 x 3 grid, no row or column holding three: a rule that treats all cells alike.
    The few sets of cells that cannot hold large objects are given up after some attempts.
    """
    while True:
        cells = rng.permutation(9)[: len(diameters)].tolist()
        if max(*map([cell // 3 for cell in cells].count, range(3)), *map([c % 3 for c in cells].count, range(3))) > 2:
            continue
        for _ in range(30):
            if places := _places_in(rng, cells, diameters, size):
                return places


def _places_in(
    rng: np.random.Generator, cells: list[int], diameters: list[float], size: int
) -> list[tuple[float, float]]:
    """A centre in each cell, or nothing if one object finds no room after the others."""
    places: list[tuple[float, float]] = []
    for index, (cell, diameter) in enumerate(zip(cells, diameters, strict=True)):
        for _ in range(8):
            x, y = (_within(rng, line, diameter, size, core=index == 0) for line in (cell % 3, cell // 3))
            if _fits(x, y, diameter, places, diameters, size):
                places.append((x, y))
                break
        else:
            return []
    return places


def _within(rng: np.random.Generator, line: int, diameter: float, size: int, *, core: bool) -> float:
    """A coordinate in the third number `line` of the picture, at a distance from its inner borders if `core`."""
    edge, margin = diameter / 2 + GAP * size, questions.GRID_MARGIN * size if core else 0.0
    low = edge if line == 0 else line * size / 3 + margin
    high = size - edge if line == 2 else (line + 1) * size / 3 - margin
    return drawing.quantise(low + (high - low) * rng.random())


def _fits(
    x: float, y: float, diameter: float, places: list[tuple[float, float]], diameters: list[float], size: int
) -> bool:
    for (other_x, other_y), other in zip(places, diameters, strict=False):
        reach = (diameter + other) / 2 + GAP * size
        across, down = abs(x - other_x), abs(y - other_y)
        if across < questions.OFFSET * size or (across < reach and down < reach):
            return False
    return True


# What is written down, and painted


def canonical(scene: Scene) -> str:
    """What decides the split: looks and coarse places."""
    step = scene.side / SPLIT_GRID
    return ";".join(
        sorted(
            f"{thing.shape},{thing.color},{thing.size},{thing.x // step},{thing.y // step}" for thing in scene.things
        )
    )


def truth(scene: Scene, backdrop: str) -> dict[str, Any]:
    """The exact content: centres and boxes (x0, y0, x1, y1) in pixels, objects from left to right."""
    objects = []
    for thing in scene.things:
        half = thing.diameter / 2
        box = [thing.x - half, thing.y - half, thing.x + half, thing.y + half]
        objects.append(
            {"shape": thing.shape, "color": thing.color, "size": thing.size, "center": [thing.x, thing.y], "box": box}
        )
    return {"picture": "objects", "background": backdrop, "objects": objects}


def paint(rng: np.random.Generator, scene: Scene, canvas: np.ndarray) -> np.ndarray:
    """The scene over its background. uint8 [size, size, 3]"""
    shades = rng.uniform(-9, 9, (len(scene.things), 3)).astype(np.float32)
    for thing, shade in zip(scene.things, shades, strict=True):
        left, top = thing.x - thing.diameter / 2, thing.y - thing.diameter / 2
        mask = drawing.shape_mask(thing.shape, thing.diameter, left % 1, top % 1)
        drawing.blend(canvas, mask, int(left), int(top), np.asarray(INKS[thing.color], np.float32) + shade)
    return drawing.finish(canvas)


DATASET = Dataset(
    description=(
        f"Rendered pictures of 1 to {MAX_OBJECTS} objects ({', '.join(SHAPES)}; {', '.join(COLORS)}; "
        f"{' or '.join(SIZES)}) on varied backgrounds, and pictures of 8 to 16 characters to read, with "
        "questions about them."
    ),
    kinds=KINDS,
    options=SceneOptions,
    compose=compose,
)
