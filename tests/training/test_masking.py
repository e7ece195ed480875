"""Runs with every option of masked and block at once, on pictures and text: split, resumed, saved, asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dmllm.training.loop
from dmllm.pipeline import load
from dmllm.training import train
from dmllm.training.config import ObjectiveConfig

COMMON = {"confidence": 2.0, "confidence_temperature": 0.5, "complementary": True, "anneal_steps": 0.75}
RUNS = [
    ("masked", "full", {**COMMON, "noise_block": 2, "min_noise": 0.5, "max_noise": 0.5, "weight": "none"}),
    ("masked", "prefix", {**COMMON, "noise_block": 4, "reduction": "answer_length", "at_least_one": True}),
    ("block", "block:4", {**COMMON, "block_schedule": [[0, 1], [0.25, 2], [0.5, None], [0.75, 4]]}),
]


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def config(recipe, request):
    name, visibility, options = request.param
    config = recipe(text_only_rows=True, save_every=2)
    model = replace(config.model, visibility="full" if name == "block" else visibility)
    return replace(config, model=model, objective=ObjectiveConfig(name=name, options=options))


def weights(result):
    assert result.model is not None
    return load_file(result.model / "model.safetensors")


def test_split_and_resumed_it_is_the_same_run(config, tmp_path, monkeypatch):
    whole = train(config)
    parts = train(replace(config, output_dir=str(tmp_path / "parts"), micro_batch_size=1))
    for name, value in weights(parts).items():
        torch.testing.assert_close(value, weights(whole)[name], atol=2e-4, rtol=1e-3)
    assert parts.best_loss == pytest.approx(whole.best_loss, abs=1e-4)

    real = dmllm.training.loop.save_checkpoint

    def killed_after_saving(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    again = replace(config, output_dir=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        patch.setattr(dmllm.training.loop, "save_checkpoint", killed_after_saving)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                train(again)
    resumed = weights(train(again))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in resumed.items())


def test_what_it_leaves_answers_about_pictures_and_text_alone_or_in_a_batch(config, ground):
    pipeline = load(str(train(replace(config, steps=2, validation=None)).model))
    kept = {"masked": config.model.visibility, "block": "block:4"}
    assert pipeline.model.config.visibility == kept[config.objective.name]
    asked, pictures = ["colour?", "say it"], [str(ground / "images" / "0.png"), []]
    together = pipeline.chat(asked, images=pictures, max_new_tokens=8)
    alone = [pipeline.chat(text, images=own, max_new_tokens=8) for text, own in zip(asked, pictures, strict=True)]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
