"""What a model says of held-out texts, in nats: its objective's own loss, where that bounds -log p, over many draws."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import torch

from dmllm.data.loader import build_loader
from dmllm.data.mixture import DataConfig, load_mixture
from dmllm.data.sources import DataSource
from dmllm.objectives import build_objective
from dmllm.objectives.draws import Draws
from dmllm.types import IGNORE

SEED = 2_026  # of the draws, which no training has


@torch.no_grad()
def nats(
    pipeline: Any, objective: str, options: dict[str, Any], data: str, number: int, draws: int, batch_size: int
) -> dict[str, Any]:
    """The bound on the first `number` records of a data file, each noised `draws` times.

    Args:
        options: of the objective, under which its loss is a sum over an answer's tokens.

    Returns:
        token, text: nats a scored token, and an answer; tokens: scored tokens an answer; standard_error: of `text`, by
        the draws; each the mean over all.
    """
    model, processor = pipeline.model, pipeline.processor
    learned = build_objective(objective, options, model.vocabulary, model.config.visibility)
    mixture = load_mixture(DataConfig(datasets=(DataSource(json_path=data),)), seed=0, shuffle=False)
    number = min(number, len(mixture))
    totals, tokens = [], 0.0
    for turn in range(draws):
        total, count = 0.0, 0.0
        loader = build_loader(mixture, processor, batch_size=math.gcd(number, batch_size))
        for batch in itertools.islice(loader, number // math.gcd(number, batch_size)):
            given = Draws(seed=SEED, step=turn, num_examples=number, indices=batch.indices)
            noised = learned.prepare(batch, given)
            losses = learned.loss(model, noised)
            total += sum(float(loss.total) for loss in losses.values())
            count += float((batch.labels != IGNORE).sum())
        loader.close()
        totals.append(total / number)
        tokens = count / number
    text = statistics.mean(totals)
    error = statistics.stdev(totals) / math.sqrt(draws) if draws > 1 else None
    return {"text": text, "token": text / tokens, "tokens": tokens, "standard_error": error, "count": number}
