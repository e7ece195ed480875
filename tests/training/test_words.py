"""From a recipe to answers with one word changed: random words, hybrid noise and scores, with pictures and without."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import dmllm.training.loop
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.pipeline import load
from dmllm.training import train
from dmllm.training.config import ObjectiveConfig, OptimiserConfig, SamplesConfig, ValidationConfig
from tests.training.test_loop import lines
from tests.training.test_resume import assert_same

OPTIONS = {
    "udlm": ("uniform", {"self_conditioning": 0.5}),
    "gidd": ("uniform", {"noise": "hybrid", "bound": "gidd", "p_uniform": 0.2, "weight": "dynamic"}),
    "d3pm": ("uniform", {"bound": "d3pm", "steps": 50, "cross_entropy": 0.01}),
    "plain": ("uniform", {"bound": "none", "parameterisation": "posterior"}),
    "hybrid": ("uniform", {"noise": "hybrid", "bound": "gidd", "parameterisation": "posterior"}),
    "words": ("uniform", {"parameterisation": "posterior", "self_conditioning": 0.5}),
    "sedd": ("score_entropy", {}),
    "sedd_words": ("score_entropy", {"noise": "uniform"}),
}


def asked(ground) -> tuple[list, list]:
    """Questions about the first pictures, as `chat` takes them."""
    rows = json.loads((ground / "data.json").read_text())[:3]
    return ["colour?", "number?", "what colour is it?"], [str(ground / "images" / row["image"]) for row in rows]


@pytest.mark.parametrize("form", [form for form in OPTIONS if form not in ("hybrid", "words")])
@pytest.mark.parametrize("visibility", ["full", "block:4"])
def test_one_word_of_a_recipe_makes_a_model_of_random_words(recipe, ground, form, visibility):
    name, options = OPTIONS[form]
    config = recipe(steps=4, batch_size=6, objective=ObjectiveConfig(name=name, options=options))
    config = replace(
        config,
        model=replace(config.model, visibility=visibility),
        samples=SamplesConfig(every=4, num_examples=1, decode={"max_new_tokens": 8, "steps": 4}),
    )
    result = train(config)
    assert math.isfinite(lines(result, "loss")[-1]["loss"])
    pipe = load(str(result.model), device="cpu")
    own = pipe.model.config
    words = form != "sedd"
    assert (own.process, own.visibility) == ("uniform" if words else "absorbing", visibility)
    assert bool(own.backbone.get("time_conditioning")) == words
    assert pipe.model.takes_feedback == (form == "udlm")
    texts, pictures = asked(ground)
    ways = [{}, {"temperature": 1.0}]
    if words:
        ways += [{"uniform": {"sampler": "entropy_bound"}, "temperature": 0.7}, {"uniform": {"sampler": "ancestral"}}]
    for way in ways:
        decode = {"max_new_tokens": 8, "steps": 4, "eos_token_id": [], **way}
        replies = pipe.chat(texts, pictures, generator=3, **decode)
        assert all(reply.num_forwards <= 3 * 4 for reply in replies)
        draws = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]
        (alone,) = pipe.chat(texts[1:2], pictures[1:2], generator=draws(4), **decode)
        both = pipe.chat(texts[:2], pictures[:2], generator=draws(9, 4), **decode)
        assert alone.text == both[1].text


@pytest.mark.parametrize("form", ["words", "hybrid", "sedd"])
def test_what_is_learned_is_said(recipe, ground, form):
    """Text alone: one sentence, learned by heart."""
    data = DataConfig(datasets=(DataSource(json_path=str(ground / "text.json")),))
    name, options = OPTIONS[form]
    config = recipe(
        steps=300,
        batch_size=8,
        with_vision=False,
        data=data,
        validation=ValidationConfig(data=data, every=300, num_examples=4),
        optimiser=OptimiserConfig(lr=1e-2),
        objective=ObjectiveConfig(name=name, options=options),
    )
    result = train(config)
    pipe = load(str(result.model), device="cpu")
    for way in ({}, {"temperature": 1.0, "steps": 30}):
        replies = pipe.chat(["say it"] * 4, generator=0, max_new_tokens=9, **way)
        assert [reply.text for reply in replies] == ["it is so"] * 4
    prompt = pipe.processor.prompt([{"role": "user", "content": [{"type": "text", "text": "say it"}]}]).input_ids
    right = [pipe.processor.tokenizer.encode("it is so", add_special_tokens=False)]
    wrong = [right[0][::-1]]
    found = [float(pipe.score([prompt.tolist()], ids, num_samples=64, generator=0)) for ids in (right, wrong)]
    assert found[0] > found[1] + 5
    if form == "hybrid":
        draft = torch.full((1, 8), pipe.special.mask)
        draft[0, : len(right[0]) - 2] = torch.tensor(right[0][:-2])
        filled = pipe.generate([prompt.tolist()], draft=draft, max_new_tokens=8, generator=1).sequences
        assert filled[0, len(prompt) :].tolist()[: len(right[0])] == right[0]


def test_a_run_that_breaks_continues_to_the_same_bits(recipe, monkeypatch):
    calls, real = [], dmllm.training.loop.training_step

    def breaking(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise ConnectionError("broken")
        return real(*arguments)

    name, options = OPTIONS["udlm"]
    config = recipe("broken", steps=8, save_every=3, objective=ObjectiveConfig(name=name, options=options))
    monkeypatch.setattr(dmllm.training.loop, "training_step", breaking)
    with pytest.raises(ConnectionError):
        train(config)
    resumed, whole = train(config), train(replace(config, output_dir=config.output_dir + "-whole"))
    assert_same(resumed, whole)
