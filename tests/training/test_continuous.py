"""From a recipe to answers with one word changed: embedding diffusion in both forms, with pictures and without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dmllm.training.loop
from dmllm.config import save_config
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.pipeline import load
from dmllm.training import train
from dmllm.training.config import ObjectiveConfig, OptimiserConfig, SamplesConfig, ValidationConfig
from tests.training.test_loop import lines
from tests.training.test_processes import torchrun
from tests.training.test_resume import assert_same

OPTIONS = {
    "diffuseq": {"form": "diffuseq", "width": 16},
    "seqdiffuseq": {"form": "diffuseq", "width": 16, "adaptive": True, "stride": 2, "positions": 6, "steps": 200},
    "flow": {"form": "flow", "width": 16, "velocity": 0.1},
}


def asked(ground) -> tuple[list, list]:
    """Questions about the first pictures, as `chat` takes them."""
    rows = json.loads((ground / "data.json").read_text())[:3]
    return ["colour?", "number?", "what colour is it?"], [str(ground / "images" / row["image"]) for row in rows]


@pytest.mark.parametrize("form", list(OPTIONS))
@pytest.mark.parametrize("visibility", ["full", "prefix"])
def test_one_word_of_a_recipe_makes_a_model_of_vectors(recipe, ground, form, visibility):
    config = recipe(steps=8, batch_size=6, objective=ObjectiveConfig(name="continuous", options=OPTIONS[form]))
    config = replace(
        config,
        model=replace(config.model, visibility=visibility),
        samples=SamplesConfig(every=8, num_examples=1, decode={"max_new_tokens": 6, "steps": 2}),
    )
    result = train(config)
    said = lines(result, "loss")[-1]
    assert ({"tokens", "velocity"} if form == "flow" else {"mse", "rounding", "prior"}) <= set(said)
    pipe = load(str(result.model), device="cpu")
    assert (pipe.model.config.process, pipe.model.config.visibility) == ("gaussian", visibility)
    texts, pictures = asked(ground)
    decode = {"max_new_tokens": 6, "steps": 3, "eos_token_id": []}
    replies = pipe.chat(texts, pictures, generator=3, **decode)
    assert all(reply.num_forwards == 3 for reply in replies)
    alone = pipe.chat(texts[1], pictures[1], generator=torch.Generator().manual_seed(4), **decode)
    both = pipe.chat(texts[:2], pictures[:2], generator=[torch.Generator().manual_seed(s) for s in (9, 4)], **decode)
    assert alone.text == both[1].text
    for sampler in ("ddpm", "ddim"):
        pipe.chat(texts, pictures, generator=3, gaussian={"sampler": sampler, "clamp": True}, **decode)
    other = pipe.chat(texts, pictures, generator=4, **decode)
    assert [reply.text for reply in other] != [reply.text for reply in replies], "noise is where it begins"


@pytest.mark.parametrize("form", ["diffuseq", "flow"])
def test_what_is_learned_is_said(recipe, ground, form):
    """Text alone: one sentence, learned by heart, on the canvas that is asked for."""
    data = DataConfig(datasets=(DataSource(json_path=str(ground / "text.json")),))
    config = recipe(
        steps=300,
        batch_size=8,
        with_vision=False,
        data=data,
        validation=ValidationConfig(data=data, every=100, num_examples=4),
        optimiser=OptimiserConfig(lr=1e-2),
        objective=ObjectiveConfig(name="continuous", options={"form": form, "width": 8}),
    )
    result = train(replace(config, model=replace(config.model, processor={"answer_lengths": [12]})))
    trained = lines(result, "loss")
    assert trained[-1]["loss"] < 0.5 * trained[0]["loss"]
    pipe = load(str(result.model), device="cpu")
    replies = pipe.chat(["say it"] * 4, generator=0, max_new_tokens=12, steps=8)
    assert [reply.text for reply in replies] == ["it is so"] * 4
    with pytest.raises(ValueError, match="process='gaussian'"):
        pipe.score([[5, 6]], [[7]], num_samples=2)
    with pytest.raises(ValueError, match="process='gaussian'"):
        pipe.rank("say it", ["it is so", "no"])
    with pytest.raises(ValueError, match="threshold"):
        pipe.chat("say it", threshold=0.9)
    with pytest.raises(ValueError, match="choices"):
        pipe.chat("say it", choices=["yes", "no"])
    with pytest.raises(ValueError, match="not blocks"):
        pipe.chat("say it", visibility="block:4")


def test_a_run_that_breaks_continues_to_the_same_bits_with_its_chains(recipe, monkeypatch):
    """Refit before the break and after it: losses remembered and noise levels are in the checkpoint."""
    calls, real = [], dmllm.training.loop.training_step

    def breaking(*arguments):
        calls.append(arguments)
        if len(calls) == 8:
            raise ConnectionError("broken")
        return real(*arguments)

    objective = ObjectiveConfig(name="continuous", options=OPTIONS["seqdiffuseq"])
    config = recipe("broken", steps=10, save_every=3, objective=objective)
    monkeypatch.setattr(dmllm.training.loop, "training_step", breaking)
    with pytest.raises(ConnectionError):
        train(config)
    resumed, whole = train(config), train(replace(config, output_dir=config.output_dir + "-whole"))
    assert_same(resumed, whole)
    saved = load_file(whole.model / "model.safetensors")
    assert int(saved["heads.latent.chains.refit_at"]) == 8
    chains = load(str(whole.model), device="cpu").model.space.chains
    assert torch.equal(chains.log_snr, saved["heads.latent.chains.log_snr"])
    assert (chains.log_snr[:, 0] != chains.log_snr[:, 1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffuseq", "flow"])
def test_two_processes_equal_one(recipe, tmp_path, form):
    objective = ObjectiveConfig(name="continuous", options={**OPTIONS[form], "self_conditioning": 0.5})
    config = recipe("two", micro_batch_size=1, objective=objective)
    save_config(config, tmp_path / "recipe.yaml")
    done = torchrun("train.py", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    one = train(recipe("one", objective=objective))
    a, b = (load_file(Path(folder) / "model" / "model.safetensors") for folder in (config.output_dir, one.folder))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


def test_guidance_at_zero_is_the_identity_and_what_is_given_is_kept(recipe):
    config = recipe(steps=4, objective=ObjectiveConfig(name="continuous", options={"form": "flow", "width": 8}))
    pipe = load(str(train(config).model), device="cpu")
    ids = [[5, 6, 7], [8, 9, 10]]
    mask = pipe.special.mask
    options = {"max_new_tokens": 5, "steps": 3, "generator": 0, "eos_token_id": []}
    plain = pipe.generate(ids, **options)
    assert torch.equal(plain.sequences, pipe.generate(ids, cfg_scale=0.0, **options).sequences)
    assert torch.equal(plain.sequences, pipe.generate(ids, cfg_scale=1e-7, **options).sequences), "by twice the work"
    assert not torch.equal(plain.sequences, pipe.generate(ids, cfg_scale=5.0, **options).sequences)
    draft = torch.tensor([[mask, 12, mask, 13, mask]] * 2)
    found = pipe.generate(ids, draft=draft, **options)
    assert torch.equal(found.sequences[:, :3], torch.tensor(ids)), "the prompt"
    for step in found.trajectory:
        assert torch.equal(step.ids[:, [1, 3]], draft[:, [1, 3]])
        assert (step.ids != mask).all()
