"""Truths of embedding diffusion: what is noised and what is not, what each sum is, and that vectors stay apart."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dmllm.diffusion.gaussian import Sqrt, ddim, ddpm
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.objectives import build_objective, requirements
from dmllm.objectives.draws import Draws
from dmllm.pipeline import Pipeline
from dmllm.types import IGNORE, PADDING, Batch, SpecialTokens

MASK, WORDS = 11, 12
SPECIAL = SpecialTokens(mask=MASK, eos=10, pad=10)
FORMS = [{"form": "diffuseq"}, {"form": "diffuseq", "adaptive": True}, {"form": "flow"}]


def batch_of(rows: int = 6, length: int = 8, prompt: int = 3, start: int = 0) -> Batch:
    ids = torch.randint(0, 10, (64, length), generator=torch.Generator().manual_seed(0))[start : start + rows]
    labels = ids.clone()
    labels[:, :prompt] = IGNORE
    return Batch(
        input_ids=ids,
        labels=labels,
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids),
        positions=torch.arange(length).expand_as(ids),
        indices=torch.arange(start, start + rows),
    )


def draws_for(batch: Batch, step: int = 0, total: int = 6) -> Draws:
    return Draws(seed=0, step=step, num_examples=total, indices=batch.indices)


def tiny(options, visibility="full", **shape):
    torch.manual_seed(0)
    backbone = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **shape}
    model = MultimodalModel(DmllmConfig(backbone=backbone, mask_token_id=MASK, visibility=visibility))
    model.initialise()
    model.adapt(**requirements("continuous", options, visibility))
    return model


def built(options, visibility="full"):
    return build_objective("continuous", options, SPECIAL, visibility)


class Spied:
    """A model whose calls are kept; it may say the truth, or all words alike."""

    def __init__(self, model, truth=None):
        self.model, self.space, self.calls, self.truth = model, model.space, [], truth

    def __call__(self, **given):
        given["latents"] = given["latents"](self.space)
        self.calls.append(given)
        output = self.model(**given)
        if self.truth == "alike":
            return SimpleNamespace(logits=torch.zeros_like(output.logits), heads=output.heads)
        if self.truth is not None:
            output.heads["latent"] = self.truth
        return output


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("visibility", ["full", "prefix"])
def test_answers_are_noised_and_nothing_else(options, visibility):
    batch = batch_of()
    model, objective = Spied(tiny(options, visibility)), built(options, visibility)
    noised = objective.prepare(batch, draws_for(batch))
    objective.loss(model, noised)
    scorable = batch.labels != IGNORE
    for call in model.calls:
        assert torch.equal(call["latent_rows"], scorable)
        assert (call["latents"][~scorable] == 0).all()
        assert torch.equal(call["input_ids"][~scorable], batch.input_ids[~scorable])
        assert (call["input_ids"][scorable] == MASK).all(), "the answer's ids are told to nobody"
        assert torch.equal(call["visibility"].canvas, scorable if visibility == "prefix" else call["visibility"].canvas)
    assert torch.equal(noised.targets, batch.labels[scorable])


@pytest.mark.parametrize("options", FORMS)
def test_a_token_is_mixed_with_noise_as_the_schedule_says(options):
    batch = batch_of()
    model, objective = Spied(tiny(options)), built(options)
    noised = objective.prepare(batch, draws_for(batch))
    objective.loss(model, noised)
    space, t = model.space, noised.time.flatten()[noised.rows]
    level = space.level(t, noised.places)
    x = space.vectors()[noised.targets]
    if options["form"] == "diffuseq":
        x = x + space.level(torch.full_like(t, 1 / 2000), noised.places).noise[:, None] * noised.start
    z = model.calls[0]["latents"].flatten(0, 1)[noised.rows][:, : space.width]
    assert torch.allclose(z, level.signal[:, None] * x + level.noise[:, None] * noised.noise, atol=1e-5)
    if options["form"] == "diffuseq":
        assert torch.allclose((t * 2000).round() / 2000, t, atol=1e-6), "times of the discrete chain"
        assert t.min() > 0


def test_noise_is_standard_normal_and_each_example_has_its_own():
    batch = batch_of(64)
    noised = built({}).prepare(batch, draws_for(batch, total=64))
    for noise in (noised.noise, noised.start):
        assert abs(float(noise.mean())) < 0.03
        assert float(noise.var()) == pytest.approx(1, abs=0.03)
    assert abs(float((noised.noise * noised.start).mean())) < 0.03
    again = built({}).prepare(batch, draws_for(batch, step=1, total=64))
    assert not torch.equal(noised.noise, again.noise)


@pytest.mark.parametrize("options", FORMS)
def test_losses_do_not_depend_on_padding_or_on_the_split_into_micro_batches(options):
    model, objective = tiny(options), built(options)
    whole, parts = batch_of(6), [batch_of(2), batch_of(4, start=2)]

    def sums(*batches):
        found = {}
        for batch in batches:
            noised = objective.prepare(batch, draws_for(batch))
            for name, loss in objective.loss(model, noised).items():
                old = found.get(name, (0.0, 0.0))
                found[name] = (old[0] + float(loss.total.detach()), old[1] + float(loss.count))
        return {name: total / count for name, (total, count) in found.items()}

    def padded(batch):
        def wider(values, filler):
            return torch.cat([values, torch.full((len(values), 3), filler)], 1)

        fillers = {"input_ids": 10, "labels": IGNORE, "image_slots": -1, "documents": PADDING, "positions": 0}
        return replace(batch, **{name: wider(getattr(batch, name), filler) for name, filler in fillers.items()})

    model.eval()  # so that nothing is remembered
    assert sums(*parts) == pytest.approx(sums(whole), rel=1e-4)
    assert sums(padded(whole)) == pytest.approx(sums(whole), rel=1e-4)


def test_the_sums_of_diffuseq_are_what_their_names_say():
    batch, objective = batch_of(), built({"rounding": 0.5, "prior": 2.0})
    assert objective.coefficients == {"mse": 1.0, "rounding": 0.5, "prior": 2.0}
    model = tiny({})
    noised = objective.prepare(batch, draws_for(batch))
    x = model.space.vectors()[noised.targets]
    level = model.space.level(torch.tensor([1 / 2000, 1.0]), noised.places)
    clean = x + level.noise[0] * noised.start
    found = objective.loss(Spied(model, truth=clean), noised)
    assert set(found) == set(objective.coefficients)
    means = {name: float((loss.total / loss.count).detach()) for name, loss in found.items()}
    assert means["mse"] == pytest.approx(0, abs=1e-10)
    assert means["prior"] == pytest.approx(float((level.signal[1] * clean).detach().square().mean()), rel=1e-4)
    assert means["prior"] < 1e-6
    logits = -torch.cdist(clean, model.space.vectors()).square() / 2
    assert means["rounding"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, noised.targets).detach()), abs=1e-5
    )
    off = objective.loss(Spied(model, truth=clean + 0.5), noised)["mse"]
    assert float((off.total / off.count).detach()) == pytest.approx(0.25, rel=1e-4)


def test_at_the_first_time_of_the_chain_the_vector_itself_is_wanted():
    batch, objective, model = batch_of(), built({}), tiny({})
    noised = objective.prepare(batch, draws_for(batch))
    noised = replace(noised, time=torch.full_like(noised.time, 1 / 2000))
    x = model.space.vectors()[noised.targets]
    assert float(objective.loss(Spied(model, truth=x), noised)["mse"].total.detach()) == pytest.approx(0, abs=1e-6)


def test_a_flow_that_says_all_words_alike_scores_log_v():
    batch, objective = batch_of(), built({"form": "flow", "velocity": 0.1})
    assert objective.coefficients == {"tokens": 1.0, "velocity": 0.1}
    model = tiny({"form": "flow", "velocity": 0.1})
    noised = objective.prepare(batch, draws_for(batch))
    found = objective.loss(Spied(model, truth="alike"), noised)
    assert float((found["tokens"].total / found["tokens"].count).detach()) == pytest.approx(math.log(WORDS), rel=1e-5)
    vectors, t = model.space.vectors(), noised.time.flatten()[noised.rows]
    error = (vectors[noised.targets] - vectors.mean(0)).square().mean(-1) / t.clamp(min=0.05) ** 2
    assert float((found["velocity"].total / found["velocity"].count).detach()) == pytest.approx(
        float(error.mean().detach()), rel=1e-4
    )


def test_times_of_a_flow_are_logit_normal_or_even():
    batch = batch_of(64)
    t = built({"form": "flow"}).prepare(batch, draws_for(batch, total=64)).time[:, 0]
    logits = t.logit()
    assert float(logits.mean()) == pytest.approx(0.8, abs=0.1)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.1)
    even = built({"form": "flow", "time_std": 0.0}).prepare(batch, draws_for(batch, total=64)).time[:, 0]
    assert torch.allclose(even.sort().values.diff(), torch.tensor(1 / 64), atol=1e-4)


@pytest.mark.parametrize("form", ["diffuseq", "flow"])
def test_self_conditioning_shows_the_models_own_x_hat_to_some_and_zeros_to_the_others(form):
    options = {"form": form, "self_conditioning": 0.5}
    batch, objective = batch_of(32), built(options)
    model = tiny(options)
    torch.nn.init.normal_(model.space.condition_proj.weight, std=0.3)
    spy = Spied(model)
    noised = objective.prepare(batch, draws_for(batch, total=32))
    found = objective.loss(spy, noised)
    first, second = (call["latents"].flatten(0, 1)[noised.rows] for call in spy.calls)
    width = model.space.width
    assert (first[:, width:] == 0).all()
    assert torch.equal(first[:, :width], second[:, :width])
    assert (second[~noised.feedback, width:] == 0).all()
    assert (second[noised.feedback, width:] != 0).all()
    shown = noised.feedback.float().mean()
    assert 0.2 < float(shown) < 0.8
    torch.stack([loss.total for loss in found.values()]).sum().backward()
    assert float(model.space.condition_proj.weight.grad.abs().sum()) > 0
    never = built({**options, "self_conditioning": 0.0})
    spy.calls.clear()
    never.loss(spy, never.prepare(batch, draws_for(batch, total=32)))
    assert len(spy.calls) == 1


def test_what_is_fed_back_changes_nothing_before_it_is_learned():
    options = {"form": "flow"}
    model, objective, batch = tiny(options), built(options), batch_of()
    noised = objective.prepare(batch, draws_for(batch))
    with_it = objective.loss(model, replace(noised, feedback=torch.ones_like(noised.feedback)))["tokens"].total
    without = objective.loss(model, replace(noised, feedback=torch.zeros_like(noised.feedback)))["tokens"].total
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("options", FORMS)
def test_every_weight_has_a_gradient(options):
    """Those that a form does not use a zero one, as several processes ask."""
    model, batch = tiny({**options, "self_conditioning": 1.0}), batch_of()
    objective = built({**options, "self_conditioning": 1.0})
    losses = objective.loss(model, objective.prepare(batch, draws_for(batch)))
    torch.stack([objective.coefficients[name] * loss.total for name, loss in losses.items()]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_positions_are_counted_within_each_answer():
    ids = torch.zeros(1, 9, dtype=torch.int64)
    batch = batch_of(1, 9)
    labels = torch.tensor([[IGNORE, 5, 6, IGNORE, 7, IGNORE, 8, 9, IGNORE]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, PADDING]])
    batch = replace(batch, input_ids=ids, labels=labels, documents=documents)
    assert built({}).prepare(batch, draws_for(batch)).places.tolist() == [0, 1, 2, 0, 1]


def steps_of(model, objective, count, *, learn=True, start=0):
    weights = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(start, start + count):
        batch = batch_of(32)
        losses = objective.loss(model, objective.prepare(batch, draws_for(batch, step=step, total=32)))
        loss = sum(objective.coefficients[n] * one.total / one.count for n, one in losses.items())
        if learn:
            weights.zero_grad()
            loss.backward()
            weights.step()


def closest(model):
    vectors = model.space.vectors()[:10].detach()
    return float((torch.cdist(vectors, vectors) + 1e9 * torch.eye(10)).min() / math.sqrt(2 * model.space.width))


def test_vectors_stay_apart_while_they_are_learned():
    """Held to one length and anchored by rounding; by the regression alone they fall together."""
    for options in ({"form": "diffuseq", "width": 8}, {"form": "flow", "width": 8}):
        model = tiny(options)
        before = closest(model)
        steps_of(model, built(options), 40)
        assert torch.allclose(model.space.vectors().norm(dim=-1), torch.tensor(math.sqrt(8)))
        assert closest(model) > 0.7 * before
    alone = {"form": "diffuseq", "width": 8, "normalised": False, "rounding": 0.0}
    model = tiny(alone)
    before = closest(model)
    steps_of(model, built(alone), 40)
    assert closest(model) < 0.9 * before


def test_chains_are_refit_to_the_losses_of_their_positions_from_the_third_stride_on():
    options = {"adaptive": True, "stride": 2, "positions": 5, "bins": 10, "steps": 100, "width": 8}
    model, objective = tiny(options), built(options)
    chains = model.space.chains
    first = chains.log_snr.clone()
    steps_of(model, objective, 6, learn=False)
    assert torch.equal(chains.log_snr, first)
    assert float(chains.counts.sum()) == 50 + 6 * 32 * 5
    steps_of(model, objective, 1, start=6, learn=False)
    assert int(chains.refit_at) == 6
    assert not torch.equal(chains.log_snr, first)
    assert (chains.log_snr.diff(dim=0) <= 0).all(), "noise still grows with time"
    assert (chains.log_snr[:, 0] != chains.log_snr[:, 1]).any(), "each position has its own"
    assert float(chains.counts.sum()) == 50 + 32 * 5, "losses of the old chains are forgotten"
    model.eval()
    held = chains.counts.clone()
    steps_of(model, objective, 1, start=7, learn=False)
    assert torch.equal(chains.counts, held), "what is only measured is not remembered"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "plaid"}, "diffuseq, flow"),
        ({"form": "flow", "adaptive": True}, "adaptive"),
        ({"velocity": 0.1}, "velocity"),
        ({"reduction": "masked"}, "reduction"),
        ({"self_conditioning": 2.0}, "probability"),
        ({"schedule": "sqr"}, "sqrt"),
        ({"width": 0}, "width"),
        ({"adaptive": True, "bins": 33}, "bins=33"),
        ({"widht": 3}, "width"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(options)


def test_a_model_of_blocks_is_refused():
    with pytest.raises(ValueError, match=r"model\.visibility=full"):
        requirements("continuous", {}, "block:4")


def reversals(rows: int, start: int) -> Batch:
    """Six words, a separator, and the words from the last to the first."""
    words = torch.randint(12, 32, (rows, 6), generator=torch.Generator().manual_seed(start))
    ids = torch.cat([words, torch.full((rows, 1), 9), words.flip(1)], 1)
    labels = ids.clone()
    labels[:, :7] = IGNORE
    return Batch(
        input_ids=ids,
        labels=labels,
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids),
        positions=torch.arange(13).expand_as(ids),
        indices=torch.arange(start, start + rows),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "visibility", "steps"),
    [
        ({"form": "diffuseq"}, "full", 1500),
        ({"form": "diffuseq", "adaptive": True, "stride": 150, "positions": 6}, "prefix", 1000),
        ({"form": "flow"}, "prefix", 1000),
    ],
    ids=["diffuseq", "seqdiffuseq", "flow"],
)
def test_six_words_are_reversed(options, visibility, steps):
    """A minute each: more than 90 of 100 texts that were never seen, word for word."""
    options = {**options, "width": 16}
    shape = {"vocab_size": 32, "hidden_size": 64, "num_attention_heads": 4}
    model, objective = tiny(options, visibility, **shape).train(), built(options, visibility)
    weights = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in weights.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / steps)
        batch = reversals(64, 64 * step)
        losses = objective.loss(model, objective.prepare(batch, draws_for(batch, step=step, total=64)))
        loss = torch.stack([objective.coefficients[n] * one.total / one.count for n, one in losses.items()]).sum()
        weights.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        weights.step()
    held = reversals(200, 10**6)
    pipe = Pipeline(model)
    decode = {"max_new_tokens": 6, "eos_token_id": [], "generator": 0}
    for sampler, calls in (("ddpm", 16), ("ddim", 4)):
        out = pipe.generate(held.input_ids[:, :7], steps=calls, gaussian={"sampler": sampler}, **decode)
        exact = (out.sequences[:, 7:] == held.input_ids[:, 7:]).all(1).float().mean()
        assert float(exact) > 0.9, (sampler, float(exact))


RECORDED = load_file(Path(__file__).parents[1] / "golden" / "diffuseq" / "expected.safetensors")
"""From the authors' classes, on random numbers: DiffuSeq's chain, losses and steps, and SeqDiffuSeq's refit chains."""


def with_table(options):
    """A model with DiffuSeq's table, of the vectors as they are."""
    model = tiny({**options, "width": 6, "normalised": False}, vocab_size=9)
    with torch.no_grad():
        model.space.table.weight.copy_(RECORDED["table"])
    return model


def test_the_losses_of_diffuseq_are_the_authors():
    """Of three texts without a source, at the first time of the chain, in its midst and at its end."""
    options = {"width": 6, "normalised": False}
    model, objective = (
        with_table({}),
        build_objective("continuous", options, SpecialTokens(mask=0, eos=1, pad=1), "full"),
    )
    for row in range(3):
        batch = batch_of(1, 4, 0)
        batch = replace(batch, input_ids=RECORDED["ids"][row : row + 1], labels=RECORDED["ids"][row : row + 1])
        noised = objective.prepare(batch, draws_for(batch))
        time = torch.full_like(noised.time, float(RECORDED["t"][row] + 1) / 2000)
        noised = replace(noised, time=time, noise=RECORDED["noise"][row], start=RECORDED["start"][row])
        spy = Spied(model, truth=RECORDED["said"][row])
        for name, loss in objective.loss(spy, noised).items():
            torch.testing.assert_close((loss.total / loss.count).detach(), RECORDED[name][row], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(spy.calls[0]["latents"][0], RECORDED["z"][row], atol=1e-5, rtol=1e-4)


def test_the_steps_of_diffuseq_are_the_authors():
    now = Sqrt().level((RECORDED["t"][:, None] + 1.0) / 2000)
    then = Sqrt().level(RECORDED["t"][:, None] / 2000.0)
    given = RECORDED["z"], RECORDED["said"], now, then
    torch.testing.assert_close(ddpm(*given, torch.zeros(3, 4, 6)), RECORDED["mean"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ddim(*given), RECORDED["ddim"], atol=1e-5, rtol=1e-4)
    times = torch.arange(1, 2001, dtype=torch.float64) / 2000
    torch.testing.assert_close(Sqrt().alpha_bar(times), RECORDED["chain"], atol=0, rtol=1e-9)


def test_the_chains_of_seqdiffuseq_are_the_authors():
    """After three calls on 64 losses of four positions; theirs leave the first position, a begin token, as it was."""
    chains = tiny({"adaptive": True, "positions": 4, "steps": 200, "bins": 10}).space.chains
    torch.testing.assert_close(chains.log_snr.double().sigmoid(), RECORDED["seq.before"], atol=1e-6, rtol=1e-3)
    for steps, losses in zip(RECORDED["seq.steps"], RECORDED["seq.losses"], strict=True):
        t = ((steps + 1) / 200)[:, None].expand(-1, 4)
        chains.remember(t.flatten(), torch.arange(4).repeat(64), losses.flatten())
    chains.refit(3, 1)
    torch.testing.assert_close(
        chains.log_snr.double().sigmoid()[:, 1:], RECORDED["seq.after"][:, 1:], atol=1e-5, rtol=1e-3
    )
