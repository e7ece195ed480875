"""A ten-line model with exact conditionals: a joint distribution over whole canvases, kept as a table."""

from __future__ import annotations

import itertools

import torch
from torch import Generator, Tensor

from dmllm.samplers.canvas import Canvas


class TableModel:
    """p(token at i | what is committed), from a random joint over `length` tokens; the last id is the mask."""

    def __init__(self, vocab: int = 3, length: int = 3, *, seed: int = 0, sharpness: float = 1.5):
        self.texts = torch.tensor(list(itertools.product(range(vocab), repeat=length)))  # [X, N]
        draws = Generator().manual_seed(seed)
        self.probs = (sharpness * torch.randn(len(self.texts), generator=draws, dtype=torch.float64)).softmax(0)
        self.vocab, self.length, self.mask = vocab, length, vocab
        self.calls: list[tuple[Canvas, Tensor]] = []

    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        self.calls.append((canvas, rows))
        agrees = ((self.texts[None] == canvas.ids[:, None]) | ~canvas.committed[:, None]).all(-1)  # [B, X]
        weight = self.probs * agrees
        tokens = torch.nn.functional.one_hot(self.texts, self.vocab + 1).double()  # [X, N, V]
        mass = torch.einsum("bx,xnv->bnv", weight, tokens)
        mass[..., self.mask] = 2 * mass.sum(-1)  # the model would love to say "mask"
        return mass.gather(1, rows[..., None].expand(-1, -1, mass.shape[-1])).log()


class NoiseModel:
    """Logits that depend on the row's own request and canvas only, by hashing: a stand-in for a random transformer."""

    def __init__(self, vocab: int = 50, scale: float = 3.0, seeds: tuple[int, ...] = (0, 1, 2, 3)):
        self.vocab, self.mask, self.scale, self.seeds = vocab, vocab - 1, scale, seeds

    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        out = torch.empty(*rows.shape, self.vocab)
        for b, request in enumerate(canvas.requests.tolist()):
            known = canvas.ids[b] * canvas.committed[b]
            key = int((known * torch.arange(1, len(known) + 1)).sum()) + 7919 * self.seeds[request]
            logits = torch.randn(canvas.ids.shape[1], self.vocab, generator=Generator().manual_seed(key))
            out[b] = self.scale * logits[rows[b]]
        return out


def generators(*seeds: int) -> list[Generator]:
    """One generator a row."""
    return [Generator().manual_seed(s) for s in seeds]


def quantile(freedom: int) -> float:
    """Chi-square, 99.9 %, by Wilson and Hilferty's approximation."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def chi_square(model: TableModel, drawn: Tensor) -> float:
    """Of the texts `drawn` [B, N], against the table; of those that can be."""
    index = (drawn * model.vocab ** torch.arange(model.length - 1, -1, -1)).sum(1)
    seen = torch.bincount(index, minlength=len(model.texts)).double()
    expected, possible = model.probs * len(drawn), model.probs > 0
    assert not seen[~possible].any()
    return float(((seen - expected) ** 2 / expected)[possible].sum())
