"""`stories`: short texts without pictures, in which what is missing follows from what is there.

    story    today anna is left of ben. cleo is right of ben. ben goes to the farm with 3 pears and finds 4 more.
             at the farm ben has 7 pears. the row is anna, ben, cleo.
    fact     today anna lives in rome and paints 3 red pears.
    where    where does anna live? rome          who    who lives in rome? anna

The end of a story follows from its beginning (continuation), its middle from both sides (infilling) and its beginning
from its end, but for the wording of who is left of whom (reversal). Who lives where is the same in all texts and has to
be remembered: `recall` asks for the town behind the name, `reversal of facts` for the name before the town. Questions
are asked of half of the people in train and of others in val and test, so that who learns to answer them must find by
the town whom it has only met by name ("the reversal curse", Berglund et al., arXiv:2309.12288).

Stories are uniform over `num_stories()` texts, so that no model can say less than log of that of one: `entropy()`.
`holds` is the oracle. Splits share no story and no fact: what a text says decides where it belongs.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmllm.data.builtin.picture import Dataset, Picture, Turn, pick, shuffled, split_of


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "anna ben cleo dora emil finn gina hugo ines jack kira leon mona nils olga paul rosa sven tina uwe vera will xena "
    "yuri zoe adam bella carl dana eric fiona greg hana ivan jana kurt lena max nora oscar pia ralf sara tom ulla vito "
    "wanda yann"
)
TOWNS = _words(
    "rome paris oslo bern cairo delhi lima quito tokyo seoul hanoi accra dakar tunis doha minsk riga turin milan genoa "
    "lyon nice lille porto faro sofia varna kyiv bonn kiel trier essen ulm graz linz basel davos malmo turku lagos "
    "kano addis perth osaka kyoto miami boston salem"
)
# Everyone's town, without a rule by which it could be guessed.
HOMES = {name: TOWNS[(29 * i + 17) % len(TOWNS)] for i, name in enumerate(NAMES)}
PEOPLE = {town: name for name, town in HOMES.items()}
THINGS = _words("apples pears plums nuts figs coins shells stones books kites boats drums")
PLACES = _words("farm lake park school market station harbor forest castle bridge tower garden")
COLORS = _words("red green blue yellow purple orange black white")
MOST = 5  # things that one brings or finds
CAST = NAMES[:24]  # of the stories; facts are of all
KINDS = ("story", "fact", "where", "who")
SHARES = {"story": 0.7, "fact": 0.2, "where": 0.05, "who": 0.05}
WRONG = 3  # fillings of each hole that do not hold

_NAME, _ACTOR = rf"(?:{'|'.join(NAMES)})", rf"(?:{'|'.join(CAST)})"
_STORY = re.compile(
    rf"today ({_ACTOR}) is (left|right) of ({_ACTOR})\. ({_ACTOR}) is (left|right) of ({_ACTOR})\. "
    rf"({_ACTOR}) goes to the (\w+) with (\d+) (\w+) and finds (\d+) more\. "
    rf"at the (\w+) ({_ACTOR}) has (\d+) (\w+)\. the row is ({_ACTOR}), ({_ACTOR}), ({_ACTOR})\."
)
_FACT = re.compile(rf"today ({_NAME}) lives in (\w+) and paints (\d+) (\w+) (\w+)\.")


@dataclass(frozen=True, kw_only=True)
class StoryOptions:
    """What may be chosen about `stories`."""

    # Keep only texts of these kinds, e.g. ["story"]; none: all kinds.
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds={unknown} are not among stories; known are: {', '.join(KINDS)}.")


@dataclass(frozen=True, kw_only=True)
class Story:
    """What happens."""

    row: tuple[str, str, str]  # from left to right
    wording: tuple[bool, bool]  # of each neighbour relation: whether it is said from the left one
    hero: str
    place: str
    brings: int
    thing: str
    finds: int

    def parts(self) -> dict[str, str]:
        """The text in six stretches."""
        first, second = (
            f"{a} is left of {b}" if from_left else f"{b} is right of {a}"
            for a, b, from_left in zip(self.row, self.row[1:], self.wording)
        )
        return {
            "beginning": f"today {first}. {second}. {self.hero} goes to the {self.place} with {self.brings}",
            "goods": f"{self.thing} and",
            "finds": f"finds {self.finds} more.",
            "return": f"at the {self.place} {self.hero} has",
            "sum": f"{self.brings + self.finds} {self.thing}.",
            "row": f"the row is {', '.join(self.row)}.",
        }

    def text(self) -> str:
        return " ".join(self.parts().values())

    def hole(self, name: str) -> tuple[str, str, str]:
        """The text before, in and behind a hole; see HOLES."""
        parts = self.parts()
        return _cut(list(parts.values()), *HOLES[name], self.text())


# Which stretches are missing, first and last of them.
HOLES = {"continuation": (3, 5), "infilling": (2, 3), "reversal": (0, 0)}


def _cut(parts: list[str], first: int, last: int, whole: str) -> tuple[str, str, str]:
    start = sum(len(part) + 1 for part in parts[:first])
    end = start + len(" ".join(parts[first : last + 1]))
    return whole[:start], whole[start:end], whole[end:]


def num_stories() -> int:
    """How many different stories there are; all are equally probable."""
    rows = math.perm(len(CAST), 3)
    return rows * 3 * 2**2 * len(PLACES) * len(THINGS) * MOST**2


def entropy() -> float:
    """Nats a story: what the best possible model says of one."""
    return math.log(num_stories())


def holds(text: str) -> bool:
    """Whether a text is a story or a fact, written as they are, in which everything fits together."""
    if found := _FACT.fullmatch(text):
        name, town, _, color, thing = found.groups()
        return HOMES[name] == town and color in COLORS and thing in THINGS and 1 <= int(found[3]) <= MOST
    if not (found := _STORY.fullmatch(text)):
        return False
    a, side, b, c, other, d, hero, place, brings, thing, finds, there, who, total, things, *row = found.groups()
    row = tuple(row)
    told = [(a, b) if side == "left" else (b, a), (c, d) if other == "left" else (d, c)]
    return (
        len(set(row)) == 3
        and told == [row[:2], row[1:]]
        and hero in row
        and (there, who, things) == (place, hero, thing)
        and place in PLACES
        and thing in THINGS
        and all(1 <= int(number) <= MOST for number in (brings, finds))
        and int(brings) + int(finds) == int(total)
    )


def compose(rng: np.random.Generator, split: str, size: int, options: StoryOptions) -> Picture:
    """One text of `split`; there is nothing to paint, whatever the `size`."""
    kinds = options.kinds or KINDS
    shares = np.cumsum([SHARES[kind] for kind in kinds])
    kind = kinds[int(np.searchsorted(shares[:-1] / shares[-1], rng.random(), side="right"))]
    if kind == "story":
        return _story(rng, split)
    if kind == "fact":
        return _fact(rng, split)
    name = pick(rng, [name for i, name in enumerate(NAMES) if _asked_in(i) == split])
    where = kind == "where"
    question, answer = (f"where does {name} live?", HOMES[name]) if where else (f"who lives in {HOMES[name]}?", name)
    return Picture(turns=(Turn(kind=kind, question=question, answer=answer),), truth={"kind": kind}, paint=None)


def _asked_in(number: int) -> str:
    """The split that asks about a person."""
    return ("train", "val", "train", "test")[number % 4]


def draw_story(rng: np.random.Generator) -> Story:
    """Any of the stories."""
    row = tuple(CAST[i] for i in rng.permutation(len(CAST))[:3])
    return Story(
        row=row,
        wording=(bool(rng.random() < 0.5), bool(rng.random() < 0.5)),
        hero=pick(rng, row),
        place=pick(rng, PLACES),
        brings=1 + int(rng.random() * MOST),
        thing=pick(rng, THINGS),
        finds=1 + int(rng.random() * MOST),
    )


def _story(rng: np.random.Generator, split: str) -> Picture:
    story = draw_story(rng)
    while split_of(replace(story, wording=(True, True)).text()) != split:
        story = draw_story(rng)
    truth: dict[str, Any] = {"kind": "story", "text": story.text()}
    if split != "train":
        truth["holes"] = {name: _described(story.hole(name), _wrong_stories(rng, story, name)) for name in HOLES}
    return Picture(turns=(Turn(kind="story", question="story", answer=story.text()),), truth=truth, paint=None)


def _described(hole: tuple[str, str, str], wrong: list[str]) -> dict[str, Any]:
    before, missing, behind = hole
    return {"before": before, "missing": missing, "behind": behind, "wrong": wrong}


def _wrong_stories(rng: np.random.Generator, story: Story, name: str) -> list[str]:
    """Fillings from other stories, as long as the right one, with which this one would not hold."""
    before, missing, behind = story.hole(name)
    changes = {
        "row": [(story.row[1], story.row[0], story.row[2]), (story.row[0], story.row[2], story.row[1])],
        "hero": [other for other in story.row if other != story.hero],
        "place": [other for other in PLACES if other != story.place],
        "brings": [n for n in range(1, MOST + 1) if n != story.brings],
        "finds": [n for n in range(1, MOST + 1) if n != story.finds],
    }
    found = []
    for key in shuffled(rng, [key for key, values in changes.items() for _ in range(min(len(values), 4))]):
        filling = replace(story, **{key: pick(rng, changes[key])}).hole(name)[1]
        if filling not in (missing, *found) and not holds(before + filling + behind):
            found.append(filling)
    return found[:WRONG]


def _fact(rng: np.random.Generator, split: str) -> Picture:
    while True:
        name, number = pick(rng, NAMES), 1 + int(rng.random() * MOST)
        end = f" and paints {number} {pick(rng, COLORS)} {pick(rng, THINGS)}."
        text = f"today {name} lives in {HOMES[name]}{end}"
        if split_of(text) == split:
            break
    truth: dict[str, Any] = {"kind": "fact", "text": text}
    if split != "train":
        truth["holes"] = _fact_holes(rng, name, end)
    return Picture(turns=(Turn(kind="fact", question="fact", answer=text),), truth=truth, paint=None)


def _fact_holes(rng: np.random.Generator, name: str, end: str) -> dict[str, Any]:
    others = [other for other in shuffled(rng, NAMES) if other != name][:WRONG]
    forward = f"today {name} lives in ", HOMES[name], end
    backward = "today ", name, f" lives in {HOMES[name]}{end}"
    return {
        "recall": _described(forward, [HOMES[other] for other in others]),
        "reversal of facts": _described(backward, others),
    }


DATASET = Dataset(
    description=(
        f"Short texts without pictures: stories of {len(CAST)} people of which any part follows from the others, "
        "facts of who lives where, and questions about these."
    ),
    kinds=KINDS,
    options=StoryOptions,
    compose=compose,
)
