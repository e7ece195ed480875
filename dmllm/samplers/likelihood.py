"""How probable an answer is, by Monte Carlo: views of it with some tokens hidden, and what the model gives those.

With k of n tokens hidden, k uniform in 1..n and then any k of them, the mean of n/k sum(log p of what is hidden) is a
lower bound on log p(answer), tight for exact conditionals; its variance is below that of weighing by 1/t.

Views of several answers that come from the same `Noise` hide alike: what similar answers have in common is then as good
or bad for each, and cancels in their difference. How many tokens are hidden is spread evenly, so that the views are no
independent draws; the standard error counts how neighbours along this line differ (Wolter, Introduction to Variance
Estimation, chapter 8).

Source: Nie et al., LLaDA, arXiv:2502.09992, equation 6. Shapes: S views of an answer of n tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.process import Predict


@torch.no_grad()
def likelihood(predict: Predict, answer: Tensor, hidden: Tensor, mask_id: int, batch_size: int) -> Tensor:
    """log p(answer) in nats, a float64 scalar: the mean of `view_values`."""
    return view_values(predict, answer, hidden, mask_id, batch_size).mean()


@torch.no_grad()
def chain_rule(predict: Predict, answer: Tensor, mask_id: int) -> Tensor:
    """log p(answer) in nats, a float64 scalar, where no position's logits depend on what stands there or behind it:
    the sum of log p(token | those before it), from one call."""
    canvas = Canvas.of(answer[None], torch.ones_like(answer, dtype=torch.bool)[None], mask_id)
    logits = predict(canvas, torch.arange(len(answer), device=answer.device)[None]).float()[0]
    return (logits.gather(-1, answer[:, None]).squeeze(-1) - logits.logsumexp(-1)).double().sum()


@torch.no_grad()
def view_values(predict: Predict, answer: Tensor, hidden: Tensor, mask_id: int, batch_size: int) -> Tensor:
    """What each view says of log p(answer) in nats, [S] float64.

    Args:
        predict: the model, already given one prompt.
        answer: [n] int64.
        hidden: [S, n] bool, at least one token in each view.
        batch_size: views in one model call.
    """
    values = []
    for part in hidden.split(batch_size):
        answers = answer.expand(len(part), -1)
        canvas = Canvas.of(answers, ~part, mask_id)
        canvas = replace(canvas, requests=torch.zeros_like(canvas.requests))  # all are views of one request
        logits = predict(canvas, torch.arange(len(answer), device=answer.device).expand_as(answers)).float()
        found = logits.gather(-1, answers[..., None]).squeeze(-1) - logits.logsumexp(-1)
        total = found.masked_fill(~part, 0).sum(1).double()
        values.append(total * (len(answer) / part.sum(1).double()))
    return torch.cat(values)


def bound(
    predict: Predict, answer: Tensor, noise: Noise, places: Tensor, block: int, mask_id: int, size: int
) -> Tensor:
    """What each view of `noise` says of log p(answer), [S] float64: all the same where the bound is known without
    error, there being no more views in all than those to be drawn.

    Args:
        places: [n], the columns of the noise that hide the answer's tokens.
        block: which of the noise's lines says how many are hidden.
        size: views in one model call.
    """
    count, length = len(noise.level), len(answer)
    if 2**length - 1 <= count:
        views, weights = all_views(length)
        values = view_values(predict, answer, views.to(answer.device), mask_id, size)
        return (values @ weights.to(values.device)).expand(count)
    return view_values(predict, answer, noise.hides(places, block).to(answer.device), mask_id, size)


def draw_views(length: int, count: int, generator: Generator) -> Tensor:
    """What each of `count` views hides, [count, length] bool: how many is spread evenly over 1..length."""
    return Noise.draw(count, length, generator).hides(torch.arange(length))


def all_views(length: int) -> tuple[Tensor, Tensor]:
    """Every view of an answer, [2^n - 1, n] bool, and the probability of each, [2^n - 1] float64."""
    views = torch.tensor([view for view in itertools.product([False, True], repeat=length) if any(view)])
    sizes = views.sum(1)
    return views, 1 / (length * torch.bincount(sizes)[sizes].double())


@dataclass(frozen=True)
class Noise:
    """Common random numbers of S views, on the CPU: what they hide of any answer."""

    level: Tensor  # [S, blocks] float64 in [0, 1): which share of a block is hidden
    order: Tensor  # [S, columns]: of two tokens, the one with the lower number is hidden first

    @staticmethod
    def draw(count: int, columns: int, generator: Generator, blocks: int = 1) -> Noise:
        """Numbers for answers of up to `columns` tokens in up to `blocks` blocks."""
        device = generator.device
        lines, even = [], torch.arange(count, dtype=torch.float64) / count
        for block in range(blocks):
            offset = torch.rand((), generator=generator, dtype=torch.float64, device=device)
            line = (offset.cpu() + even) % 1.0
            shuffled = torch.randperm(count, generator=generator, device=device).cpu() if block else slice(None)
            lines.append(line[shuffled])
        order = torch.rand(count, columns, generator=generator, device=device).cpu()
        return Noise(torch.stack(lines, 1), order)

    def hides(self, places: Tensor, block: int = 0) -> Tensor:
        """What each view hides of the tokens at the columns `places` [n], [S, n] bool; at least one token."""
        length = len(places)
        many = (self.level[:, block] * length).long().clamp(max=length - 1) + 1
        return self.order[:, places.cpu()].argsort(1).argsort(1) < many[:, None]

    def standard_error(self, values: Tensor) -> float:
        """Of the mean over views of what they say of an answer's blocks, [S, blocks], summed."""
        count = len(values)
        total = 0.0
        for block in range(values.shape[1]):
            line = values[:, block].cpu()[self.level[:, block].argsort()]
            total += float(line.diff().square().sum()) / (2 * (count - 1) * count)
        return total**0.5
