"""From a recipe to answers with one word changed: next-token prediction, its heads, and what transformers computes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

import dmllm.training.loop
from dmllm.checkpoints.compose import ModelSpec
from dmllm.data.collate import collate
from dmllm.data.mixture import DataConfig, load_mixture
from dmllm.data.sources import DataSource
from dmllm.evaluation.config import SuiteConfig, TaskConfig
from dmllm.evaluation.runner import evaluate
from dmllm.pipeline import load
from dmllm.training import train
from dmllm.training.config import ObjectiveConfig, OptimiserConfig, SamplesConfig, ValidationConfig
from tests.checkpoints.conftest import language_model
from tests.training.test_loop import lines
from tests.training.test_resume import assert_same

GREEDY = {"max_new_tokens": 8}


def asked(ground, pipe) -> list:
    """Questions about the first pictures, as `chat` takes them: texts, pictures and answers."""
    rows = json.loads((ground / "data.json").read_text())[:4]
    shown = [str(ground / "images" / row["image"]) if pipe.model.vision else None for row in rows]
    return [["colour?"] * 4, shown, [row["conversations"][1]["value"] for row in rows]]


@pytest.mark.parametrize("with_vision", [True, False], ids=["with pictures", "text alone"])
def test_one_word_of_a_recipe_makes_a_model_of_the_next_token(recipe, ground, tmp_path, with_vision):
    data = None if with_vision else DataConfig(datasets=(DataSource(json_path=str(ground / "text.json")),))
    config = recipe(
        steps=80,
        batch_size=8,
        with_vision=with_vision,
        optimiser=OptimiserConfig(name="muon", lr=5e-3, muon_lr=0.02),
        objective=ObjectiveConfig(name="autoregressive", options={"mtp": 3}),
        validation=ValidationConfig(data=data or recipe().data, every=40, num_examples=4),
        samples=SamplesConfig(every=80, num_examples=1, decode={"max_new_tokens": 6, "steps": 2}),
        **({} if with_vision else {"data": data}),
    )
    result = train(config)
    trained = lines(result, "loss")
    assert {"next_token", "ahead_1", "ahead_2"} <= set(trained[0])
    assert sum(line["loss"] for line in trained[-5:]) < 0.5 * sum(line["loss"] for line in trained[:5])
    pipe = load(str(result.model), device="cpu")
    assert (pipe.model.config.visibility, pipe.model.config.shift) == ("causal", True)
    assert "objective autoregressive" in (result.model / "README.md").read_text()
    texts, pictures, answers = asked(ground, pipe) if with_vision else (["say it"], [None], ["it is so"])
    plain, drafted = (pipe.chat(texts, pictures, speculate=drafts, **GREEDY) for drafts in (0, 2))
    assert [reply.text for reply in plain] == [reply.text for reply in drafted]
    calls = [sum(reply.num_forwards for reply in replies) for replies in (drafted, plain)]
    assert calls[0] <= calls[1] if with_vision else calls[0] < calls[1], "a colour is one token and the end"
    for text, picture, answer in zip(texts, pictures, answers, strict=True):
        best = pipe.rank(text, [answer, "nothing of the kind"], picture)[0]
        assert best.text == answer
        assert best.standard_error == 0
    task = TaskConfig(name="colours", data=str(ground / ("data.json" if with_vision else "text.json")))
    suite = SuiteConfig(tasks=[task], decode={"max_new_tokens": 8, "steps": 4}, batch_size=5)
    if with_vision:
        suite = replace(suite, tasks=[replace(task, image_folder=str(ground / "images"))])
    scores = evaluate(pipe, suite, tmp_path / "scores", model_name="tiny").scores("colours")
    assert scores["count"] == (24 if with_vision else 4)
    if not with_vision:
        assert scores["value"] == 1


def test_a_run_that_breaks_continues_to_the_same_bits(recipe, monkeypatch):
    calls, real = [], dmllm.training.loop.training_step

    def breaking(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise ConnectionError("broken")
        return real(*arguments)

    config = recipe(
        "broken", validation=None, save_every=3, objective=ObjectiveConfig(name="autoregressive", options={"mtp": 2})
    )
    monkeypatch.setattr(dmllm.training.loop, "training_step", breaking)
    with pytest.raises(ConnectionError):
        train(config)
    assert_same(train(config), train(replace(config, output_dir=config.output_dir + "-whole")))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_causal_checkpoint_has_the_loss_and_the_texts_of_transformers(tmp_path, recipe, ground, kind):
    """Trained at a learning rate of zero, it stays what it was; the rows of new tokens are copied into the original."""
    original = language_model(tmp_path / kind, ground / "tokenizer", kind)
    data = DataConfig(datasets=(DataSource(json_path=str(ground / "text.json")),))
    config = recipe(
        model=ModelSpec(backbone=str(tmp_path / kind)),
        data=data,
        validation=None,
        steps=1,
        batch_size=4,
        log_every=1,
        optimiser=OptimiserConfig(lr=0.0),
        objective=ObjectiveConfig(name="autoregressive"),
    )
    result = train(config)
    pipe = load(str(result.model), device="cpu")
    own = pipe.model.backbone.state_dict()
    new = {f"model.{name}": own[name] for name in ("embed_tokens.weight",)} | {"lm_head.weight": own["lm_head.weight"]}
    moved = [int((original.state_dict()[name] != value).any(1).sum()) for name, value in new.items()]
    assert max(moved) <= 24, "the rows of the tokens that it did not have"
    original.load_state_dict(new, strict=False)
    mixture = load_mixture(data, seed=0)
    records = [mixture.record(number, record) for _, number, record in itertools.islice(mixture.order(), 4)]
    batch = collate([pipe.processor.example(r, generator=torch.Generator()) for r in records], pipe.special)
    with torch.no_grad():
        expected = original(batch.input_ids, attention_mask=(batch.documents >= 0).long(), labels=batch.labels).loss
    assert lines(result, "loss")[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    ids = torch.randint(0, 250, (3, 7), generator=torch.Generator().manual_seed(0))
    told = {"max_new_tokens": 16, "do_sample": False, "suppress_tokens": [pipe.special.mask], "eos_token_id": None}
    theirs = original.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **told)
    ours = pipe.generate(ids, max_new_tokens=16, eos_token_id=[])
    assert torch.equal(ours.sequences, theirs)
    short = pipe.generate(ids, [[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5], max_new_tokens=16, eos_token_id=[])
    for row, count in enumerate((7, 4, 2)):
        alone = original.generate(ids[row : row + 1, :count], pad_token_id=0, **told)
        assert torch.equal(short.sequences[row, 7:], alone[0, count:])
