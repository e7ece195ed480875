"""Blocks that change while training: warm-up, stable, decay; what is saved decodes in blocks as long as the last."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dmllm.checkpoints.compose import ModelSpec, compose
from dmllm.checkpoints.folder import decode_defaults
from dmllm.checkpoints.tokenizer import train_tokenizer
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.objectives import build_objective, requirements
from dmllm.objectives.draws import Draws
from dmllm.pipeline import load
from dmllm.training import TrainConfig, train
from dmllm.training.assemble import adapt
from dmllm.training.config import ObjectiveConfig, OptimiserConfig, ValidationConfig
from dmllm.types import IGNORE, Batch, SpecialTokens

SPECIAL = SpecialTokens(mask=11, eos=10, pad=10)
STAGES = [[0, 1], [0.25, 4], [0.5, None], [0.75, 3]]


def batch() -> Batch:
    ids = torch.randint(0, 10, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = IGNORE
    positions = torch.arange(12).expand_as(ids)
    zeros = torch.zeros_like(ids)
    return Batch(
        input_ids=ids,
        labels=labels,
        image_slots=zeros - 1,
        documents=zeros,
        positions=positions,
        indices=torch.arange(3),
    )


def draws(step: int, num_steps: int | None = 8) -> Draws:
    return Draws(seed=0, step=step, num_examples=3, indices=torch.arange(3), num_steps=num_steps)


def same(one, other) -> bool:
    mine, theirs = (
        [*vars(n.batch).values(), *vars(n.visibility).values(), n.rows, n.targets, n.weights, n.counts["masked"]]
        for n in (one, other)
    )
    pairs = zip(mine, theirs, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b for a, b in pairs)


@pytest.mark.parametrize("stages", [STAGES, [[0, 1], [2, 4], [4, None], [6, 3]]])
@pytest.mark.parametrize("options", [{}, {"times": "document", "complementary": True, "min_noise": 0.3}])
def test_each_step_is_that_of_a_run_with_blocks_as_long_as_they_then_are(stages, options):
    scheduled = build_objective("block", {"block_schedule": stages, **options}, SPECIAL, "block:3")
    for step, length in enumerate((1, 1, 4, 4, None, None, 3, 3)):
        name, visibility = ("masked", "full") if length is None else ("block", f"block:{length}")
        own = {key: value for key, value in options.items() if key != "times" or name == "block"}
        alone = build_objective(name, own, SPECIAL, visibility)
        assert same(scheduled.prepare(batch(), draws(step)), alone.prepare(batch(), draws(step)))
        assert not same(scheduled.prepare(batch(), draws(step)), scheduled.prepare(batch(), draws((step + 2) % 8)))


def test_where_nothing_is_trained_blocks_are_those_of_the_end():
    scheduled = build_objective("block", {"block_schedule": STAGES}, SPECIAL, "block:3")
    last = build_objective("block", {}, SPECIAL, "block:3")
    assert same(scheduled.prepare(batch(), draws(0, None)), last.prepare(batch(), draws(0, None)))


def test_the_model_gets_the_visibility_of_the_end():
    for visibility in ("causal", "full", "block:32"):
        assert requirements("block", {"block_schedule": STAGES}, visibility)["visibility"] == "block:3"
        assert requirements("block", {"block_schedule": STAGES[:3]}, visibility)["visibility"] == "full"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([[0.1, 4]], "the first stage begins at 0"),
        ([[0, 4], [0.5, 8], [0.2, 4]], "the first stage begins at 0"),
        ([[0, 4], [0.5, 8], [100, 4]], "later ones at later steps, or all of them at fractions"),
        ([[0, 4], [0.5, 0]], "blocks of 0; give whole numbers"),
        ([[0, "full"]], "blocks of 'full'"),
    ],
)
def test_schedules_that_cannot_be_are_refused(stages, said):
    with pytest.raises(ValueError, match=said):
        build_objective("block", {"block_schedule": stages}, SPECIAL, "block:4")


def test_a_run_goes_through_all_stages_and_may_be_stopped_in_any(tmp_path, monkeypatch):
    said = [("human", "how much?"), ("gpt", "one and two is three")]
    rows = [{"id": str(n), "conversations": [{"from": who, "value": what} for who, what in said]} for n in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = DataConfig(datasets=(DataSource(json_path=str(tmp_path / "data.json")),))
    tokenizer = train_tokenizer([tmp_path / "data.json"], vocab_size=300, out=tmp_path / "tokenizer")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelSpec(backbone=shape, tokenizer=str(tokenizer), shift=True),
        data=data,
        validation=ValidationConfig(data=data, num_examples=4, every=2),
        objective=ObjectiveConfig(name="block", options={"block_schedule": STAGES}),
        optimiser=OptimiserConfig(lr=3e-3),
        steps=8,
        batch_size=4,
        save_every=1,
        log_every=1,
    )
    calls, real = [], train.__globals__["save_checkpoint"]

    def killed_now_and_then(*arguments):
        written = real(*arguments)
        calls.append(written)
        if len(calls) in (1, 3, 5):
            raise KeyboardInterrupt
        return written

    monkeypatch.setitem(train.__globals__, "save_checkpoint", killed_now_and_then)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(config)
    resumed = train(config)
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    weights = [load_file(result.folder / "model" / "model.safetensors") for result in (resumed, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert resumed.best_loss == whole.best_loss
    pipeline = load(str(whole.folder / "model"))
    assert pipeline.model.config.visibility == "block:3"
    assert pipeline.chat("how much?", max_new_tokens=6).num_forwards >= 2


def test_a_checkpoint_no_longer_decodes_in_the_blocks_that_it_had(tmp_path):
    text = tmp_path / "data.json"
    text.write_text(json.dumps([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]))
    tokenizer = train_tokenizer([text], vocab_size=300, out=tmp_path / "tokenizer")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for generation in ({}, {"block_length": 4}):
        spec = ModelSpec(backbone=shape, tokenizer=str(tokenizer), visibility="block:4", generation={"block_length": 4})
        model, _ = compose(spec)
        adapt(model, requirements("block", {"block_schedule": STAGES}, "block:4"), generation)
        assert model.config.visibility == "block:3"
        assert decode_defaults(model) == generation
