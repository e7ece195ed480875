"""A language as an automaton over the tokens of a vocabulary: which token leads from which state to which.

Tokens that lead everywhere to the same states are one class, so that what is computed a step grows with classes and
with edges (pairs of states that some token joins), not with states times vocabulary.

A text ends at its end token, which leads from an accepting state to the last state, END; behind it only end and fill
tokens stand. Shapes: S states (index S is the dead one), C classes (class 0 is the tokens that lead nowhere), V tokens,
P pairs of a state and a class, E edges.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmllm.samplers.language import Language

LARGEST = 64_000_000  # states times classes: 256 MB
AT_ONCE = 4_000_000  # pairs of a state and a token that are followed together


@dataclass(frozen=True, kw_only=True)
class TokenAutomaton:
    """State 0 is the start, S - 1 is END."""

    table: Tensor  # [S + 1, C] int32: the next state
    classes: Tensor  # [V] int64: the class of each token
    accepts: Tensor  # [S] bool: the text may end here, END included
    pair_class: Tensor  # [P] int64
    pair_edge: Tensor  # [P] int64
    source: Tensor  # [E] int64
    target: Tensor  # [E] int64
    live: Tensor  # [T] int64: the tokens that lead somewhere
    report: dict[str, Any]  # states, classes, edges, pairs, megabytes, seconds
    _reach: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(
        texts: Language,
        within: Sequence[bytes | None],
        first: Sequence[bytes | None],
        ends: Sequence[int],
        fill: Sequence[int] = (),
        vocab_size: int | None = None,
    ) -> TokenAutomaton:
        """The tokens that spell the texts.

        Args:
            within: what each token adds to a text, None for those that are no text; `first`: at its beginning.
            ends: tokens of which one ends a text; none, and a text ends with the canvas.
            fill: further tokens that may stand behind the end.
            vocab_size: rows of the model's vocabulary, where they are not those of the tokenizer.

        Raises:
            ValueError: the tokens can spell none of the texts, or the automaton is too large.
        """
        began, size = time.perf_counter(), vocab_size or len(within)
        spelled, words = _words(texts, within[:size], first[:size], {*ends, *fill})
        start, end = len(texts), len(texts) + 1  # the start knows that no token has come yet
        found = _follow(texts, words)  # [:, 3]: word, state, next state
        accepting = [*np.flatnonzero(texts.accepts).tolist(), *([start] if texts.accepts[0] else [])]
        special = []
        for token in dict.fromkeys((*ends, *fill)):
            if not 0 <= token < size:
                continue
            spelled.setdefault(("special", token in ends), (len(spelled), []))[1].append(token)
            word = spelled["special", token in ends][0]
            special += [(word, end, end), *((word, state, end) for state in accepting if token in ends)]
        found = np.concatenate([found, np.unique(np.array(special, dtype=np.int64).reshape(-1, 3), axis=0)])
        accepts = np.zeros(len(texts) + 2, dtype=bool)
        accepts[[*accepting, end]] = True
        found, kept = _trimmed(found, accepts, start, end)
        tokens = [ids for _, ids in sorted(spelled.values())]
        return _assembled(found, accepts[kept], tokens, size, began)

    def __len__(self) -> int:
        return len(self.accepts)

    @property
    def end(self) -> int:
        return len(self) - 1

    def reach(self, count: int) -> Tensor:
        """From which states [S] bool a text can be completed in exactly `count` tokens, end and fill included."""
        if not self._reach:
            self._reach.append(self.accepts)
        while len(self._reach) <= count:
            after = self._reach[-1][self.target].to(torch.int32)
            ahead = torch.zeros(len(self), dtype=torch.int32, device=after.device).scatter_add_(0, self.source, after)
            self._reach.append(ahead > 0)
        return self._reach[count]

    def least(self, limit: int) -> int | None:
        """The fewest tokens of a text, or None where it has more than `limit`."""
        return next((count for count in range(limit + 1) if bool(self.reach(count)[0])), None)

    def to(self, device: torch.device) -> TokenAutomaton:
        if device == self.table.device:
            return self
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved, _reach=[])


Spelled = dict[Any, tuple[int, list[int]]]


def _words(
    texts: Language, within: Sequence[bytes | None], first: Sequence[bytes | None], apart: set[int]
) -> tuple[Spelled, list[tuple[bytes, bytes]]]:
    """Tokens whose bytes the language cannot tell apart, as one word: its number and tokens; and words in kinds of
    bytes, elsewhere and at the beginning."""
    kinds = np.unique(texts.table, axis=1, return_inverse=True)[1].reshape(-1)
    one = bytes(np.unique(kinds, return_index=True)[1].tolist())  # a byte of each kind
    table = bytes(one[kind] for kind in kinds)
    spelled: Spelled = {}
    for token, (inside, opening) in enumerate(zip(within, first, strict=True)):
        if inside is not None and opening is not None and token not in apart:
            word = inside.translate(table), opening.translate(table)
            spelled.setdefault(word, (len(spelled), []))[1].append(token)
    return spelled, list(spelled)


def _follow(texts: Language, words: list[tuple[bytes, bytes]]) -> np.ndarray:
    """Where each word leads from each state, [n, 3] int64: word, state, next state; the start is state Q."""
    count = len(texts)
    table = np.concatenate([texts.table, np.full((1, 256), count)])
    found = [_walk(table, _tree([word[1] for word in words]), np.zeros(1, dtype=np.int64))]
    found[0][:, 1] = count
    tree, at_once = _tree([word[0] for word in words]), max(1, AT_ONCE // max(1, len(words)))
    for low in range(0, count, at_once):
        found.append(_walk(table, tree, np.arange(low, min(count, low + at_once))))
    return np.concatenate(found)


class _Level(NamedTuple):
    """The beginnings of one length that words have, in order: each is followed by a run of longer ones."""

    byte: np.ndarray  # [n] the last one
    words: np.ndarray  # [w] the words that are no longer than this
    ends: np.ndarray  # [n + 1] which of them are which beginning
    longer: np.ndarray  # [n + 1] which of the next level's come from which


def _tree(words: list[bytes]) -> list[_Level]:
    order = sorted(range(len(words)), key=words.__getitem__)
    lengths = np.array([len(words[at]) for at in order], dtype=np.int64)
    width, number = int(lengths.max(initial=0)), np.array(order, dtype=np.int64)
    flat = b"".join(words[at].ljust(width, b"\0") for at in order)
    letters = np.frombuffer(flat, dtype=np.uint8).reshape(len(words), width)
    same = np.ones(max(len(words) - 1, 0), dtype=bool)  # as the word before, so far
    levels, beginning, count = [], np.zeros(len(words), dtype=np.int64), 1
    byte = np.zeros(count, dtype=np.uint8)
    for length in range(width + 1):
        done, on = lengths == length, lengths > length
        ends = np.searchsorted(beginning[done], np.arange(count + 1))
        if length == width:
            levels.append(_Level(byte, number[done], ends, np.zeros(count + 1, dtype=np.int64)))
            break
        same &= (letters[1:, length] == letters[:-1, length]) & on[1:] & on[:-1]
        new = on & np.append(True, ~same)[: len(words)]
        levels.append(_Level(byte, number[done], ends, np.searchsorted(beginning[new], np.arange(count + 1))))
        byte, count, beginning = letters[new, length], int(new.sum()), np.cumsum(new) - 1
    return levels


def _walk(table: np.ndarray, tree: list[_Level], states: np.ndarray) -> np.ndarray:
    """Where each word leads from `states`, [n, 3]; beginnings that lead nowhere are not followed."""
    at, began, done = np.zeros(len(states), dtype=np.int64), states, []
    state = states
    for level, after in zip(tree, [*tree[1:], None], strict=True):
        which, own = _runs(level.ends, at)
        done.append(np.stack([level.words[which], began[own], state[own]], axis=1))
        if after is None:
            break
        at, own = _runs(level.longer, at)
        state = table[state[own], after.byte[at]]
        alive = state != len(table) - 1
        at, began, state = at[alive], began[own][alive], state[alive]
    return np.concatenate(done)


def _runs(cuts: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The members of some runs, of which run i is cuts[i] .. cuts[i + 1] - 1; and whose each is."""
    sizes = cuts[which + 1] - cuts[which]
    own = np.repeat(np.arange(len(which)), sizes)
    return np.arange(len(own)) - np.repeat(np.cumsum(sizes) - sizes - cuts[which], sizes), own


def _trimmed(found: np.ndarray, accepts: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Only states between the start and an accepting one, renumbered: the start 0, END last; and which they were."""
    count = len(accepts)
    edges = np.unique(found[:, 1] * count + found[:, 2])
    source, target = edges // count, edges % count

    def spread(seen: np.ndarray, come_from: np.ndarray, go_to: np.ndarray) -> np.ndarray:
        while True:
            more = seen.copy()
            more[go_to[seen[come_from]]] = True
            if (more == seen).all():
                return seen
            seen = more

    alive = spread(accepts.copy(), target, source)
    if not alive[start]:
        raise ValueError(
            "constraint: no text that matches can be spelled with this model's tokens (special tokens are never part "
            "of one)."
        )
    alive &= spread(np.arange(count) == start, source, target)
    others = np.flatnonzero(alive)
    kept = np.array([start, *others[(others != start) & (others != end)], end])
    place = np.full(count, -1)
    place[kept] = np.arange(len(kept))
    alive[end] = True
    found = found[alive[found[:, 1]] & alive[found[:, 2]]]
    return np.stack([found[:, 0], place[found[:, 1]], place[found[:, 2]]], axis=1), kept


def _assembled(
    found: np.ndarray, accepts: np.ndarray, tokens: list[list[int]], size: int, began: float
) -> TokenAutomaton:
    """Words that lead everywhere to the same states become one class."""
    states, number = len(accepts), {b"": 0}
    found = found[np.lexsort((found[:, 1], found[:, 0]))]
    cuts = np.searchsorted(found[:, 0], np.arange(len(tokens) + 1))
    moves = np.ascontiguousarray(found[:, 1:].astype(np.int32))
    kinds = [number.setdefault(moves[a:b].tobytes(), len(number)) for a, b in itertools.pairwise(cuts)]
    if (states + 1) * len(number) > LARGEST:
        raise ValueError(
            f"constraint: {states:,} states by {len(number):,} classes of tokens is too large; say shorter repeats, or "
            "fewer and shorter choices."
        )
    classes, table = np.zeros(size, dtype=np.int64), np.full((states + 1, len(number)), states, dtype=np.int32)
    for kind, ids in zip(kinds, tokens, strict=True):
        classes[ids] = kind
    column = np.array(kinds, dtype=np.int64)[found[:, 0]]
    table[found[:, 1], column] = found[:, 2]
    source, pair_class = np.nonzero(table[:states] != states)
    edges, pair_edge = np.unique(source * states + table[source, pair_class], return_inverse=True)
    arrays = {
        "table": table,
        "classes": classes,
        "accepts": accepts,
        "pair_class": pair_class,
        "pair_edge": pair_edge.reshape(-1),
        "source": edges // states,
        "target": edges % states,
        "live": np.flatnonzero(classes),
    }
    report = {
        "states": states,
        "classes": len(number),
        "edges": len(edges),
        "pairs": len(pair_class),
        "megabytes": round(sum(a.nbytes for a in arrays.values()) / 1e6, 1),
        "seconds": round(time.perf_counter() - began, 3),
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(a) for name, a in arrays.items()}
    return TokenAutomaton(**tensors, report=report)
