"""Score entropy is the bounds of the other objectives, said of ratios."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmllm.objectives import build_objective, requirements
from dmllm.objectives.draws import Draws
from tests.exact import Joint
from tests.objectives.test_uniform import MASK, VOCABULARY, WORDS, batch_of, draws_for, exact, whole_loss


def objective_of(**options: Any) -> Any:
    return build_objective("score_entropy", options, VOCABULARY, "full")


def loss_of(objective: Any, model: Any, noised: Any, name: str) -> float:
    loss = objective.loss(model, noised)[name]
    return float(loss.total / loss.count)


def random_model(*, input_ids: Tensor, rows: Tensor, **_: Any) -> Any:
    """Logits that depend on what stands there."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    return SimpleNamespace(logits=table[input_ids.flatten()[rows]])


def test_of_masks_scores_of_a_distribution_cost_the_masked_cross_entropy() -> None:
    batch = batch_of(torch.randint(0, 3, (50, 8)))
    masked = build_objective("masked", {"zero_masking": True, "max_noise": 0.999}, VOCABULARY, "full")
    scores = objective_of(output="probabilities")
    draws = Draws(seed=0, step=1, num_examples=50, indices=batch.indices, num_steps=10)
    one, two = masked.prepare(batch, draws), scores.prepare(batch, draws)
    assert torch.equal(one.batch.input_ids, two.batch.input_ids)
    assert torch.equal(one.rows, two.rows)
    found = loss_of(scores, random_model, two, "score_entropy")
    assert found == pytest.approx(loss_of(masked, random_model, one, "masked"), rel=1e-4)


def test_of_words_scores_of_a_distribution_cost_the_bound_of_uniform_noise() -> None:
    batch = batch_of(torch.randint(0, 3, (50, 8)))
    bound = build_objective("uniform", {}, VOCABULARY, "full")
    scores = objective_of(noise="uniform", output="probabilities")
    noised = bound.prepare(batch, draws_for(batch))
    renamed = replace(noised, counts={"score_entropy": noised.counts["uniform"]})
    found = loss_of(scores, random_model, renamed, "score_entropy")
    assert found == pytest.approx(loss_of(bound, random_model, noised, "uniform"), rel=1e-4)


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_a_uniform_predictor_scores_log_v(noise: str) -> None:
    """Logits of 0: of masks SEDD's scores of a uniform predictor, of words those of p_t = 1 / K."""
    ignorant = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 4))
    found = whole_loss(objective_of(noise=noise), ignorant, Joint(vocab=WORDS, length=2), "score_entropy")
    assert found == pytest.approx(math.log(WORDS), rel=1e-3)


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_with_exact_scores_it_is_the_entropy(noise: str) -> None:
    joint = Joint(vocab=WORDS, length=2)
    objective = objective_of(noise=noise)
    knows = exact(joint, objective.noise, "leave_one_out")

    def model(*, input_ids: Tensor, time: Tensor, rows: Tensor, **_: Any) -> Any:
        logits = knows(input_ids=input_ids, time=time, rows=rows).logits
        if noise == "absorbing":
            return SimpleNamespace(logits=logits + math.log(WORDS))
        level = objective.noise.at(time.flatten()[rows])
        mass = (level.alpha[:, None] * logits.exp() + level.uniform[:, None]).log()
        return SimpleNamespace(logits=mass - mass.gather(1, input_ids.flatten()[rows, None]))

    assert whole_loss(objective, model, joint, "score_entropy") == pytest.approx(joint.entropy / 2, rel=1e-3)
    off = lambda **given: SimpleNamespace(logits=model(**given).logits * 0.8)
    assert whole_loss(objective, off, joint, "score_entropy") > joint.entropy / 2 + 0.01


def test_gradients_are_finite_where_scores_are_large_and_small() -> None:
    batch = batch_of(torch.randint(0, 3, (40, 8)))
    for noise in ("absorbing", "uniform"):
        for output in ("scores", "probabilities"):
            objective = objective_of(noise=noise, output=output)
            noised = objective.prepare(batch, draws_for(batch))
            weight = torch.randn(len(noised.rows), 4, requires_grad=True)
            said = SimpleNamespace(logits=5 * weight)
            objective.loss(lambda said=said, **_: said, noised)["score_entropy"].total.backward()
            assert bool(torch.isfinite(weight.grad).all())
            assert not weight.grad[:, MASK].any()


def test_models_of_masks_are_decoded_as_such_and_of_words_by_their_scores() -> None:
    assert requirements("score_entropy", {}, "causal") == {"process": "absorbing", "visibility": "full", "heads": {}}
    asked = requirements("score_entropy", {"noise": "uniform"}, "prefix")
    assert (asked["process"], asked["visibility"], asked["time_conditioning"]) == ("uniform", "prefix", True)
    assert asked["process_options"]["parameterisation"] == "score"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "hybrid"}, r"objective\.name=uniform"),
        ({"output": "ratios"}, "scores, probabilities"),
        ({"self_conditioning": 0.5}, "noise='uniform'"),
    ],
)
def test_settings_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective_of(**options)
