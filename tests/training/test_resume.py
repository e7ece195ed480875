"""A run that is killed, stopped or changed, and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dmllm.training.loop
from dmllm.config import save_config
from dmllm.training import train
from dmllm.training.config import OptimiserConfig, ScheduleConfig, ValidationConfig
from dmllm.training.state import newest_checkpoint

TRAIN = Path(__file__).parents[2] / "train.py"
MUON = OptimiserConfig(name="muon", lr=3e-3)


def state(result):
    return load_file(newest_checkpoint(result.folder) / "state.safetensors")


def assert_same(a, b):
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    model, other = load_file(a.model / "model.safetensors"), load_file(b.model / "model.safetensors")
    assert all(torch.equal(model[name], other[name]) for name in model)


def test_a_killed_run_ends_with_the_weights_of_one_never_stopped(recipe, tmp_path):
    config = recipe("killed", steps=40, save_every=5, log_every=1, ema=0.9, optimiser=MUON)
    save_config(config, tmp_path / "recipe.yaml")
    command = [sys.executable, str(TRAIN), str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    metrics = Path(config.output_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 12):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    at = newest_checkpoint(Path(config.output_dir))
    assert at is not None
    assert at.name < "step-00000040", "the run ended before it was killed"
    resumed, whole = train(config), train(replace(config, output_dir=str(tmp_path / "whole")))
    assert_same(resumed, whole)
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, 41))


@pytest.mark.parametrize("moment", ["training_step", "validation_loss", "save_model", "save_checkpoint"])
def test_wherever_a_run_breaks_it_continues_to_the_same_bits(recipe, monkeypatch, moment):
    calls, real = [], getattr(dmllm.training.loop, moment)

    def breaking(*arguments):
        calls.append(moment)
        if len(calls) == 2:
            raise ConnectionError("broken")
        return real(*arguments)

    config = recipe("broken", validation=ValidationConfig(data=recipe().data, num_examples=4, every=3), save_every=3)
    monkeypatch.setattr(dmllm.training.loop, moment, breaking)
    with pytest.raises(ConnectionError):
        train(config)
    assert_same(train(config), train(replace(config, output_dir=config.output_dir + "-whole")))


def test_a_half_written_checkpoint_is_never_read_and_is_cleared_away(recipe):
    config = recipe()
    folder = Path(config.output_dir)
    first = train(config)
    left = folder / "checkpoints" / ".writing-step-00000099"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    again = train(config)
    assert again.step == first.step
    assert not left.exists()
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stopping_saves_and_says_how_to_continue(recipe, monkeypatch, caplog):
    real = dmllm.training.loop.training_step

    def interrupting(run, batches, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, batches, step)

    monkeypatch.setattr(dmllm.training.loop, "training_step", interrupting)
    config = recipe("stopped")
    with caplog.at_level("INFO", "dmllm.training"):
        result = train(config)
    assert (result.step, result.model) == (3, None)
    assert "the same command continues from" in caplog.text
    monkeypatch.setattr(dmllm.training.loop, "training_step", real)
    assert_same(train(config), train(replace(config, output_dir=config.output_dir + "-whole")))


def test_another_configuration_is_refused_and_the_differing_keys_are_named(recipe):
    train(recipe(steps=2))
    with pytest.raises(
        ValueError, match=r"seed: 0 there, 1 now; steps: 2 there, 3 now.*--output_dir=.*--resume=changed"
    ):
        train(recipe(steps=3, seed=1))


def test_what_cannot_change_the_weights_may_change(recipe):
    train(recipe(steps=2))
    train(recipe(steps=2, num_workers=1, log_every=1, micro_batch_size=2, keep=1))


def test_a_finished_run_can_be_made_longer(recipe):
    constant = {"schedule": ScheduleConfig(name="constant", warmup=0), "optimiser": MUON}
    train(recipe("short", steps=4, **constant))
    longer = train(recipe("short", steps=8, resume="changed", **constant))
    whole = train(recipe("whole", steps=8, **constant))
    assert_same(longer, whole)


def test_starting_over_keeps_the_old_folder(recipe):
    first = train(recipe(steps=2))
    kept = (first.model / "model.safetensors").read_bytes()
    again = train(recipe(steps=3, resume="never"))
    assert again.step == 3
    assert (again.folder.with_name("run-1") / "model" / "model.safetensors").read_bytes() == kept


def test_a_checkpoint_of_another_model_is_refused(recipe):
    train(recipe("text", with_vision=False, text_only_rows=True, steps=1, **_text_only(recipe)))
    shutil.copytree(recipe("text").output_dir + "/checkpoints", recipe("other").output_dir + "/checkpoints")
    with pytest.raises(ValueError, match="it belongs to another model"):
        train(recipe("other"))


def _text_only(recipe):
    data = recipe(text_only_rows=True).data
    text = replace(data, datasets=data.datasets[1:])
    return {"data": text, "validation": None}
