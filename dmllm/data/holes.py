"""Texts with holes, as tokens: [MASK] is one missing token, [MASK:4] are four, [MASK:1..3] one to three, and [MASK:*]
any number, for models that insert tokens.

What stands around a hole is tokenized by itself, so that no token reaches across a border, and is checked to read back
as it was written, character by character. A space before a hole goes to the hole's first token where the vocabulary has
words with their space: "A [MASK]" asks for " cat", not for "cat" behind a lone space, which models hardly ever see. The
space is fixed all the same: only such tokens can stand there.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmllm.data.answers import around, padded_length
from dmllm.data.tokens import ANY, SPACE, WORD

HOLE = re.compile(r"\[MASK(?:([^\w\s\]])([^\]]*))?\]")
ANCHORS = ("a", "1", ".", "\n")  # what may stand before a piece when it is asked which tokens are its own


class Hole(NamedTuple):
    """How many tokens are missing; whether the first brings the space before it; whether there may be any number."""

    least: int
    most: int
    spaced: bool = False
    grows: bool = False


class Laid(NamedTuple):
    """A text whose holes have lengths."""

    ids: list[int]  # mask tokens in the holes
    kinds: list[int]  # what may stand at each place: ANY, WORD or SPACE
    columns: list[int]  # the same number for the same token, whatever the lengths
    cuts: list[int]  # where parts[0], a hole, parts[1], ... the last part end


@dataclass(frozen=True)
class Gapped:
    """A text with holes: parts[0], a hole, parts[1], a hole, ..., the last part; then an end."""

    texts: list[str]  # what is fixed, as written
    parts: list[list[int]]
    holes: list[Hole]
    before: list[int]  # what the chat template writes first
    end: list[int]
    size: int  # tokens to which end tokens fill it up; 0 for not at all
    mask: int
    eos: int

    @property
    def choices(self) -> int:
        """How many choices of lengths there are."""
        return math.prod(hole.most - hole.least + 1 for hole in self.holes)

    def lengths(self) -> list[tuple[int, ...]]:
        """Every choice of lengths for the holes, the shortest first."""
        return list(itertools.product(*(range(hole.least, hole.most + 1) for hole in self.holes)))

    def lay(self, lengths: Sequence[int]) -> Laid:
        """The text with holes of these lengths."""
        laid, column = Laid([], [], [], []), 0

        def put(ids: list[int], kinds: list[int], room: int) -> None:
            nonlocal column
            laid.ids.extend(ids)
            laid.kinds.extend(kinds)
            laid.columns.extend(range(column, column + len(ids)))
            column += room

        for number, part in enumerate(self.parts):
            if number:
                hole, length = self.holes[number - 1], lengths[number - 1]
                first = ANY if not hole.spaced else WORD if length == 1 else SPACE
                put([self.mask] * length, [first] + [ANY] * (length - 1), hole.most)
                laid.cuts.append(len(laid.ids))
            own = part if number else self.before + part
            put(own, [ANY] * len(own), len(own))
            laid.cuts.append(len(laid.ids))
        end = self.end + [self.eos] * (self.size - len(self.end) - len(laid.ids))
        put(end, [ANY] * len(end), len(end))
        return laid

    def read(self, laid: Laid, ids: list[int], decode: Any) -> tuple[str, list[str], list[list[int]]]:
        """The whole text, what stands in the holes, and the tokens of these, of a filled text's `ids`."""
        starts = [len(self.before), *laid.cuts[:-1]]
        known = [decode(ids[:cut]) for cut in (starts[0], *laid.cuts)]
        said = [later[len(earlier) :] for earlier, later in itertools.pairwise(known)][1::2]
        filled = [text[1:] if hole.spaced else text for text, hole in zip(said, self.holes, strict=True)]
        text = "".join(itertools.chain(*zip(self.texts, filled, strict=False))) + self.texts[-1]
        return text, filled, [ids[begin:end] for begin, end in zip(starts[1::2], laid.cuts[1::2], strict=True)]


def parse(text: str) -> tuple[list[str], list[Hole]]:
    """What is fixed, and the holes between; one of any number of tokens begins with none.

    Raises:
        ValueError: a hole of no length, or no hole at all.
    """
    texts, holes, at = [], [], 0
    for found in HOLE.finditer(text):
        texts.append(text[at : found.start()])
        at = found.end()
        if (found[1], found[2]) == (":", "*"):
            holes.append(Hole(0, 0, grows=True))
            continue
        size = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", found[2]) if found[1] == ":" else None
        least, most = (1, 1) if found[1] is None else (0, 0)
        if size:
            least, most = int(size[1]), int(size[2] or size[1])
        if not 1 <= least <= most:
            raise ValueError(f"{found[0]} is no hole: say [MASK] for one token, [MASK:4] for four, [MASK:1..3].")
        holes.append(Hole(least, most))
    if not holes:
        raise ValueError(f"There is no hole in {text!r:.80}: say [MASK] for a missing token, [MASK:4], or [MASK:1..3].")
    return [*texts, text[at:]], holes


def gapped(processor: Any, text: str, messages: Sequence[Any] | None) -> Gapped:
    """A text with holes as the answer to `messages`, or by itself.

    Raises:
        ValueError: a hole is not understood, or what is fixed cannot be spelled by the tokenizer.
    """
    texts, holes = parse(text)
    before, after = ("", "") if messages is None else around(processor, messages)
    processor.tokens.images_in([{"role": "assistant", "content": [{"type": "text", "text": fixed} for fixed in texts]}])
    written = list(texts)
    for number, hole in enumerate(holes):
        fixed = written[number]
        if fixed.endswith(" ") and (number or fixed != " ") and processor.tokens.has_words:
            written[number], holes[number] = fixed[:-1], hole._replace(spaced=True)
    head = _ids(processor, before)
    parts = [_spelled(processor, written[0], head, before)]
    parts += [_spelled(processor, piece, _ids(processor, ANCHORS[0]), None) for piece in written[1:]]
    end = _ids(processor, after)
    longest = sum(map(len, parts)) + sum(hole.most for hole in holes) + len(head) + len(end)
    size = 0 if messages is None else padded_length(processor, longest)
    return Gapped(texts, parts, holes, head, end, size, processor.special.mask, processor.special.eos)


def _ids(processor: Any, text: str) -> list[int]:
    return processor.tokens.encode(text)[0].tolist() if text else []


def _spelled(processor: Any, piece: str, ahead: list[int], before: str | None) -> list[int]:
    """The tokens of a piece behind the tokens `ahead`: those of the text `before`, or of anything if that is None."""
    if not piece:
        return []
    ways = [_ids(processor, piece)]
    for anchor in ANCHORS if before is None else [before]:
        own, both = _ids(processor, anchor), _ids(processor, anchor + piece)
        ways += [both[len(own) :]] if both[: len(own)] == own else []
    start = processor.decode(ahead)
    for ids in ways if before is None else ways[::-1]:
        if processor.decode(ahead + ids) == start + piece:
            return ids
    read = processor.decode(ahead + ways[0])
    raise ValueError(
        f"The tokenizer does not give {piece!r:.60} back as it is written (behind {start!r} as {read!r:.60}), "
        "so it cannot stand fixed beside a hole; write it without what is changed."
    )
