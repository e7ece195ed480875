"""Training one process: what a run leaves behind, and what never changes its result."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dmllm.checkpoints import folder
from dmllm.checkpoints.compose import ModelSpec
from dmllm.config import load_config
from dmllm.training import TrainConfig, train
from dmllm.training.config import (
    ObjectiveConfig,
    OptimiserConfig,
    PartConfig,
    PartsConfig,
    SamplesConfig,
    ScheduleConfig,
    ValidationConfig,
)


def weights(path):
    return load_file(path / "model.safetensors")


def lines(result, key):
    read = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if key in line]


def assert_close(a, b, atol=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_learns_and_leaves_a_model_that_answers(recipe):
    config = recipe(
        steps=120,
        batch_size=8,
        optimiser=OptimiserConfig(name="muon", lr=5e-3, muon_lr=0.02),
        samples=SamplesConfig(every=60, num_examples=2, decode={"max_new_tokens": 4}),
        validation=ValidationConfig(data=recipe().data, every=40, num_examples=12),
        save_every=60,
        keep=1,
    )
    result = train(config)
    assert result.step == 120
    trained = [line["loss"] for line in lines(result, "loss")]
    assert sum(trained[-5:]) < 0.5 * sum(trained[:5])
    validated = [line["validation_loss"] for line in lines(result, "validation_loss")]
    assert result.best_loss == pytest.approx(min(validated), rel=1e-5)
    assert [p.name for p in (result.folder / "checkpoints").iterdir()] == ["step-00000120"]
    assert load_config(TrainConfig, result.folder / "config.yaml") == config
    assert (result.folder / "loss.png").stat().st_size > 1000
    samples = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [60, 60, 120, 120]
    assert set(samples[0]) == {"step", "question", "answer", "truth"}
    assert folder.load(result.model).processor is not None
    assert folder.load(result.folder / "best").processor is not None


def test_a_model_that_denoises_in_blocks_learns_by_the_block_objective_and_answers_in_blocks(recipe):
    config = recipe(
        steps=120,
        batch_size=8,
        optimiser=OptimiserConfig(name="muon", lr=5e-3, muon_lr=0.02),
        validation=ValidationConfig(data=recipe().data, every=60, num_examples=12),
        samples=SamplesConfig(every=120, num_examples=1, decode={"max_new_tokens": 8}),
    )
    result = train(replace(config, model=replace(config.model, visibility="block:4")))
    trained = [line["loss"] for line in lines(result, "loss")]
    assert sum(trained[-5:]) < 0.5 * sum(trained[:5])
    assert "objective block" in (result.model / "README.md").read_text()
    assert folder.load(result.model).model.config.visibility == "block:4"
    with pytest.raises(ValueError, match="objective masked learns under visibility full or prefix"):
        train(replace(config, output_dir=config.output_dir + "2", objective=ObjectiveConfig(name="masked"),
                      model=replace(config.model, visibility="block:4")))  # fmt: skip


def test_decode_defaults_go_into_the_model_that_is_written_and_into_what_is_trained_from_it(recipe):
    first = recipe("first", steps=2, validation=None)
    first = replace(first, model=replace(first.model, generation={"max_new_tokens": 12, "threshold": 0.9}))
    written = train(first).model
    second = replace(recipe("second", steps=2, validation=None), model=ModelSpec(checkpoint=str(written)))
    for model in (written, train(second).model):
        assert folder.load(model).generation == {"max_new_tokens": 12, "threshold": 0.9}


def test_the_split_into_micro_batches_never_changes_the_result(recipe):
    whole = train(recipe("whole", text_only_rows=True))
    parts = train(recipe("parts", text_only_rows=True, micro_batch_size=1))
    assert_close(weights(whole.model), weights(parts.model))
    for a, b in zip(lines(whole, "loss"), lines(parts, "loss"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert whole.best_loss == pytest.approx(parts.best_loss, abs=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_ones(recipe):
    first, second, other = (train(recipe(name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all(
        torch.equal(a, b) for a, b in zip(weights(first.model).values(), weights(second.model).values(), strict=True)
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(first.model).values(), weights(other.model).values(), strict=True)
    )


def test_reader_processes_change_nothing(recipe):
    without, with_two = train(recipe("none")), train(recipe("two", num_workers=2))
    assert_close(weights(without.model), weights(with_two.model), atol=0)


def test_frozen_parts_stay_as_they_were_and_the_others_move(recipe):
    parts = PartsConfig(vision=PartConfig(learn=False), backbone=PartConfig(learn=False))
    start = train(recipe("start", steps=1, optimiser=OptimiserConfig(lr=0.0)))
    stage = train(recipe("stage", parts=parts))
    before, after = weights(start.model), weights(stage.model)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"projector"}


def test_a_projector_stage_from_a_half_precision_checkpoint_leaves_the_rest_to_the_bit(recipe):
    first = train(recipe("first", steps=1, save_dtype="bfloat16"))
    parts = PartsConfig(vision=PartConfig(learn=False), backbone=PartConfig(learn=False))
    config = recipe("stage", parts=parts, precision="bf16", steps=4, ema=0.5, save_every=2)
    stage = train(replace(config, model=ModelSpec(checkpoint=str(first.model))))
    before, after = weights(first.model), weights(stage.model)
    for name in before:
        same = torch.equal(before[name].float(), after[name].float())
        assert same != name.startswith("projector."), name
        assert after[name].dtype == (torch.float32 if name.startswith("projector.") else torch.bfloat16)


def test_the_moving_average_is_what_is_validated_and_saved(recipe):
    plain = train(recipe("plain", schedule=ScheduleConfig(name="constant", warmup=0)))
    averaged = train(recipe("averaged", ema=0.5, schedule=ScheduleConfig(name="constant", warmup=0)))
    state = load_file(averaged.folder / "checkpoints" / "step-00000008" / "state.safetensors")
    raw = load_file(plain.folder / "checkpoints" / "step-00000008" / "state.safetensors")
    saved = weights(averaged.model)
    name = "backbone.layers.0.mlp.up_proj.weight"
    assert torch.equal(state[f"model/{name}"], raw[f"model/{name}"])
    assert torch.equal(saved[name], state[f"ema/{name}"])
    assert not torch.equal(saved[name], state[f"model/{name}"])
    assert plain.best_loss != averaged.best_loss


def test_validation_does_not_depend_on_how_it_is_split_and_a_part_of_a_batch_counts_alone(recipe):
    config = recipe("a", steps=1, validation=ValidationConfig(data=recipe().data, num_examples=5, every=1))
    config = replace(config, objective=ObjectiveConfig(options={"reduction": "batch_length"}))
    losses = [
        train(replace(config, output_dir=config.output_dir + str(size), micro_batch_size=size)).best_loss
        for size in (1, 2, 4)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"pad_to_multiple": 16}])
def test_what_saves_memory_or_time_changes_little(recipe, options):
    plain, other = train(recipe("plain")), train(recipe("other", **options))
    tolerance = 0.05 if "precision" in options else 1e-5
    assert other.best_loss == pytest.approx(plain.best_loss, abs=tolerance)
    assert all(w.dtype == torch.float32 for w in weights(other.model).values())


@pytest.mark.slow
def test_compiled_blocks_give_the_same_result(recipe):
    plain, compiled = train(recipe("plain")), train(recipe("compiled", compile=True))
    assert_close(weights(plain.model), weights(compiled.model), atol=1e-4)


def test_the_saved_weights_have_the_precision_asked_for(recipe):
    result = train(recipe(steps=1, save_dtype="bfloat16"))
    assert all(w.dtype == torch.bfloat16 for w in weights(result.model).values())


def test_epochs_are_passes_over_the_data(recipe):
    assert train(recipe(steps=None, epochs=1.5)).step == math.ceil(1.5 * 12 / 4)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_checkpoint_of_it(recipe):
    with pytest.raises(FloatingPointError, match=r"try a lower --optimiser.lr"):
        train(recipe(optimiser=OptimiserConfig(lr=1e30), clip_norm=0, steps=20))


def test_a_tracker_that_is_not_there_is_refused_with_what_to_type(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'wandb'"):
        train(recipe(trackers=["wandb"]))
    with pytest.raises(ValueError, match="not one of tensorboard, trackio, wandb"):
        train(recipe(trackers=["nothing"]))


def test_a_tracker_that_is_there_gets_the_metrics(recipe):
    pytest.importorskip("tensorboard")
    result = train(recipe(trackers=["tensorboard"], steps=2))
    assert list(result.folder.rglob("events.out.tfevents*"))
