"""Questions about a scene of objects, one function a form: `(rng, scene) -> Asked` or None.

None means that this scene cannot be asked that. Where an answer is yes or no, it is drawn first and both must be
possible; objects are named by attributes that no other object of the picture shares.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dmllm.data.builtin.picture import (
    COUNT,
    EXIST,
    RELATION,
    Asked,
    Turn,
    collect,
    noun_phrase,
    phrased,
    pick,
    shuffled,
    spread,
)

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SIZES = ("small", "large")
WORDS = {"shape": SHAPES, "color": COLORS, "size": SIZES}
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")

# Centres closer than this share of the side are neither left of nor above one another.
OFFSET = 5 / 64
# Centres closer than this share of the side to a line of the 3 x 3 grid have no unambiguous position.
GRID_MARGIN = 2.5 / 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object: its words, its diameter and its centre in pixels."""

    shape: str
    color: str
    size: str
    diameter: float
    x: float
    y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Objects from left to right, no two alike; `counted` is the (attribute, word) whose count may be asked."""

    things: tuple[Thing, ...]
    side: int
    counted: tuple[str, str] | None


# Naming things


def words_of(**words: str) -> str:
    """A noun with the given attributes: "large red circle", "red object"."""
    return " ".join((*(words[name] for name in ("size", "color") if name in words), words.get("shape", "object")))


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def name_of(rng: np.random.Generator, scene: Scene, thing: Thing, *, hide: str = "") -> str:
    """Attributes, without the hidden one, that fit this object only: "the red circle"; empty if there are none."""
    attributes = [name for name in WORDS if name != hide]
    names = []
    for length in range(1 if len(scene.things) > 1 else 0, len(attributes) + 1):
        for chosen in combinations(attributes, length):
            words = {name: getattr(thing, name) for name in chosen}
            fits = sum(all(getattr(other, name) == word for name, word in words.items()) for other in scene.things)
            if fits == 1:
                names.append(words)
    return "the " + words_of(**pick(rng, names)) if names else ""


def outermost(rng: np.random.Generator, scene: Scene) -> tuple[str, Thing] | None:
    """An object named by where it is: "the leftmost object"; None in a scene of one."""
    if len(scene.things) < 2:
        return None
    down = sorted(scene.things, key=lambda thing: thing.y)
    named = [("the leftmost object", scene.things[0]), ("the rightmost object", scene.things[-1])]
    if down[1].y - down[0].y >= OFFSET * scene.side:
        named.append(("the highest object", down[0]))
    if down[-1].y - down[-2].y >= OFFSET * scene.side:
        named.append(("the lowest object", down[-1]))
    return pick(rng, named)


# Attributes


def _attribute(rng: np.random.Generator, scene: Scene, attribute: str, templates: tuple[str, ...]) -> Asked | None:
    if attribute != "size" and rng.random() < 0.25 and (named := outermost(rng, scene)):
        name, thing = named
    else:
        named = [(name, thing) for thing in scene.things if (name := name_of(rng, scene, thing, hide=attribute))]
        if not named:
            return None
        name, thing = pick(rng, named)
    return phrased(rng, templates, name, answer=getattr(thing, attribute))


def ask_color(rng: np.random.Generator, scene: Scene) -> Asked | None:
    return _attribute(
        rng,
        scene,
        "color",
        ("what color is {}?", "what colour is {}?", "what is the color of {}?", "which color does {} have?"),
    )


def ask_shape(rng: np.random.Generator, scene: Scene) -> Asked | None:
    return _attribute(
        rng, scene, "shape", ("what shape is {}?", "what is the shape of {}?", "which shape does {} have?")
    )


def ask_size(rng: np.random.Generator, scene: Scene) -> Asked | None:
    return _attribute(
        rng, scene, "size", ("what size is {}?", "is {} small or large?", "how big is {}, small or large?")
    )


# Counting


def ask_count(rng: np.random.Generator, scene: Scene) -> Asked:
    """How many objects in all."""
    return phrased(rng, COUNT, "objects", answer=str(len(scene.things)))


def ask_count_of(rng: np.random.Generator, scene: Scene) -> Asked | None:
    """How many objects show the counted word: the only word whose count is uniform over 0..4."""
    if scene.counted is None:
        return None
    attribute, word = scene.counted
    noun = plural(words_of(**{attribute: word}))
    templates = ("how many {} are there?", "how many {} are in the picture?", "count the {}.")
    return phrased(rng, templates, noun, answer=str(sum(getattr(thing, attribute) == word for thing in scene.things)))


# Yes or no


def ask_exist(rng: np.random.Generator, scene: Scene) -> Asked:
    """Is there such an object? What is absent is half the time made of parts that are present."""
    yes = rng.random() < 0.5
    attributes = pick(rng, (("shape",), ("color",), ("color", "shape"), ("size", "color", "shape")))
    present = {tuple(getattr(thing, name) for name in attributes) for thing in scene.things}
    if yes:
        words = pick(rng, sorted(present))
    else:
        seen = [sorted({part[i] for part in present}) for i in range(len(attributes))]
        mix = rng.random() < 0.5 and len(attributes) > 1
        recombined = [(a, b) for a in seen[0] for b in seen[-1]] if mix and len(attributes) == 2 else []
        absent = [part for part in recombined if part not in present] or _absent(rng, attributes, present, near=mix)
        words = pick(rng, absent)
    noun = noun_phrase("a", words_of(**dict(zip(attributes, words, strict=True))))
    return phrased(rng, EXIST, noun, answer="yes" if yes else "no")


def _absent(
    rng: np.random.Generator, attributes: tuple[str, ...], present: set[tuple[str, ...]], *, near: bool
) -> list[tuple[str, ...]]:
    """Absent descriptions: one word away from something present if `near`, else any."""
    while True:
        words = list(pick(rng, sorted(present))) if near else [pick(rng, WORDS[name]) for name in attributes]
        if near:
            changed = int(rng.random() * len(attributes))
            words[changed] = pick(rng, WORDS[attributes[changed]])
        if tuple(words) not in present:
            return [tuple(words)]


def ask_relation(rng: np.random.Generator, scene: Scene) -> Asked | None:
    """Is one object left of, right of, above or below another? Both are there; which comes first decides."""
    if len(scene.things) < 2:
        return None
    first, second = shuffled(rng, scene.things)[:2]
    vertical = rng.random() < 0.5 and abs(first.y - second.y) >= OFFSET * scene.side
    axis, (before, after) = ("y", ("above", "below")) if vertical else ("x", ("left of", "right of"))
    if getattr(first, axis) > getattr(second, axis):
        first, second = second, first
    word, yes = pick(rng, (before, after)), rng.random() < 0.5
    if yes == (word == after):
        first, second = second, first
    names = name_of(rng, scene, first), word, name_of(rng, scene, second)
    return phrased(rng, RELATION, *names, answer="yes" if yes else "no")


def ask_compare(rng: np.random.Generator, scene: Scene) -> Asked:
    """Which is larger, of two objects of different sizes; or which are more, of two words with different counts."""
    both = [[thing for thing in scene.things if thing.size == size] for size in SIZES]
    yes = rng.random() < 0.5
    if all(both) and rng.random() < 0.5:
        less, more = (name_of(rng, scene, pick(rng, things), hide="size") for things in both)
        if less and more:
            word = pick(rng, ("larger", "smaller"))
            first, second = (more, less) if yes == (word == "larger") else (less, more)
            return phrased(rng, ("is {} {} than {}?",), first, word, second, answer="yes" if yes else "no")
    attribute = pick(rng, ("shape", "color"))
    shown = [getattr(thing, attribute) for thing in scene.things]
    more = pick(rng, shown)
    rarer = [word for word in WORDS[attribute] if shown.count(word) < shown.count(more)]
    here = [word for word in rarer if word in shown]
    less = pick(rng, here if here and rng.random() < 0.5 else rarer)
    word = pick(rng, ("more", "fewer"))
    first, second = (more, less) if yes == (word == "more") else (less, more)
    nouns = (plural(words_of(**{attribute: name})) for name in (first, second))
    templates = ("are there {} {} than {}?", "does the picture show {} {} than {}?")
    return phrased(rng, templates, word, *nouns, answer="yes" if yes else "no")


# Where, and everything


def grid_name(x: float, y: float, side: float) -> str | None:
    """The cell of the 3 x 3 grid: "top left", "left", "center"; None within GRID_MARGIN of another cell."""
    near = [abs(place - line * side / 3) for place in (x, y) for line in (1, 2)]
    if min(near) < GRID_MARGIN * side:
        return None
    return f"{ROWS[int(y * 3 / side)]} {COLUMNS[int(x * 3 / side)]}".strip() or "center"


def ask_position(rng: np.random.Generator, scene: Scene) -> Asked | None:
    clear = [(thing, name) for thing in scene.things if (name := grid_name(thing.x, thing.y, scene.side))]
    if not clear:
        return None
    thing, answer = pick(rng, clear)
    templates = ("where is {}?", "in which part of the picture is {}?", "where in the picture do you see {}?")
    return phrased(rng, templates, name_of(rng, scene, thing), answer=answer)


def ask_caption(rng: np.random.Generator, scene: Scene) -> Asked:
    """The canonical caption: every object, from left to right."""
    nouns = [noun_phrase("a", words_of(size=t.size, color=t.color, shape=t.shape)) for t in scene.things]
    answer = " and ".join(part for part in (", ".join(nouns[:-1]), nouns[-1]) if part)
    templates = (
        "describe the picture.",
        "describe the picture from left to right.",
        "what is in the picture?",
        "what do you see?",
        "what is in the picture, from left to right?",
        "list the objects from left to right.",
        "caption this picture from left to right.",
    )
    return phrased(rng, templates, answer=answer)


FORMS: dict[str, tuple[str, Callable[[np.random.Generator, Scene], Asked | None]]] = {
    "color": ("color", ask_color),
    "shape": ("shape", ask_shape),
    "size": ("size", ask_size),
    "count": ("count", ask_count),
    "count of": ("count", ask_count_of),
    "exist": ("exist", ask_exist),
    "relation": ("relation", ask_relation),
    "compare": ("compare", ask_compare),
    "position": ("position", ask_position),
    "caption": ("caption", ask_caption),
}


def form_rates(scene: Scene, turns: int) -> dict[str, float]:
    """How often each form is asked of this scene, `turns` in total, so that over all scenes the kinds are balanced.

    Both ways of counting have rates that do not depend on the answer. Relations need two objects: three scenes in four.
    """
    even = turns / len({kind for kind, _ in FORMS.values()})
    fixed = {
        "count": even / 2,
        "count of": even if scene.counted else 0.0,
        "relation": even * 4 / 3 if len(scene.things) > 1 else 0.0,
    }
    rest = [form for form in FORMS if form not in fixed]
    return fixed | dict.fromkeys(rest, (turns - sum(fixed.values())) / len(rest))


def ask(rng: np.random.Generator, scene: Scene, turns: int) -> tuple[Turn, ...]:
    """The scene's questions, no two alike; a caption, which gives much away, comes last."""
    asked = collect(rng, scene, [FORMS[form] for form in spread(rng, form_rates(scene, turns))])
    return tuple(sorted(asked, key=lambda turn: turn.kind == "caption"))
