"""The nouns of the built-in data sets, and the few draws from which every picture is made.

A picture is planned first (questions, answers, exact truth) and painted only when its pixels are wanted, so that text
statistics cost no rendering. All randomness of one picture comes from one numpy Generator keyed by the data set, the
split, the seed and the picture's index: neither the number of workers nor the order of the work can change a byte.

Splits are disjoint by construction: what a picture shows decides where it belongs (`split_of`).
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

SPLITS = ("train", "val", "test")
# Draws that look for something new to ask, and as many again that are content with new words.
ATTEMPTS = 8

# Wordings that several kinds of pictures share.
COUNT = ("how many {} are there?", "how many {} are in the picture?", "how many {} do you see?", "count the {}.")
EXIST = ("is there {}?", "do you see {}?", "does the picture show {}?", "is there {} in the picture?")
RELATION = ("is {} {} {}?", "is {} placed {} {}?", "would you say that {} is {} {}?")
NEIGHBOR = (
    "which {} is directly {} the {}?",
    "what {} comes directly {} the {}?",
    "which {} do you see directly {} the {}?",
)


class Asked(NamedTuple):
    """A question, its answer, and the words that say what is asked however it is phrased."""

    question: str
    answer: str
    about: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One question about a picture, answerable without the picture's other questions."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """What is asked, what is true, and `paint() -> uint8 [size, size, 3]`, to be called at most once; None for a text
    that has no picture."""

    turns: tuple[Turn, ...]
    truth: dict[str, Any]
    paint: Callable[[], np.ndarray] | None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One built-in data set: what it is, the kinds of its questions, its options and how a picture is composed."""

    description: str
    kinds: tuple[str, ...]
    # A frozen dataclass that holds every option and its default.
    options: type
    # compose(rng, split, size, options) -> Picture
    compose: Callable[[np.random.Generator, str, int, Any], Picture]


def keyed_generator(name: str, split: str, seed: int, index: int) -> np.random.Generator:
    """The generator of picture `index`, the same on every machine and in every worker."""
    return np.random.default_rng([zlib.crc32(f"{name}/{split}".encode()), seed, index])


def split_of(canonical: str) -> str:
    """The split that a picture's canonical description belongs to: 10 % val, 10 % test, the rest train."""
    bucket = int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big") % 10
    return {0: "val", 1: "test"}.get(bucket, "train")


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, uniformly (several times faster than `Generator.choice`)."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """The items in a uniformly random order."""
    return [items[i] for i in rng.permutation(len(items))]


def spread(rng: np.random.Generator, rates: dict[str, float]) -> list[str]:
    """Names in random order, each on average `rates[name]` times, as many in total as the rates add up to.

    Systematic sampling: one random offset, then a name for each whole number that the running sum passes.
    """
    names, level, chosen = shuffled(rng, list(rates)), float(rng.random()), []
    for name in names:
        before, level = int(level + 1e-9), level + rates[name]
        chosen += [name] * (int(level + 1e-9) - before)
    return shuffled(rng, chosen)


def sentence(rng: np.random.Generator, templates: Sequence[str], *words: str) -> str:
    """One of the paraphrases with the words filled in; as people write, three in ten begin with a capital letter and
    one in ten ends without its mark."""
    text = pick(rng, templates).format(*words)
    text = text[0].upper() + text[1:] if rng.random() < 0.3 else text
    return text[:-1] if rng.random() < 0.1 else text


def phrased(rng: np.random.Generator, templates: Sequence[str], *words: str, answer: str) -> Asked:
    """The question that `sentence` makes of the paraphrases and the words, with its answer."""
    return Asked(sentence(rng, templates, *words), answer, words)


def collect(
    rng: np.random.Generator, shown: T, forms: Iterable[tuple[str, Callable[[np.random.Generator, T], Asked | None]]]
) -> list[Turn]:
    """A turn for each (kind, form) that can be asked of what is shown, no two alike.

    The same is asked again only in other words, and only where nothing new was found.
    """
    turns: dict[str, Turn] = {}
    topics: set[tuple[str, ...]] = set()
    for kind, form in forms:
        first: Asked | None = None
        for attempt in range(2 * ATTEMPTS):
            asked = form(rng, shown)
            if asked is None:
                continue
            first = first or asked
            # What is asked instead keeps the first draw's yes or no: there is less to ask with a yes.
            if {first.answer, asked.answer} == {"yes", "no"}:
                continue
            wording, topic = asked.question.lower().rstrip(".?"), (kind, *asked.about)
            if wording not in turns and (topic not in topics or attempt >= ATTEMPTS):
                turns[wording] = Turn(kind=kind, question=asked.question, answer=asked.answer)
                topics.add(topic)
                break
    return list(turns.values())


def noun_phrase(article: str, words: str) -> str:
    """`a` or `an` as the next word demands; other articles stay."""
    return f"{'an' if article == 'a' and words[0] in 'aeiou' else article} {words}"
