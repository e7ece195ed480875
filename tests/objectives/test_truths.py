"""The masked and block bounds without drawing anything: every subset of hidden tokens at every time of a quadrature.

For a model with any conditionals it is one number under every schedule, which is also the mean over subset sizes and
the mean over orders; with exact conditionals it is -log p of a text, and the entropy on average over the data.
In blocks it is that for every block length, though each is another number where the conditionals are not exact.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmllm.objectives import build_objective
from dmllm.types import Batch, SpecialTokens
from tests.exact import Joint

LENGTH, NODES = 4, 16
SUBSETS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))  # [16, L]
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "linear"},
    {"schedule": "cosine"},
    {"schedule": "polynomial", "schedule_options": {"power": 2.0}},
    {"schedule": "linear", "complementary": True},
    {"schedule": "cosine", "complementary": True},
]


class Sharper(Joint):
    """Conditionals that belong to no joint distribution: each sharper than it should be."""

    def score(self, **given: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=1.7 * super().score(**given).logits.clamp(min=-1e9))


def bounds(model: Any, texts: Tensor, mask: int, options: dict[str, Any], visibility: str = "full") -> Tensor:
    """The objective's loss of each of `texts` [T, L], summed over its tokens: [T] nats."""
    special = SpecialTokens(mask=mask, eos=0, pad=0)
    objective = build_objective(None, {"min_noise": 1e-9, "zero_masking": True, **options}, special, visibility)
    nodes, shares = (torch.from_numpy(x) / 2 for x in np.polynomial.legendre.leggauss(NODES))
    times = objective.t_min + (objective.t_max - objective.t_min) * (nodes + 0.5)
    masked = 1 - objective.schedule.alpha(times)[:, None]  # [T, 1]
    sizes = SUBSETS.sum(1)
    chance = shares[:, None] * masked**sizes * (1 - masked) ** (LENGTH - sizes)  # [nodes, 16]
    count = NODES * len(SUBSETS)
    ids = texts.repeat_interleave(count, 0)
    batch = Batch(
        input_ids=ids,
        labels=ids.clone(),
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids),
        positions=torch.arange(LENGTH).expand_as(ids),
    )
    hidden = SUBSETS.repeat(NODES * len(texts), 1)
    time = times.repeat_interleave(len(SUBSETS)).repeat(len(texts))[:, None].expand(-1, LENGTH)
    noised = objective.corrupt(batch, hidden, time)
    row = noised.rows // noised.batch.input_ids.shape[1] % len(ids)  # of a second view below the first too
    weights = noised.weights * chance.flatten().repeat(len(texts))[row]
    found, views = [], 2 if options.get("complementary") else 1
    for text in range(len(texts)):
        own = torch.where(row // count == text, weights, 0.0)
        found.append(objective.loss(model, replace(noised, weights=own))["masked"].total / views)
    return torch.stack(found)


def costs(model: Joint, text: Tensor) -> Tensor:
    """-log p of each token of `text` given what is not in a subset, where the token is: [16, L], else 0."""
    ids = text.expand(len(SUBSETS), -1).masked_fill(SUBSETS, model.mask)
    logits = model.score(input_ids=ids, rows=torch.arange(ids.numel())).logits.view(len(SUBSETS), LENGTH, -1)
    found = logits.log_softmax(-1).gather(-1, text.expand(len(SUBSETS), -1)[..., None]).squeeze(-1)
    return -torch.where(SUBSETS, found, 0.0)


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_under_every_schedule_it_is_the_mean_over_sizes_and_over_orders(options: dict[str, Any]) -> None:
    model = Sharper(3, LENGTH)
    text = model.texts[44]
    cost, sizes = costs(model, text), SUBSETS.sum(1)
    by_size = sum(float(cost[sizes == n].sum(1).mean()) / n for n in range(1, LENGTH + 1))
    places = {tuple(subset): i for i, subset in enumerate(SUBSETS.tolist())}
    orders = list(itertools.permutations(range(LENGTH)))
    by_order = sum(
        float(cost[places[tuple(i in order[n:] for i in range(LENGTH))], order[n]])
        for order in orders
        for n in range(LENGTH)
    ) / len(orders)
    assert by_order == pytest.approx(by_size, rel=1e-9)
    assert float(bounds(model.score, text[None], model.mask, options)) == pytest.approx(by_size, rel=3e-6)


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_with_exact_conditionals_it_is_the_probability_of_each_text(options: dict[str, Any]) -> None:
    joint = Joint(2, LENGTH)
    found = bounds(joint.score, joint.texts, joint.mask, options).double()
    torch.testing.assert_close(found, -joint.probs.log(), atol=3e-5, rtol=0)
    assert float((found * joint.probs).sum()) == pytest.approx(joint.entropy, rel=3e-6)


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_a_uniform_predictor_scores_log_v_a_token(options: dict[str, Any]) -> None:
    uniform = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 8))
    found = float(bounds(uniform, torch.zeros(1, LENGTH, dtype=torch.int64), 7, options))
    assert found / LENGTH == pytest.approx(math.log(7), rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("options", SCHEDULES[::3], ids=str)
def test_in_blocks_of_any_length_too(length: int, options: dict[str, Any]) -> None:
    joint, visibility = Joint(2, LENGTH), f"block:{length}"
    found = bounds(joint.score, joint.texts, joint.mask, options, visibility).double()
    torch.testing.assert_close(found, -joint.probs.log(), atol=3e-5, rtol=0)
    uniform = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 8))
    found = float(bounds(uniform, torch.zeros(1, LENGTH, dtype=torch.int64), 7, options, visibility))
    assert found / LENGTH == pytest.approx(math.log(7), rel=1e-6)


def test_blocks_of_one_token_are_the_chain_rule_and_one_block_is_the_masked_bound() -> None:
    """Of conditionals that are not exact, under which the two differ."""
    model = Sharper(3, LENGTH)
    text, cost = model.texts[44], costs(model, model.texts[44])
    one, whole, masked = (
        float(bounds(model.score, text[None], model.mask, {}, visibility))
        for visibility in ("block:1", "block:4", "full")
    )
    behind = (2 ** (LENGTH - i) - 1 for i in range(LENGTH))  # the subsets of i and all that follows
    in_order = sum(float(cost[subset, i]) for i, subset in enumerate(behind))
    assert one == pytest.approx(in_order, rel=3e-6)
    assert whole == pytest.approx(masked, rel=3e-6)
    assert abs(one - whole) > 1e-3
