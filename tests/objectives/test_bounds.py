"""Bounds block after block, without a random number: the loss of every text, time and set of hidden tokens.

Each counts as often as it occurs; times are integrated by Gauss's rule. Values are met to five digits; that `prepare`
draws with these chances is for other tests, and the masked bound for test_truths.py. An arbitrary predictor stands
beside the exact one.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dmllm.objectives import build_objective
from dmllm.objectives.restrict import one_block
from dmllm.types import Batch, SpecialTokens
from tests.exact import Joint

SCHEDULES = [("linear", {}), ("cosine", {}), ("polynomial", {"power": 2.0}), ("polynomial", {"power": 3.0})]
VOCAB, LENGTH = 2, 4
SPECIAL = SpecialTokens(mask=VOCAB, eos=0, pad=0)


class Arbitrary(Joint):
    """A predictor that fits no joint: for whatever is known, numbers of its own."""

    def conditionals(self, ids: Tensor, known: Tensor) -> Tensor:
        base = self.vocab + 1
        index = (torch.where(known, ids, self.vocab) * base ** torch.arange(self.length)).sum(1)
        draws = torch.Generator().manual_seed(4)
        table = torch.randn(base**self.length, self.length, self.vocab, generator=draws, dtype=torch.float64)
        return table.softmax(-1)[index]

    def cost(self, text: Tensor, known: Tensor) -> Tensor:
        """-log of what it gives each token of a text [L] when `known` [L] is, [L]."""
        return -self.conditionals(text[None], known[None])[0].gather(1, text[:, None])[:, 0].log()


JOINT, WRONG = Joint(VOCAB, LENGTH), Arbitrary(VOCAB, LENGTH)


def objective(name: str, visibility: str, schedule: tuple = ("linear", {}), **options):
    settings = {"schedule": schedule[0], "schedule_options": schedule[1], "min_noise": 1e-6, **options}
    return build_objective(name, settings, SPECIAL, visibility)


def bound(learned, model, nodes: int = 24) -> float:
    """The mean loss of a token over all texts, times and hidden tokens; each counts as often as it occurs."""
    points, shares = np.polynomial.legendre.leggauss(nodes)
    times = learned.t_min + (learned.t_max - learned.t_min) * torch.tensor((points + 1) / 2)
    patterns = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))
    text, node, pattern = (
        x.flatten() for x in torch.meshgrid(*map(torch.arange, (len(JOINT.texts), nodes, len(patterns))), indexing="ij")
    )
    ids, hidden, t = JOINT.texts[text], patterns[pattern], times[node][:, None].expand(-1, LENGTH)
    noise = 1 - learned.schedule.alpha(t)
    chance = JOINT.probs[text] * torch.tensor(shares)[node] / 2 * torch.where(hidden, noise, 1 - noise).prod(1)
    if not learned.config.noise_block:
        return loss(learned, model, learned.corrupt(batch_of(ids), hidden, t.float()), chance)
    length, total = learned.config.noise_block, 0.0
    for block in range(number := math.ceil(LENGTH / length)):
        chosen = torch.full((len(ids), 1), (block + 0.5) / number)
        batch, share = one_block(batch_of(ids), length, chosen, SPECIAL.mask)
        noised = learned.corrupt(batch, hidden & (share > 0), t.float(), canvas=torch.ones_like(hidden), share=share)
        total += loss(learned, model, noised, chance) / number
    return total


def batch_of(ids: Tensor) -> Batch:
    return Batch(
        input_ids=ids,
        labels=ids,
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids),
        positions=torch.arange(ids.shape[1]).expand_as(ids),
    )


def loss(learned, model, noised, chance: Tensor) -> float:
    """The sum over a step that holds everything, each row of the batch as often as it occurs."""
    row = noised.rows // noised.batch.input_ids.shape[1] % len(chance)
    found = learned.loss(model, SimpleNamespace(**{**vars(noised), "weights": noised.weights * chance[row]}))["masked"]
    views = 2 if learned.config.complementary else 1
    return float(found.total) / LENGTH / views


VARIANTS = [
    ("masked", "prefix", {"complementary": True}),
    *(("masked", "full", {"noise_block": length}) for length in (1, 2, 3)),
    *(("block", f"block:{length}", {}) for length in (1, 2, 3, 4)),
    ("block", "block:2", {"complementary": True}),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "visibility", "options"), VARIANTS)
def test_with_exact_conditionals_it_is_the_entropy_under_every_schedule(name, visibility, options, schedule):
    learned = objective(name, visibility, schedule, **options)
    assert bound(learned, JOINT.score) == pytest.approx(JOINT.entropy / LENGTH, rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "visibility", "options"), VARIANTS)
def test_a_uniform_predictor_has_log_v_under_every_schedule(name, visibility, options, schedule):
    uniform = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 7))
    learned = objective(name, visibility, schedule, **options)
    assert bound(learned, uniform) == pytest.approx(math.log(7), rel=1e-4)


def by_blocks(length: int) -> float:
    """The mean cost of a token over the orders within blocks, each block given what is before it."""
    total = 0.0
    for text, probability in zip(JOINT.texts, JOINT.probs.tolist(), strict=True):
        for start in range(0, LENGTH, length):
            orders = list(itertools.permutations(range(start, min(start + length, LENGTH))))
            for order in orders:
                known = torch.arange(LENGTH) < start
                for place in order:
                    total += probability * float(WRONG.cost(text, known)[place]) / len(orders)
                    known[place] = True
    return total / LENGTH


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_for_any_predictor_it_is_the_mean_over_orders_within_blocks(schedule, length):
    """With blocks of one token the chain rule, so next-token prediction; with one block the masked bound."""
    expected = pytest.approx(by_blocks(length), rel=1e-4)
    assert bound(objective("block", f"block:{length}", schedule), WRONG.score) == expected
    assert bound(objective("masked", "full", schedule, noise_block=length), WRONG.score) == expected


def test_a_narrower_range_of_noise_is_another_bound_for_all_but_constant_costs():
    values = [bound(objective("masked", "full", min_noise=0.3, max_noise=high), WRONG.score) for high in (0.5, 0.8)]
    assert abs(values[0] - values[1]) > 1e-3
