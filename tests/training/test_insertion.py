"""From a recipe to answers of any length with one word changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import dmllm.training.loop
from dmllm.checkpoints.tokenizer import train_tokenizer
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.pipeline import load
from dmllm.training import train
from dmllm.training.config import ObjectiveConfig, OptimiserConfig, SamplesConfig, ValidationConfig
from tests.training.test_loop import assert_close, lines, weights
from tests.training.test_resume import assert_same

GROWING = ObjectiveConfig(name="insertion", options={"spans": 0.3})
MUON = OptimiserConfig(name="muon", lr=5e-3, muon_lr=0.02)


@pytest.mark.parametrize("with_vision", [True, False], ids=["with pictures", "text alone"])
def test_one_word_of_a_recipe_makes_a_model_that_inserts(recipe, ground, with_vision):
    data = None if with_vision else DataConfig(datasets=(DataSource(json_path=str(ground / "text.json")),))
    config = recipe(
        steps=60,
        batch_size=8,
        with_vision=with_vision,
        optimiser=MUON,
        objective=GROWING,
        validation=ValidationConfig(data=data or recipe().data, every=30, num_examples=4),
        samples=SamplesConfig(every=60, num_examples=1, decode={"max_new_tokens": 8, "steps": 4}),
        **({} if with_vision else {"data": data}),
    )
    result = train(config)
    trained = lines(result, "loss")
    assert {"masked", "insertion"} <= set(trained[0])
    for name in ("masked", "insertion"):
        assert sum(line[name] for line in trained[-5:]) < 0.6 * sum(line[name] for line in trained[:5])
    pipe = load(str(result.model), device="cpu")
    assert (pipe.model.config.process, pipe.model.config.heads) == ("insertion", {"insertion": {}})
    assert "objective insertion" in (result.model / "README.md").read_text()
    picture = str(ground / "images" / "0.png") if with_vision else None
    options = {"max_new_tokens": 24, "steps": 6}
    reply = pipe.chat("colour?" if with_vision else "say it", picture, **options)
    assert reply.num_forwards == 6
    assert pipe.chat("colour?" if with_vision else "say it", picture, **options) == reply
    assert pipe.infill("it [MASK:*] so", "say it", picture, **options).text.startswith("it ")


def test_the_split_into_micro_batches_never_changes_the_result(recipe):
    whole = train(recipe("whole", text_only_rows=True, objective=GROWING))
    parts = train(recipe("parts", text_only_rows=True, objective=GROWING, micro_batch_size=1))
    assert_close(weights(whole.model), weights(parts.model))


def test_a_run_that_is_stopped_ends_with_the_weights_of_one_never_stopped(recipe, tmp_path, monkeypatch):
    config = recipe("stopped", steps=8, save_every=4, objective=GROWING)
    step, seen = dmllm.training.loop.training_step, []

    def failing(*given):
        seen.append(1)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(dmllm.training.loop, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert_same(train(config), train(replace(config, output_dir=str(tmp_path / "whole"))))


def test_a_model_need_not_be_told_the_time(recipe):
    objective = ObjectiveConfig(name="insertion", options={"time_conditioning": False, "reduction": "answer_length"})
    pipe = load(str(train(recipe(objective=objective, validation=None)).model), device="cpu")
    assert not any("time" in name for name in pipe.model.state_dict())
    assert pipe.chat("colour?", max_new_tokens=8, steps=3).num_forwards == 3


def test_a_model_that_sees_blocks_or_prefixes_is_refused(recipe):
    config = recipe(objective=ObjectiveConfig(name="insertion"))
    with pytest.raises(ValueError, match=r"model\.visibility=full"):
        train(replace(config, model=replace(config.model, visibility="prefix")))


@pytest.mark.slow
def test_lengths_that_depend_on_the_question_are_learned(recipe, tmp_path):
    questions = ["one", "two", "three", "four", "five", "six"]
    rows = []
    for n, question in enumerate(questions, 1):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "abcdef"[:n]}]
        rows.append({"id": str(n), "conversations": turns})
    (tmp_path / "numbers.json").write_text(json.dumps(rows))
    train_tokenizer([tmp_path / "numbers.json"], vocab_size=263, out=tmp_path / "letters")
    data = DataConfig(datasets=(DataSource(json_path=str(tmp_path / "numbers.json")),))
    config = recipe(with_vision=False)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = replace(config.model, backbone=shape, tokenizer=str(tmp_path / "letters"))
    options = {"steps": 1500, "batch_size": 16, "save_every": 1500, "log_every": 100, "validation": None}
    config = recipe(
        "lengths", model=model, data=data, optimiser=MUON, objective=ObjectiveConfig(name="insertion"), **options
    )
    pipe = load(str(train(config).model), device="cpu")
    replies = pipe.chat(questions * 20, max_new_tokens=10, steps=32, temperature=1.0, remasking="origin", generator=0)
    off = [abs(len(reply.text) - n % 6 - 1) for n, reply in enumerate(replies)]
    assert off.count(0) > 0.7 * len(off), off.count(0)
    assert sum(off) < 0.4 * len(off), "of six lengths, the same for all would be off by 1.5"
    assert sum(reply.text == "abcdef"[: n % 6 + 1] for n, reply in enumerate(replies)) > 0.4 * len(replies)
    greedy = pipe.chat(questions, max_new_tokens=10, steps=32)
    assert sum(len(reply.text) == n for n, reply in enumerate(greedy, 1)) >= 4
