"""A set of texts as a finite automaton over their UTF-8 bytes: from choices, or from a regular expression.

An expression is read by Python's own parser and means the texts that `re.fullmatch` finds. It becomes an automaton over
characters (Thompson, 1968, and the subset construction), characters that no part of the expression tells apart counted
as one, and each character is then spelled in bytes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as code  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import numpy as np

LARGEST = 20_000  # states
LAST = 0x10FFFF
PLANES = ((0, 0xD7FF), (0xE000, LAST))  # what UTF-8 can spell
LENGTHS = (0x7F, 0x7FF, 0xFFFF, LAST)  # the last character of one byte, of two, ...
Range = tuple[int, int]


@dataclass(frozen=True)
class Language:
    """The texts that lead from state 0 to an accepting state, byte by byte; `Q` itself is the dead state."""

    table: np.ndarray  # [Q, 256] int64: the next state, Q where no text goes on
    accepts: np.ndarray  # [Q] bool

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, text: str) -> bool:
        state = 0
        for byte in text.encode():
            state = int(self.table[state, byte])
            if state == len(self):
                return False
        return bool(self.accepts[state])


def choices(texts: Iterable[str]) -> Language:
    """Just these texts. Raises ValueError where there are none."""
    texts = list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"choices={texts!r} must be a list of texts, at least one.")
    rows: list[dict[int, int]] = [{}]
    accepting = set()
    for text in texts:
        state = 0
        for byte in text.encode():
            following = rows[state].setdefault(byte, len(rows))
            if following == len(rows):
                rows.append({})
            state = following
        accepting.add(state)
    return _language(rows, accepting)


def regex(pattern: str) -> Language:
    """The texts that a regular expression matches from end to end.

    Raises:
        ValueError: it is none, has too many states, or uses look-around, back-references, word boundaries, or
            possessive or atomic groups.
    """
    try:
        parsed = parser.parse(pattern)
    except re.error as error:
        raise ValueError(f"constraint={pattern!r:.200} is not a regular expression: {error}.") from None
    machine = _Machine(pattern)
    final = machine.sequence(parsed, parsed.state.flags, 0)
    return machine.language(final)


class _Machine:
    """A nondeterministic automaton over sets of characters, as it is built."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.free: list[list[tuple[int, str]]] = [[]]  # of each state, where it goes without a character, and when
        self.moves: list[list[tuple[tuple[Range, ...], int]]] = [[]]

    def new(self) -> int:
        if len(self.free) > 4 * LARGEST:
            raise self.refuse(f"has more than {LARGEST:,} states; say shorter repeats")
        self.free.append([])
        self.moves.append([])
        return len(self.free) - 1

    def refuse(self, why: str) -> ValueError:
        return ValueError(f"constraint={self.pattern!r:.200} {why}.")

    def sequence(self, parts: Any, flags: int, at: int) -> int:
        for kind, value in parts:
            at = self.part(kind, value, flags, at)
        return at

    def part(self, kind: Any, value: Any, flags: int, at: int) -> int:
        """Adds one part of the expression behind the state `at`; returns the state behind it."""
        if kind in (code.LITERAL, code.NOT_LITERAL, code.ANY, code.IN):
            end = self.new()
            self.moves[at].append((self.characters(kind, value, flags), end))
            return end
        if kind is code.SUBPATTERN:
            _, added, removed, parts = value
            flags = flags & ~parser.TYPE_FLAGS if added & parser.TYPE_FLAGS else flags
            return self.sequence(parts, (flags | added) & ~removed, at)
        if kind is code.BRANCH:
            ends = [self.sequence(parts, flags, self.follow(at)) for parts in value[1]]
            return self.join(ends)
        if kind in (code.MAX_REPEAT, code.MIN_REPEAT):
            least, most, parts = value
            return self.repeat(least, most, parts, flags, at)
        if kind is code.AT and not flags & re.MULTILINE:
            when = {code.AT_BEGINNING: "begin", code.AT_BEGINNING_STRING: "begin"}
            when |= {code.AT_END: "end", code.AT_END_STRING: "end"}
            if value in when:
                return self.follow(at, when[value])
        raise self.refuse(
            f"uses {str(kind).lower()}, which no finite automaton follows here; look-around, back-references, word "
            "boundaries, possessive repeats and atomic groups are not for constraints"
        )

    def repeat(self, least: int, most: Any, parts: Any, flags: int, at: int) -> int:
        for _ in range(least):
            at = self.sequence(parts, flags, at)
        if most is code.MAXREPEAT:
            start = self.follow(at)
            self.free[self.sequence(parts, flags, start)].append((start, ""))
            return self.follow(start)
        ends = [at]
        for _ in range(most - least):
            ends.append(self.sequence(parts, flags, ends[-1]))
        return self.join(ends)

    def follow(self, at: int, when: str = "") -> int:
        self.free[at].append((self.new(), when))
        return len(self.free) - 1

    def join(self, ends: Sequence[int]) -> int:
        joined = self.new()
        for end in ends:
            self.free[end].append((joined, ""))
        return joined

    def characters(self, kind: Any, value: Any, flags: int) -> tuple[Range, ...]:
        if kind is code.LITERAL and not flags & re.IGNORECASE:
            return ((value, value),)
        return _characters(repr((kind, value)), flags, lambda: self.found(kind, value, flags))

    def found(self, kind: Any, value: Any, flags: int) -> tuple[Range, ...]:
        """The characters that one part matches, by asking Python itself."""
        state = parser.State()
        state.flags = flags
        one = parser.SubPattern(state, [(kind, value)])
        search = compiler.compile(parser.SubPattern(state, [(code.MAX_REPEAT, (1, code.MAXREPEAT, one))]), flags)
        return tuple(
            (first + m.start(), first + m.end() - 1) for first, text in _everything() for m in search.finditer(text)
        )

    def language(self, final: int) -> Language:
        """The deterministic automaton over bytes."""
        sets = list({ranges: None for moves in self.moves for ranges, _ in moves})
        atoms, ranges_of = _atoms(sets)
        moves = [[(atoms[ranges], end) for ranges, end in moves] for moves in self.moves]
        start = self.closure({0}, ("", "begin"))
        number, order, follow = {start: 0}, [start], []
        for states in order:
            reached: dict[int, set[int]] = {}
            for state in states:
                for own, end in moves[state]:
                    for atom in own:
                        reached.setdefault(atom, set()).add(end)
            row = {}
            for atom, ends in reached.items():
                closed = self.closure(ends, ("",))
                row[atom] = number.setdefault(closed, len(order))
                if row[atom] == len(order):
                    order.append(closed)
            if len(order) > LARGEST:
                raise self.refuse(f"has more than {LARGEST:,} states; say shorter repeats")
            follow.append(row)
        ending = [self.closure(set(s), ("", "end", *(["begin"] if not at else []))) for at, s in enumerate(order)]
        rows: list[dict[int, int]] = [{} for _ in order]
        spelled: dict[Any, int] = {}
        for at, row in enumerate(follow):
            targets = sorted((low, high, after) for atom, after in row.items() for low, high in ranges_of[atom])
            _spell(rows, at, targets, spelled, self.refuse)
        return _language(rows, {at for at, states in enumerate(ending) if final in states})

    def closure(self, states: set[int], allowed: tuple[str, ...]) -> frozenset[int]:
        """What is reached without a character."""
        reached, todo = set(states), list(states)
        while todo:
            for after, when in self.free[todo.pop()]:
                if when in allowed and after not in reached:
                    reached.add(after)
                    todo.append(after)
        return frozenset(reached)


_found: dict[tuple[str, int], tuple[Range, ...]] = {}


def _characters(key: str, flags: int, find: Callable[[], tuple[Range, ...]]) -> tuple[Range, ...]:
    if len(_found) > 4096:
        _found.clear()
    if (key, flags) not in _found:
        _found[key, flags] = find()
    return _found[key, flags]


@lru_cache(maxsize=1)
def _everything() -> tuple[tuple[int, str], ...]:
    return tuple((first, "".join(map(chr, range(first, last + 1)))) for first, last in PLANES)


def _atoms(sets: list[tuple[Range, ...]]) -> tuple[dict[tuple[Range, ...], list[int]], list[list[Range]]]:
    """Characters that are in the same of the sets, as one: the atoms of each set, and the ranges of each atom."""
    edges = sorted({0, LAST + 1, *(edge for ranges in sets for low, high in ranges for edge in (low, high + 1))})
    place = {edge: at for at, edge in enumerate(edges)}
    inside = np.zeros((len(edges), len(sets)), dtype=bool)
    for at, ranges in enumerate(sets):
        for low, high in ranges:
            inside[place[low] : place[high + 1], at] = True
    number: dict[bytes, int] = {}
    ranges_of: list[list[Range]] = []
    members: dict[tuple[Range, ...], list[int]] = {ranges: [] for ranges in sets}
    for at, (low, after) in enumerate(itertools.pairwise(edges)):
        atom = number.setdefault(inside[at].tobytes(), len(number))
        if atom == len(ranges_of):
            ranges_of.append([])
            for which in np.flatnonzero(inside[at]):
                members[sets[which]].append(atom)
        ranges_of[atom].append((low, after - 1))
    return members, ranges_of


def _spell(
    rows: list[dict[int, int]],
    at: int,
    targets: list[tuple[int, int, int]],
    spelled: dict[Any, int],
    refuse: Callable[[str], ValueError],
) -> None:
    """Adds to state `at` the bytes of characters: `targets` are (first, last, state behind), none overlapping."""
    for length, last in enumerate(LENGTHS, 1):
        first = 0 if length == 1 else LENGTHS[length - 2] + 1
        for low, high in ((first, last),) if length != 3 else ((first, 0xD7FF), (0xE000, last)):
            own = [(max(low, a), min(high, b), to) for a, b, to in targets if a <= high and b >= low]
            _spell_rest(rows, at, [(_bytes(a, length), _bytes(b, length), to) for a, b, to in own], spelled)
    if len(rows) > LARGEST:
        raise refuse(f"has more than {LARGEST:,} states; say shorter repeats, or [ -~] in place of . and (?a) for \\w")


def _bytes(character: int, length: int) -> tuple[int, ...]:
    if length == 1:
        return (character,)
    lead = (0xC0, 0xE0, 0xF0)[length - 2]
    rest = [0x80 | character >> 6 * at & 0x3F for at in range(length - 1)]
    return (lead | character >> 6 * (length - 1), *reversed(rest))


def _spell_rest(
    rows: list[dict[int, int]], at: int, ranges: list[tuple[tuple[int, ...], tuple[int, ...], int]], spelled: dict
) -> None:
    """Adds ranges of byte strings of one length; what has the same continuation is one state."""
    following: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], int]]] = {}
    for low, high, to in ranges:
        for byte in range(low[0], high[0] + 1):
            if len(low) == 1:
                rows[at][byte] = to
                continue
            start = low[1:] if byte == low[0] else (0x80,) * (len(low) - 1)
            end = high[1:] if byte == high[0] else (0xBF,) * (len(low) - 1)
            following.setdefault(byte, []).append((start, end, to))
    for byte, own in following.items():
        key = tuple(own)
        if key not in spelled:
            spelled[key] = len(rows)
            rows.append({})
            _spell_rest(rows, spelled[key], own, spelled)
        rows[at][byte] = spelled[key]


def _language(rows: list[dict[int, int]], accepting: set[int]) -> Language:
    """The automaton of the transitions `rows`, each from byte to state, without what leads nowhere."""
    before: list[set[int]] = [set() for _ in rows]
    for state, row in enumerate(rows):
        for after in row.values():
            before[after].add(state)
    alive, todo = set(accepting), list(accepting)
    while todo:
        for state in before[todo.pop()] - alive:
            alive.add(state)
            todo.append(state)
    kept = [0, *sorted(alive - {0})]
    place = {state: at for at, state in enumerate(kept)}
    table = np.full((len(kept), 256), len(kept), dtype=np.int64)
    for state in kept:
        row = {byte: place[after] for byte, after in rows[state].items() if after in alive}
        if row:
            table[place[state], list(row)] = list(row.values())
    return Language(table, np.array([state in accepting for state in kept]))
