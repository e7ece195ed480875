"""How probable an answer is, by Monte Carlo: views of it with some tokens hidden, and what the model gives those.

With k of n tokens hidden, k uniform in 1..n and then any k of them, the mean of n/k sum(log p of what is hidden) is a
lower bound on log p(answer), tight for exact conditionals; its variance is below that of weighing by 1/t.

Source: Nie et al., LLaDA, arXiv:2502.09992, equation 6. Shapes: S views of an answer of n tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.denoise import Predict


@torch.no_grad()
def likelihood(predict: Predict, answer: Tensor, hidden: Tensor, mask_id: int, batch_size: int) -> Tensor:
    """log p(answer) in nats, a float64 scalar.

    Args:
        predict: the model, already given one prompt.
        answer: [n] int64.
        hidden: [S, n] bool, at least one token in each view.
        batch_size: views in one model call.
    """
    total = torch.zeros((), dtype=torch.float64, device=answer.device)
    for part in hidden.split(batch_size):
        answers = answer.expand(len(part), -1)
        canvas = Canvas.of(answers, ~part, mask_id)
        canvas = replace(canvas, requests=torch.zeros_like(canvas.requests))  # all are views of one request
        logits = predict(canvas, torch.arange(len(answer), device=answer.device).expand_as(answers)).float()
        found = logits.gather(-1, answers[..., None]).squeeze(-1) - logits.logsumexp(-1)
        total += (found * part).sum(1).double() @ (len(answer) / part.sum(1).double())
    return total / len(hidden)


def draw_views(length: int, count: int, generator: Generator) -> Tensor:
    """What each of `count` views hides, [count, length] bool: how many is spread evenly over 1..length."""
    offset = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    places = (offset.cpu() + torch.arange(count, dtype=torch.float64) / count) % 1.0
    many = (places * length).long().clamp(max=length - 1) + 1
    order = torch.rand(count, length, generator=generator, device=generator.device).cpu().argsort(1).argsort(1)
    return order < many[:, None]
