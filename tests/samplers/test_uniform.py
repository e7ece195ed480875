"""Undoing random words, against a model that knows every conditional of what noise has made of a text."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.diffusion.uniform import Noise, NoiseConfig, build_noise
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.samplers.uniform import uniform
from dmllm.types import Step, Vocabulary
from tests.exact import Joint, assert_drawn_from, chi_square, generators, quantile, total_variation
from tests.samplers.test_blocks import make, prompts, seeds
from tests.test_as_on_a_gpu import act

WORDS = MASK = 3
VOCABULARY = Vocabulary(mask=MASK, eos=9, pad=9, size=4)
NOISES = [{}, {"schedule": "cosine"}, {"noise": "hybrid", "p_uniform": 0.3}]


class Knows:
    """p(x_0 | x_t) or its leave-one-out form, or scores, exactly, at the time that it is told."""

    def __init__(self, joint: Joint, noise: Noise, which: str = "leave_one_out"):
        self.joint, self.noise, self.which = joint, noise, which
        self.seen: list[Canvas] = []

    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        self.seen.append(canvas)
        level = self.noise.at(canvas.time.double())
        there = canvas.ids[..., None] == torch.arange(self.joint.vocab)
        flat = level.noise(canvas.ids, MASK)[..., None] if canvas.ids.ndim == 1 else torch.where(
            canvas.ids == MASK, level.masked[:, None], level.uniform[:, None]
        )[..., None]  # fmt: skip
        chance = flat + level.alpha[:, None, None] * there
        found = self.joint.restored(chance.clamp(min=1e-300), leave_one_out=self.which != "posterior")
        if self.which == "score":
            found = level.alpha[:, None, None] * found + level.uniform[:, None, None]
            found = found / found.gather(-1, canvas.ids[..., None].clamp(max=WORDS - 1))
        logits = F.pad(found.log(), (0, 1), value=5.0)  # it would love to say the mask
        return logits.gather(1, rows[..., None].expand(-1, -1, 4)).float()


def fill(predict: Any, options: dict[str, Any], batch: int, length: int, canvas: Canvas | None = None, **config: Any):
    canvas = Canvas.blank(batch, length, MASK) if canvas is None else canvas
    settings = DecodeConfig(max_new_tokens=length, **config)
    process = uniform(VOCABULARY, **options)
    steps: list[Step] = list(denoise(predict, canvas, settings, generators(*range(batch)), process=process))
    return steps


def model_of(joint: Joint, options: dict[str, Any], which: str = "leave_one_out") -> Knows:
    return Knows(joint, build_noise(NoiseConfig(**options), WORDS), which)


DRAW = {"sampler": "ancestral", "last": "draw"}


@pytest.mark.parametrize("options", NOISES, ids=str)
@pytest.mark.parametrize("kappa", [1.0, 0.5, 0.0])
def test_one_token_is_drawn_exactly_in_any_number_of_steps(options: dict[str, Any], kappa: float) -> None:
    joint = Joint(vocab=WORDS, length=1)
    for steps in (1, 3):
        how = {**DRAW, "kappa": kappa}
        last = fill(model_of(joint, options), options, 3000, 1, steps=steps, temperature=1.0, uniform=how)[-1]
        assert_drawn_from(joint, last.ids)


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_many_steps_with_exact_predictions_draw_from_the_data_distribution(options: dict[str, Any]) -> None:
    joint = Joint(vocab=WORDS, length=3)
    last = fill(model_of(joint, options), options, 2500, 3, steps=60, temperature=1.0, uniform=DRAW)[-1]
    assert_drawn_from(joint, last.ids)


def test_few_steps_do_not_and_more_do_better() -> None:
    """The factorisation error is real: the test above can fail."""
    joint = Joint(vocab=WORDS, length=3)
    off = []
    for steps in (1, 4, 16):
        last = fill(model_of(joint, {}), {}, 2500, 3, steps=steps, temperature=1.0, uniform=DRAW)[-1]
        off.append(total_variation(joint.counts(last.ids) / 2500, joint.probs))
    assert off[0] > off[1] > off[2]


def test_redrawing_corrects_what_few_steps_got_wrong() -> None:
    joint = Joint(vocab=WORDS, length=3)
    found = {}
    for kappa in (1.0, 0.0):
        how = {**DRAW, "kappa": kappa}
        last = fill(model_of(joint, {}), {}, 2500, 3, steps=8, temperature=1.0, uniform=how)[-1]
        found[kappa] = chi_square(joint, last.ids)
    assert found[1.0] > quantile(26)
    assert found[0.0] != found[1.0]


@pytest.mark.parametrize("which", ["posterior", "score"])
def test_whatever_the_model_says_it_is_converted(which: str) -> None:
    joint, options = Joint(vocab=WORDS, length=3), {"parameterisation": which}
    last = fill(model_of(joint, options, which), options, 2500, 3, steps=60, temperature=1.0, uniform=DRAW)[-1]
    assert_drawn_from(joint, last.ids)


def test_without_the_conversion_what_is_drawn_is_something_else() -> None:
    joint = Joint(vocab=WORDS, length=3)
    last = fill(model_of(joint, {}, "posterior"), {}, 2500, 3, steps=60, temperature=1.0, uniform=DRAW)[-1]
    assert chi_square(joint, last.ids) > 2 * quantile(26)


@pytest.mark.parametrize("options", NOISES, ids=str)
@pytest.mark.parametrize("kappa", [1.0, 0.3])
def test_a_step_leads_from_the_marginal_of_one_time_to_that_of_the_next(options: dict[str, Any], kappa: float) -> None:
    joint = Joint(vocab=WORDS, length=1)
    seen = model_of(joint, options)
    how = {**DRAW, "kappa": kappa}
    fill(seen, options, 6000, 1, steps=4, temperature=1.0, uniform=how)
    shares = [1 - float(seen.noise.at(c.time[:1]).alpha) for c in seen.seen]
    assert shares == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-5)
    for canvas in seen.seen:
        level = seen.noise.at(canvas.time[:1])
        expected = torch.cat([joint.probs * level.alpha + level.uniform, level.masked]) * 6000
        drawn = torch.bincount(canvas.ids.flatten(), minlength=4).double()
        possible = expected > 0
        assert not drawn[~possible].any()
        assert float(((drawn - expected) ** 2 / expected)[possible].sum()) < quantile(max(int(possible.sum()) - 1, 1))


SETTINGS = [
    {"uniform": {"sampler": "ancestral"}, "temperature": 1.0, "steps": 6},
    {"uniform": {"sampler": "ancestral", "kappa": 0.7, "corrections": 5}, "temperature": 0.0, "steps": 6},
    {"uniform": {"sampler": "entropy_bound", "bound": 0.5}, "temperature": 0.8, "steps": 8},
    {"uniform": {"sampler": "entropy_bound"}, "steps": 8},
    {"uniform": {"sampler": "commit"}, "temperature": 1.0, "remasking": "entropy", "steps": 3},
    {"threshold": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("options", NOISES[::2], ids=str)
def test_what_is_given_stays_the_mask_is_never_said_and_a_row_is_what_it_is_alone(settings, options) -> None:
    joint = Joint(vocab=WORDS, length=6, seed=3)
    given = torch.tensor([[MASK, 1, MASK, MASK, 2, MASK]] * 4)
    given[3, 1] = MASK
    canvas = Canvas.of(given, given != MASK, MASK)
    process = uniform(VOCABULARY, **options)
    config = DecodeConfig(max_new_tokens=6, **settings)
    steps = list(denoise(model_of(joint, options), canvas, config, generators(*range(4)), process=process))
    last = steps[-1]
    assert last.committed.all()
    assert last.finished.all()
    assert bool((last.ids != MASK).all())
    for step in steps:
        assert torch.equal(step.ids[canvas.committed], given[canvas.committed])
    for row in range(4):
        alone = replace(canvas.take(torch.tensor([row])), requests=torch.tensor([0]))
        own = list(denoise(model_of(joint, options), alone, config, generators(row), process=process))[-1]
        assert torch.equal(own.ids[0], last.ids[row])
        assert int(own.num_forwards) == int(last.num_forwards[row])


def test_a_full_canvas_takes_no_call() -> None:
    ids = torch.tensor([[0, 1, 2]])
    full = Canvas.of(ids, ids >= 0, MASK)
    for sampler in ("ancestral", "commit", "entropy_bound"):
        seen = model_of(Joint(), {})
        (step,) = fill(seen, {}, 1, 3, canvas=full, uniform={"sampler": sampler})
        assert torch.equal(step.ids, ids)
        assert not seen.seen


def test_at_temperature_zero_the_surest_are_committed_and_noise_stands_for_the_rest() -> None:
    joint = Joint(vocab=WORDS, length=6, seed=3)
    seen = model_of(joint, {})
    steps = fill(seen, {}, 3, 6)
    assert [s.committed.sum(1).tolist() for s in steps] == [[n] * 3 for n in range(1, 7)]
    for step, canvas in zip(steps[:-1], seen.seen[1:], strict=True):
        assert bool((canvas.ids != MASK).all())
        assert torch.equal(canvas.ids[step.committed], step.ids[step.committed])
        assert bool((step.ids[~step.committed] == MASK).all())
    assert [round(float(c.time[0]), 4) for c in seen.seen] == [round(1 - n / 6, 4) for n in range(6)]
    best = joint.texts[joint.probs.argmax()]
    assert joint.probs[(joint.texts == steps[-1].ids[0]).all(1)] > 0.1 * joint.probs.max(), best


def test_the_entropy_bound_ends_once_nothing_changes() -> None:
    probs = torch.full((27,), 1e-6, dtype=torch.float64)
    probs[14] = 1
    joint = Joint(vocab=WORDS, length=3, probs=probs / probs.sum())
    how = {"sampler": "entropy_bound"}
    steps = fill(model_of(joint, {}), {}, 5, 3, steps=20, temperature=0.5, uniform=how)
    assert len(steps) == 2  # the second call finds what the first did
    assert torch.equal(steps[-1].ids, joint.texts[14].expand(5, -1))


def test_self_correction_puts_right_one_token_a_call_until_nothing_changes() -> None:
    probs = torch.full((81,), 1e-6, dtype=torch.float64)
    probs[40] = 1  # 1 1 1 1
    joint = Joint(vocab=WORDS, length=4, probs=probs / probs.sum())
    wrong = torch.tensor([[0, 1, 2, 0]])

    class Fails(Knows):
        """It says what is not so until the last call, and then corrects itself."""

        def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
            if len(self.seen) < 2:
                self.seen.append(canvas)
                return 30.0 * F.one_hot(wrong, 4).float().gather(1, rows[..., None].expand(-1, -1, 4))
            return super().__call__(canvas, rows)

    predict = Fails(joint, build_noise(NoiseConfig(), WORDS))
    how = {"sampler": "ancestral", "corrections": 10, "correction_temperature": 0.0}
    steps = fill(predict, {}, 1, 4, steps=2, uniform=how)
    texts = [step.ids[0].tolist() for step in steps[1:]]
    assert texts[0] == [0, 1, 2, 0]
    changes = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(texts)]
    assert changes == [1, 1, 1, 0]
    assert texts[-1] == [1, 1, 1, 1]
    assert [round(float(c.time[0]), 2) for c in predict.seen[2:]] == [0.01] * 4


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_the_likelihood_is_the_datas_on_average(options: dict[str, Any]) -> None:
    joint = Joint(vocab=WORDS, length=2, sharpness=0.7)
    process = uniform(VOCABULARY, **options)
    predict = model_of(joint, options)
    found = [
        process.log_likelihood(predict, text, torch.Generator().manual_seed(i), 3000, 1000)
        for i, text in enumerate(joint.texts)
    ]
    mean = -float((torch.stack(found) * joint.probs).sum())
    assert mean == pytest.approx(joint.entropy, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uniform": {"sampler": "ancestrl"}}, "ancestral"),
        ({"uniform": {"kapa": 0.5}}, "kappa"),
        ({"uniform": {"kappa": 2}}, "between 0"),
        ({"uniform": {"last": "never"}}, "argmax, draw"),
        ({"uniform": {"corrections": -1}}, "whole number"),
        ({"uniform": {"sampler": "ancestral"}, "threshold": 0.9}, "threshold=0.9"),
        ({"uniform": {"sampler": "ancestral"}, "block_length": 2}, "block_length=2"),
        ({"uniform": {"sampler": "entropy_bound"}, "remasking": "entropy"}, "commit"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(model_of(Joint(), {}), {}, 1, 3, **settings)


def pipeline_of(visibility: str, options: dict[str, Any]) -> Any:
    """A random model that undoes random words and hears what it has said."""
    pipe = make(visibility=visibility)
    heads = {"self_conditioning": {}}
    pipe.model.adapt(process="uniform", process_options=options, time_conditioning=True, heads=heads)
    for name, weight in pipe.model.named_parameters():
        if weight.ndim > 1 and ("time" in name or "conditioning" in name):
            torch.nn.init.normal_(weight, std=0.3)
    return pipe


WAYS = [
    {"temperature": 0.8, "uniform": {"kappa": 0.6}},
    {"temperature": 0.8, "cfg_scale": 0.5},
    {"temperature": 0.6, "uniform": {"sampler": "entropy_bound", "bound": 2.0}},
    {"threshold": 0.3, "temperature": 0.7},
]


@pytest.mark.parametrize("visibility", ["full", "prefix", "block:4"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_row_is_what_it_is_alone_also_as_on_a_gpu(visibility: str, way: dict[str, Any], monkeypatch: Any) -> None:
    pipe = pipeline_of(visibility, {"noise": "hybrid", "parameterisation": "posterior"})
    steps = {"block_steps": 4} if visibility == "block:4" else {"steps": 6}
    (ids, mask), settings = prompts(), {"max_new_tokens": 9, **steps, **way}
    whole = pipe.generate(ids, mask, generator=seeds(), **settings)
    for row in (0, 3):
        own = ids[row : row + 1, : int(mask[row].sum())]
        alone = pipe.generate(own, generator=seeds()[row : row + 1], **settings)
        assert torch.equal(alone.sequences[0, own.shape[1] :], whole.sequences[row, ids.shape[1] :])
        assert int(alone.num_forwards) == int(whole.num_forwards[row])
    if "cfg_scale" not in way:
        again = pipe.generate(ids, mask, generator=seeds(), use_cache=False, **settings)
        assert torch.equal(again.sequences, whole.sequences)
    act(monkeypatch)
    late = pipe.generate(ids, mask, generator=seeds(), **settings)
    assert torch.equal(late.sequences, whole.sequences)
    assert torch.equal(late.num_forwards, whole.num_forwards)


def test_what_was_said_is_heard() -> None:
    pipe = pipeline_of("full", {})
    (ids, mask), settings = prompts(), {"max_new_tokens": 9, "steps": 6, "temperature": 0.8}
    heard = pipe.generate(ids, mask, generator=seeds(), **settings).sequences
    torch.nn.init.zeros_(pipe.model.heads["self_conditioning"].proj.weight)
    assert not torch.equal(pipe.generate(ids, mask, generator=seeds(), **settings).sequences, heard)
    del pipe.model.heads["self_conditioning"]
    deaf = pipe.generate(ids, mask, generator=seeds(), **settings).sequences
    pipe = pipeline_of("full", {})
    torch.nn.init.zeros_(pipe.model.heads["self_conditioning"].proj.weight)
    assert torch.equal(pipe.generate(ids, mask, generator=seeds(), **settings).sequences, deaf)
