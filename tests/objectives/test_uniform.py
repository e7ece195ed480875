"""Truths of the uniform objective, against a table model that knows every conditional."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmllm.diffusion.bounds import weights_of
from dmllm.diffusion.uniform import Noise, posterior
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.objectives import build_objective, requirements
from dmllm.objectives.draws import Draws
from dmllm.types import IGNORE, Batch, Vocabulary
from tests.exact import Joint, quadrature

WORDS, MASK = 3, 3
VOCABULARY = Vocabulary(mask=MASK, eos=2, pad=2, size=4)


def batch_of(ids: Tensor, *, start: int = 0) -> Batch:
    return Batch(
        input_ids=ids,
        labels=ids.clone(),
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids),
        positions=torch.arange(ids.shape[1]).expand_as(ids),
        indices=torch.arange(start, start + len(ids)),
    )


def draws_for(batch: Batch, step: int = 0) -> Draws:
    return Draws(seed=0, step=step, num_examples=len(batch), indices=batch.indices, num_steps=10)


def objective_of(visibility: str = "full", **options: Any) -> Any:
    return build_objective("uniform", options, VOCABULARY, visibility)


def exact(joint: Joint, noise: Noise, which: str) -> Any:
    """A model that says `which` of the two predictions, exactly."""

    def model(*, input_ids: Tensor, time: Tensor, rows: Tensor, **_: Any) -> Any:
        level = noise.at(time.double())
        there = input_ids[..., None] == torch.arange(joint.vocab)
        chance = level.noise(input_ids, MASK)[..., None] + level.alpha[..., None] * there
        found = joint.restored(chance, leave_one_out=which == "leave_one_out").log()
        return SimpleNamespace(logits=torch.nn.functional.pad(found, (0, 1)).flatten(0, 1)[rows])

    return model


def mean_loss(objective: Any, model: Any, batch: Batch, name: str = "uniform") -> float:
    loss = objective.loss(model, objective.prepare(batch, draws_for(batch)))[name]
    return float(loss.total / loss.count)


def whole_loss(objective: Any, model: Any, joint: Joint, name: str = "uniform") -> float:
    """The mean loss over all texts, all that may become of them and all times, with nothing drawn."""
    if getattr(objective.config, "bound", None) == "d3pm":
        t = torch.arange(1, objective.config.steps + 1, dtype=torch.float64) / objective.config.steps
        weight = torch.full_like(t, 1 / len(t))
    else:
        t, weight = quadrature(80, edge=1e-4)
    states = torch.tensor(list(itertools.product(range(WORDS + 1), repeat=joint.length)))
    sizes = map(torch.arange, (len(joint.texts), len(states), len(t)))
    text, state, moment = torch.cartesian_prod(*sizes).T
    clean, noised, time = joint.texts[text], states[state], t[moment][:, None].expand(-1, joint.length)
    level = objective.noise.at(time)
    chance = (level.noise(noised, MASK) + level.alpha * (clean == noised)).prod(1) * joint.probs[text] * weight[moment]
    there = chance > 0
    batch = batch_of(clean[there])
    found = objective.disturb(batch, noised[there], time[there])
    found = replace(found, weights=chance[there].repeat_interleave(joint.length)[found.rows])
    return float(objective.loss(model, found)[name].total) / joint.length


BOUNDS = [
    {"bound": "udlm"},
    {"bound": "udlm", "schedule": "polynomial"},
    {"bound": "gidd", "noise": "hybrid", "p_uniform": 0.2},
    {"bound": "d3pm", "steps": 20},
    {"bound": "gidd", "noise": "absorbing"},
]


@pytest.mark.parametrize("options", BOUNDS, ids=str)
def test_a_uniform_predictor_scores_log_v(options: dict[str, Any]) -> None:
    ignorant = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 4))
    found = whole_loss(objective_of(**options), ignorant, Joint(vocab=WORDS, length=2))
    assert found == pytest.approx(math.log(WORDS), rel=1e-3)


@pytest.mark.parametrize("options", BOUNDS, ids=str)
def test_with_exact_predictions_the_bound_is_the_entropy_if_each_leaves_its_own_place_out(options) -> None:
    joint = Joint(vocab=WORDS, length=2)
    objective, entropy = objective_of(**options), joint.entropy / 2
    found = whole_loss(objective, exact(joint, objective.noise, "leave_one_out"), joint)
    near = 0.02 if options["bound"] == "d3pm" else 1e-3  # in steps that take two tokens at once something is lost
    assert entropy * (1 - 1e-3) < found < entropy * (1 + near)
    taught = exact(joint, objective.noise, "posterior")  # what cross-entropy teaches
    converted = objective_of(**options, parameterisation="posterior")
    assert whole_loss(converted, taught, joint) == pytest.approx(found, rel=1e-5)
    if options.get("noise") != "absorbing":  # a mask says nothing of what it was
        assert whole_loss(objective, taught, joint) > 1.1 * entropy


def test_what_is_drawn_gives_the_same_on_average() -> None:
    joint = Joint(vocab=WORDS, length=2)
    objective = objective_of(bound="d3pm", steps=4)
    model = exact(joint, objective.noise, "posterior")
    found = mean_loss(objective, model, batch_of(joint.draw(4000)))
    assert found == pytest.approx(whole_loss(objective, model, joint), rel=0.05)


def test_cross_entropy_is_of_the_posterior_whatever_the_logits_are() -> None:
    joint = Joint(vocab=WORDS, length=3)
    batch = batch_of(joint.draw(2000))
    values = []
    for which in ("leave_one_out", "posterior"):
        objective = objective_of(bound="none", parameterisation=which)
        values.append(mean_loss(objective, exact(joint, objective.noise, which), batch))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    wrong = objective_of(bound="none", parameterisation="posterior")
    assert mean_loss(wrong, exact(joint, wrong.noise, "leave_one_out"), batch) > values[0] + 0.02


def test_d3pm_adds_a_share_of_cross_entropy() -> None:
    joint = Joint(vocab=WORDS, length=3)
    batch = batch_of(joint.draw(500))
    objective = objective_of(bound="d3pm", steps=10, cross_entropy=0.01)
    assert objective.coefficients == {"cross_entropy": 0.01}
    noised = objective.prepare(batch, draws_for(batch))
    assert set(noised.time.unique().tolist()) <= {torch.tensor(i / 10).item() for i in range(1, 11)}
    losses = objective.loss(exact(joint, objective.noise, "leave_one_out"), noised)
    assert set(losses) == {"uniform", "cross_entropy"} == set(noised.counts)


def test_tokens_are_kept_masked_or_any_word_as_often_as_said() -> None:
    objective = objective_of(noise="hybrid", p_uniform=0.3, bound="gidd", min_time=0.5, max_time=0.500001)
    batch = batch_of(torch.full((4000, 10), 1))
    noised = objective.prepare(batch, draws_for(batch)).batch.input_ids
    level = objective.noise.at(torch.tensor(0.5))
    share = [float((noised == token).float().mean()) for token in range(4)]
    expected = [level.uniform, level.uniform + level.alpha, level.uniform, level.masked]
    assert share == pytest.approx([float(x) for x in expected], abs=0.01)
    assert 3 * float(level.uniform) == pytest.approx(0.3)  # the share that p_uniform says


def test_what_is_given_is_never_noised_nor_scored_and_special_ids_are_no_noise() -> None:
    vocabulary = Vocabulary(mask=0, eos=5, pad=3, image=7, size=9)
    objective = build_objective("uniform", {}, vocabulary, "full")
    ids = torch.randint(0, 9, (200, 12))
    ids[:, 6:] = 4
    batch = batch_of(ids)
    batch.labels[:, :6] = IGNORE
    noised = objective.prepare(batch, draws_for(batch))
    assert torch.equal(noised.batch.input_ids[:, :6], ids[:, :6])
    assert set(noised.batch.input_ids[:, 6:].unique().tolist()) == {1, 2, 4, 5, 6, 8}
    assert torch.equal(noised.rows.view(200, 6), torch.arange(200)[:, None] * 12 + torch.arange(6, 12))
    assert (vocabulary.words, vocabulary.reserved) == (6, (0, 3, 7))
    assert replace(vocabulary, pad=5).reserved == (0, 7)  # the end of sequence is a word


def test_the_split_into_micro_batches_changes_nothing() -> None:
    objective = objective_of(self_conditioning=0.5)
    whole = batch_of(torch.randint(0, 3, (6, 8)))
    draws = draws_for(whole)
    first = objective.prepare(whole, draws)
    half = batch_of(whole.input_ids[3:], start=3)
    second = objective.prepare(half, replace(draws, indices=half.indices))
    assert torch.equal(first.batch.input_ids[3:], second.batch.input_ids)
    assert torch.equal(first.heard[24:], second.heard)
    assert 0 < int(first.heard.sum()) < 48


@pytest.mark.parametrize("times", ["block", "document"])
def test_blocks_are_noised_behind_what_is_given(times: str) -> None:
    objective = objective_of("block:4", times=times)
    batch = batch_of(torch.randint(0, 3, (300, 12)))
    batch.labels[:, :6] = IGNORE
    noised = objective.prepare(batch, draws_for(batch))
    assert torch.equal(noised.batch.input_ids[:, :12], batch.input_ids)
    copy, given = noised.batch.input_ids[:, 12:], batch.input_ids[:, 4:]
    assert torch.equal(copy[:, :2], given[:, :2])  # the rest of the prompt's last block
    assert 0.2 < float((copy[:, 2:] != given[:, 2:]).float().mean()) < 0.5
    assert not noised.time[:, :12].any()
    assert bool((noised.time[:, 12:] > 0).all())
    assert bool((noised.time[:, 12] == noised.time[:, 16]).all()) == (times == "document")


def model_of(**fields: Any) -> MultimodalModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MultimodalModel(DmllmConfig(backbone=shape, mask_token_id=3, eos_token_id=2, pad_token_id=2, **fields))
    model.initialise()
    return model


def test_a_model_is_told_what_it_is_to_undo() -> None:
    model, options = model_of(visibility="causal"), {"noise": "hybrid", "bound": "gidd", "self_conditioning": 0.5}
    model.adapt(**requirements("uniform", options, "causal"))
    config = model.config
    assert (config.process, config.visibility) == ("uniform", "full")
    assert config.process_options["noise"] == "hybrid"
    assert "bound" not in config.process_options
    assert config.backbone["time_conditioning"]
    assert model.takes_feedback


def test_self_conditioning_that_starts_at_zero_changes_nothing_until_it_has_learned() -> None:
    batch = batch_of(torch.randint(0, 3, (4, 8)))
    losses = []
    for often in (0.0, 1.0):
        model = model_of()
        options = {"self_conditioning": often}
        model.adapt(**requirements("uniform", options, "full"))
        objective = objective_of(**options)
        noised = objective.prepare(batch, draws_for(batch))
        losses.append(objective.loss(model, noised)["uniform"].total)
    assert torch.equal(losses[0], losses[1])
    losses[1].backward()
    head = model.heads["self_conditioning"]
    assert head.proj.weight.grad.abs().max() > 0
    torch.nn.init.normal_(head.proj.weight)
    assert not torch.allclose(objective.loss(model, noised)["uniform"].total, losses[0])
    deaf = replace(noised, heard=torch.zeros_like(noised.heard))
    assert torch.allclose(objective.loss(model, deaf)["uniform"].total, losses[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": "udlm", "noise": "hybrid"}, "bound: gidd"),
        ({"bound": "elbo"}, "not one of udlm"),
        ({"weight": "dynamic", "bound": "none"}, "has its own"),
        ({"min_time": 0.0}, "between 0 and 1"),
        ({"noise": "hybrid", "bound": "gidd", "p_uniform": 1.0}, "below 1"),
        ({"noise": "hybrid", "bound": "gidd", "schedule": "cosine"}, "has its own"),
        ({"parameterisation": "score"}, "score_entropy"),
        ({"p_unifrom": 0.1}, "p_uniform"),
    ],
)
def test_settings_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective_of(**options)


def test_causal_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.visibility=full"):
        objective_of("causal")


def test_dynamic_weights_are_the_bounds_own_without_what_depends_on_time() -> None:
    """GIDD, arXiv:2503.04482, section 4.2: 2 on masks, 1 on random words."""
    noise = objective_of(noise="hybrid", bound="gidd", p_uniform=0.2).noise
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64).repeat_interleave(3)
    targets, noised = torch.ones_like(t).long(), torch.tensor([1, 2, MASK]).repeat(19)
    own, dynamic = (weights_of(kind, targets, noised, noise, t, MASK, 2.0) for kind in ("elbo", "dynamic"))
    assert torch.allclose(dynamic, own * 2 * t * (1 - t))
    assert dynamic.view(-1, 3)[:, 1:].tolist() == [[1.0, 2.0]] * 19


def test_posterior_and_back() -> None:
    noise = objective_of().noise
    logits, z = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    level = noise.at(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    raised = posterior(logits, z, level, MASK)
    assert torch.equal(raised[3], logits[3])
    factor = (raised - logits).exp()[torch.arange(5), z][[0, 1, 2, 4]]
    kept = level.alpha + level.uniform
    assert torch.allclose(factor, (kept / level.uniform)[[0, 1, 2, 4]], rtol=1e-4)
