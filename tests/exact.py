"""A toy whose every answer is known: a joint distribution over whole texts, kept as a table, and its conditionals.

`Joint` is the data and a model that predicts it exactly: `predict` is what samplers call, `score` what objectives call.
Beside it, tests of what was drawn.

Shapes: X texts of L tokens over V words, B rows. The mask token is no word; it is V unless said.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

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
