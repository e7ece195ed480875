"""Models whose every answer is known: one with exact conditionals, and one that stands for a random transformer."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dmllm.samplers.canvas import Canvas
from tests.exact import Joint, chi_square, generators, quantile

__all__ = ["NoiseModel", "TableModel", "chi_square", "generators", "quantile"]


class TableModel(Joint):
    """p(token at i | what is committed), from a random joint over `length` tokens; it remembers its calls."""

    def __init__(self, vocab: int = 3, length: int = 3, *, seed: int = 0, sharpness: float = 1.5):
        super().__init__(vocab, length, seed=seed, sharpness=sharpness)
        self.calls: list[tuple[Canvas, Tensor]] = []

    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        self.calls.append((canvas, rows))
        return self.predict(canvas, rows)


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
