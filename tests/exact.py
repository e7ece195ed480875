"""A toy whose every answer is known: a joint distribution over whole texts, kept as a table, and its conditionals.

`Joint` is the data and a model that predicts it exactly: `predict` is what samplers call, `score` what objectives call.
Beside it, tests of what was drawn.

Shapes: X texts of L tokens over V words, B rows. The mask token is no word; it is V unless said.
"""

from __future__ import annotations

import itertools
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

LEAST = -1e30  # of a logit: exp of it is 0, and 0 times it is 0


class Joint:
    """A random joint over `length` tokens of `vocab` words; `sharpness` 0 is uniform."""

    def __init__(
        self,
        vocab: int = 3,
        length: int = 3,
        *,
        seed: int = 0,
        sharpness: float = 1.5,
        mask: int | None = None,
        probs: Tensor | None = None,
    ):
        self.vocab, self.length = vocab, length
        self.mask = vocab if mask is None else mask
        self.texts = torch.tensor(list(itertools.product(range(vocab), repeat=length)))  # [X, L]
        if probs is None:
            scores = torch.randn(len(self.texts), generator=Generator().manual_seed(seed), dtype=torch.float64)
            probs = (sharpness * scores).softmax(0)
        self.probs = probs  # [X] float64

    @property
    def entropy(self) -> float:
        """Of a whole text, in nats."""
        return float(torch.special.entr(self.probs).sum())

    def draw(self, count: int, seed: int = 1) -> Tensor:
        """Texts of the data, [count, L]."""
        draws = Generator().manual_seed(seed)
        return self.texts[torch.multinomial(self.probs, count, replacement=True, generator=draws)]

    def masses(self, ids: Tensor, known: Tensor) -> Tensor:
        """P(token at i is v, and what is `known` [B, L] of `ids` [B, L]), [B, L, V] float64."""
        agrees = ((self.texts == ids[:, None]) | ~known[:, None]).all(-1)  # [B, X]
        return torch.einsum("bx,xlv->blv", self.probs * agrees, F.one_hot(self.texts, self.vocab).double())

    def conditionals(self, ids: Tensor, known: Tensor) -> Tensor:
        """p(token at i is v | what is known), [B, L, V] float64: nan where what is known cannot be."""
        mass = self.masses(ids, known)
        return mass / mass.sum(-1, keepdim=True)

    def restored(self, chance: Tensor, *, leave_one_out: bool = False) -> Tensor:
        """p(token at i is v | what stands everywhere, or everywhere else), [B, L, V] float64.

        Args:
            chance: [B, L, V], how probable what stands in a place is for each word there.
        """
        places = torch.arange(self.length)
        each = chance.double()[:, places, self.texts]  # [B, X, L]
        found = []
        for place in range(self.length):
            others = each[..., places != place].prod(-1) * self.probs  # [B, X]
            mass = others @ F.one_hot(self.texts[:, place], self.vocab).double()
            found.append(mass if leave_one_out else mass * chance[:, place])
        mass = torch.stack(found, 1)
        return mass / mass.sum(-1, keepdim=True)

    def predict(self, canvas: Any, rows: Tensor) -> Tensor:
        """For samplers: logits [B, K, V and the mask] at `rows` [B, K]. It would love to say the mask."""
        mass = self.masses(canvas.ids, canvas.committed)
        mass = F.pad(mass, (0, self.mask + 1 - self.vocab))
        mass[..., self.mask] = 2 * mass.sum(-1)
        return mass.gather(1, rows[..., None].expand(-1, -1, mass.shape[-1])).log()

    def score(
        self, *, input_ids: Tensor, rows: Tensor, visibility: Any = None, positions: Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        """For objectives: `.logits` at `rows` [N] of the stream [B, S], given what each row sees there that is no mask.

        Without `visibility` it sees all of its row. `positions` [B, S] says which token of the text stands where.
        """
        batch, size = input_ids.shape
        positions = torch.arange(size).expand(batch, -1) if positions is None else positions
        shown = input_ids[rows // size] != self.mask  # [N, S]
        if visibility is not None:
            shown &= visibility.dense()[:, 0].flatten(0, 1)[rows]
        known = torch.full((len(rows), self.length), -1)
        ids = torch.where(shown, input_ids[rows // size], -1)
        known = known.scatter_reduce_(1, positions[rows // size], ids, "amax")
        place = positions.flatten()[rows]
        found = self.conditionals(known, known >= 0)[torch.arange(len(rows)), place]
        return SimpleNamespace(logits=F.pad(found.log().clamp(min=LEAST), (0, self.mask + 1 - self.vocab), value=LEAST))

    def counts(self, drawn: Tensor) -> Tensor:
        """How often each text is among `drawn` [B, L], [X] float64; those that cannot be must not be."""
        index = (drawn * self.vocab ** torch.arange(self.length - 1, -1, -1)).sum(1)
        seen = torch.bincount(index, minlength=len(self.texts)).double()
        assert not seen[self.probs == 0].any(), "a text that cannot be was drawn"
        return seen


def quantile(freedom: int) -> float:
    """Chi-square, 99.9 %, by Wilson and Hilferty's approximation."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def chi_square(joint: Joint, drawn: Tensor, probs: Tensor | None = None) -> float:
    """Of the texts `drawn` [B, L] against the joint, or against other `probs` [X] of its texts."""
    probs = joint.probs if probs is None else probs
    seen, expected, possible = joint.counts(drawn), probs * len(drawn), probs > 0
    return float(((seen - expected) ** 2 / expected)[possible].sum())


def assert_drawn_from(joint: Joint, drawn: Tensor, probs: Tensor | None = None) -> None:
    """A chi-square test at 99.9 % of `drawn` [B, L] against the joint, or against other `probs` [X] of its texts."""
    freedom = int(((joint.probs if probs is None else probs) > 0).sum()) - 1
    found = chi_square(joint, drawn, probs)
    assert found < quantile(freedom), f"chi-square {found:.1f} with {freedom} degrees of freedom"


def total_variation(p: Tensor, q: Tensor) -> float:
    """Between two distributions over the same outcomes, [X] each."""
    return float((p - q).abs().sum() / 2)


def generators(*seeds: int) -> list[Generator]:
    """One generator a row."""
    return [Generator().manual_seed(s) for s in seeds]


class Strings:
    """A random distribution over all texts of `shortest` to `longest` words, and what is exact of texts of which tokens
    are masked or gone.

    `with_head` is what samplers call, `score` what objectives call, with one row in front of each text; both say the
    logarithm of how many tokens a gap is expected to miss.
    """

    def __init__(self, vocab: int = 2, longest: int = 3, shortest: int = 1, *, seed: int = 0, sharpness: float = 1.0):
        self.vocab, self.mask = vocab, vocab
        self.texts = [t for n in range(shortest, longest + 1) for t in itertools.product(range(vocab), repeat=n)]
        scores = torch.randn(len(self.texts), generator=Generator().manual_seed(seed), dtype=torch.float64)
        self.probs = (sharpness * scores).softmax(0)
        self._known: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}

    @property
    def entropy(self) -> float:
        """Of a text, in nats."""
        return float(torch.special.entr(self.probs).sum())

    def said(self, state: tuple[int, ...], gone: float) -> tuple[Tensor, Tensor]:
        """p(token v at place i), [M, V], and the expected number of missing tokens in each gap, [M + 1], given a text's
        state of M shown and mask tokens, when tokens are gone with probability `gone`."""
        if state not in self._known:
            self._known[state] = [
                (number, kept)
                for number, text in enumerate(self.texts)
                for kept in itertools.combinations(range(len(text)), len(state))
                if all(seen in (self.mask, text[place]) for seen, place in zip(state, kept, strict=True))
            ]
        tokens, gaps, total = torch.zeros(len(state), self.vocab), torch.zeros(len(state) + 1), 0.0
        for number, kept in self._known[state]:
            text = self.texts[number]
            weight = float(self.probs[number]) * gone ** (len(text) - len(state))
            ends = (-1, *kept, len(text))
            total += weight
            gaps += weight * torch.tensor([b - a - 1 for a, b in itertools.pairwise(ends)])
            for i, place in enumerate(kept):
                tokens[i, text[place]] += weight
        return tokens / total, gaps / total

    def with_head(self, canvas: Any, rows: Tensor, name: str, others: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K, V and the mask], and log expected numbers [B, G] behind the places `others`."""
        size = canvas.ids.shape[1]
        tokens, gaps = torch.zeros(len(canvas), size, self.vocab + 1), torch.zeros(len(canvas), size + 1)
        states = zip(canvas.ids.tolist(), canvas.extent.tolist(), canvas.time.tolist(), strict=True)
        said = cache(self.said)
        for b, (ids, extent, gone) in enumerate(states):
            tokens[b, :extent, : self.vocab], gaps[b, : extent + 1] = said(tuple(ids[:extent]), gone)
        shape = (*rows.shape, self.vocab + 1)
        return tokens.log().clamp(min=LEAST).gather(1, rows[..., None].expand(shape)), gaps.gather(
            1, others + 1
        ).log().clamp(min=LEAST)

    def score(
        self, *, input_ids: Tensor, visibility: Any, rows: Tensor, time: Tensor, heads: dict[str, Tensor], **_: Any
    ) -> SimpleNamespace:
        """`.logits` at `rows` [N] and `.heads` at their rows [G] of the stream [B, M], whose column 0 is no text."""
        tokens, gaps = torch.zeros(*input_ids.shape, self.vocab + 1), torch.zeros(input_ids.shape)
        real, known = (visibility.document >= 0).sum(1).tolist(), cache(self.said)
        for b, (ids, length) in enumerate(zip(input_ids.tolist(), real, strict=True)):
            tokens[b, 1:length, : self.vocab], gaps[b, :length] = known(tuple(ids[1:length]), float(time[b, 0]))
        logits = tokens.log().clamp(min=LEAST).flatten(0, 1)[rows]
        said = {name: gaps.flatten()[at].log().clamp(min=LEAST) for name, at in heads.items()}
        return SimpleNamespace(logits=logits, heads=said)


def quadrature(points: int = 400, edge: float = 3e-4) -> tuple[Tensor, Tensor]:
    """Times from 3 edge^2 to 1 less it, and their weights, [T] float64 each: close together at both ends, where bounds
    are steep."""
    place, weight = np.polynomial.legendre.leggauss(points)
    x, w = torch.from_numpy((1 + (1 - 2 * edge) * place) / 2), torch.from_numpy(weight) * (0.5 - edge)
    return x**2 * (3 - 2 * x), w * 6 * x * (1 - x)
