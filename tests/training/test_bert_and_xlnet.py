"""One word of a recipe changed: masked language modelling with pairs, and every order of a text, trained and asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.pipeline import load
from dmllm.training import train
from dmllm.training.config import ObjectiveConfig, OptimiserConfig, SamplesConfig, ValidationConfig
from tests.training.test_loop import lines

LEARNED = {
    "mlm": (ObjectiveConfig(name="mlm", options={"mlm_probability": 0.7}), "full"),
    "pairs": (ObjectiveConfig(name="mlm", options={"next_sentence": True}), "full"),
    "permutation": (ObjectiveConfig(name="permutation"), "permutation"),
}


def of(recipe, ground, name: str, run: str = "run", *, pictures: bool = True, **overrides):
    """The recipe, that one word changed; answers are filled up with end tokens, of which every order then knows."""
    data = DataConfig(datasets=(DataSource(json_path=str(ground / "text.json")),))
    own = {} if pictures else {"data": data, "validation": ValidationConfig(data=data, num_examples=4, every=75)}
    config = recipe(run, objective=LEARNED[name][0], with_vision=pictures, **{**own, **overrides})
    return replace(config, model=replace(config.model, processor={"answer_lengths": [8], "turns": "one"}))


@pytest.mark.parametrize("pictures", [True, False], ids=["with pictures", "text alone"])
@pytest.mark.parametrize("name", ["mlm", "permutation"])
def test_a_run_learns_and_leaves_a_model_that_answers_ranks_and_fills_holes(recipe, ground, name, pictures):
    fast = OptimiserConfig(name="muon", lr=5e-3, muon_lr=0.02)
    steps = 250 if name == "mlm" else 150
    samples = SamplesConfig(every=steps, num_examples=1, decode={"max_new_tokens": 6})
    config = of(recipe, ground, name, pictures=pictures, steps=steps, batch_size=8, optimiser=fast, samples=samples)
    result = train(config)
    trained = [line["loss"] for line in lines(result, "loss")]
    assert sum(trained[-5:]) < 0.5 * sum(trained[:5])
    pipe = load(str(result.model), device="cpu")
    assert pipe.model.config.visibility == LEARNED[name][1]
    assert f"objective {name}" in (result.model / "README.md").read_text()
    rows = json.loads((ground / ("data.json" if pictures else "text.json")).read_text())[:4]
    turns = [[turn["value"].replace("<image>\n", "") for turn in row["conversations"][:2]] for row in rows]
    shown = [str(ground / "images" / row["image"]) if pictures else None for row in rows]
    questions, answers = ([turn[i] for turn in turns] for i in (0, 1))
    others = ["red", "green", "blue", "black"] if pictures else ["it is so", "is it so"]
    ranked = pipe.rank(questions, [others] * 4, shown, generator=0, num_samples=32)
    assert [best[0].text for best in ranked] == answers
    options = {"max_new_tokens": 8}
    replies = pipe.chat(questions, shown, **options)
    assert [reply.text for reply in replies] == answers
    for remasking in ("random", "sequential"):
        assert pipe.chat(questions[0], shown[0], remasking=remasking, generator=0, **options).text == answers[0]
    for row, reply in enumerate(replies):
        assert pipe.chat(questions[row], shown[row], **options) == reply, "a batch row equals the request alone"
    size = len(pipe.processor.tokenizer(answers[0], add_special_tokens=False).input_ids)
    assert pipe.infill(f"[MASK:{size}]", questions[0], shown[0]).text == answers[0]


def test_the_head_for_pairs_is_learned_saved_and_read(recipe, ground):
    result = train(of(recipe, ground, "pairs", steps=40, batch_size=8, optimiser=OptimiserConfig(lr=3e-3)))
    first, *_, last = lines(result, "loss")
    assert set(first) >= {"mlm", "next_sentence"}
    assert first["next_sentence"] == pytest.approx(0.693, abs=0.1)
    assert first["loss"] == pytest.approx(first["mlm"] + first["next_sentence"], abs=1e-4)
    assert last["loss"] < first["loss"]
    model = load(str(result.model), device="cpu").model
    assert model.config.heads == {"next_sentence": {}}
    said = model(torch.arange(8)[None], heads={"next_sentence": torch.tensor([0])}).heads["next_sentence"]
    assert said.shape == (1, 2)
    assert model.heads["next_sentence"].classifier.bias.abs().sum() > 0


@pytest.mark.parametrize("name", LEARNED)
def test_a_resumed_run_is_the_uninterrupted_one(recipe, ground, name):
    whole = train(of(recipe, ground, name, "whole", steps=6, save_every=3))
    config = of(recipe, ground, name, "part", steps=6, save_every=3)
    shutil.copytree(whole.folder / "checkpoints" / "step-00000003", config.output_dir + "/checkpoints/step-00000003")
    shutil.copy(whole.folder / "config.yaml", config.output_dir)
    part = train(config)
    assert [line["step"] for line in lines(part, "loss")] == [4, 6], "it goes on behind the third step"
    again = load(str(part.model), device="cpu").model.state_dict()
    for key, value in load(str(whole.model), device="cpu").model.state_dict().items():
        assert torch.equal(value, again[key]), key


def test_the_split_into_micro_batches_never_changes_what_orders_learn(recipe, ground):
    whole, parts = (
        train(of(recipe, ground, "permutation", f"size {size}", micro_batch_size=size, validation=None))
        for size in (4, 1)
    )
    for a, b in zip(lines(whole, "loss"), lines(parts, "loss"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_a_pair_needs_a_micro_batch_of_several(recipe, ground):
    with pytest.raises(ValueError, match="next_sentence takes other answers from the micro-batch"):
        train(of(recipe, ground, "pairs", micro_batch_size=1))
