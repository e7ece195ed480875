"""No step holds logits of rows that it was not asked for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import memory
from benchmarks.shape import Shape, write
from benchmarks.watch import Largest, peak_bytes
from dmllm.pipeline import load

TOY = Shape(width=32, layers=2, heads=2, inner=48, vocabulary=2048, prompt=37, tokens=16, block=8, per_call=4)


@pytest.fixture(scope="module")
def found():
    return {row["what"]: row for row in memory.measure(TOY, 3)["rows"]}


def test_a_training_step_projects_the_hidden_tokens_and_no_others(found):
    row = found["training step, batch of 3"]
    assert 0 < row["rows"] == row["asked"] < 3 * TOY.tokens
    assert row["fed"] == 3 * (TOY.prompt + TOY.tokens)


@pytest.mark.parametrize("kept", ["no cache", "prefix cache", "dual cache", "prefix once", "block-causal"])
def test_a_decoding_step_projects_its_block_and_no_more(found, kept):
    row = found[f"decoding, {kept}"]
    # logits; then, for the choice, two float32 copies of a few of these rows at a time
    assert TOY.block <= row["rows"] <= 2 * TOY.block < row["fed"]
    assert row["peak_bytes"] < row["all_rows_bytes"]


def test_all_rows_are_seen_where_all_are_asked_for(tmp_path):
    pipeline = load(str(write(TOY, tmp_path / "model")), device="cpu")
    with Largest(TOY.vocabulary) as largest:
        pipeline.logits(TOY.ids())
    assert largest.rows == TOY.prompt
    assert largest.bytes >= TOY.prompt * TOY.vocabulary * 4


def test_the_peak_is_what_is_held_at_once():
    def work() -> None:
        for _ in range(3):
            torch.empty(1 << 20)
        kept = [torch.empty(1 << 18), torch.empty(1 << 18)]
        del kept

    assert 4 << 20 <= peak_bytes(work) < 5 << 20


def test_a_run_prints_a_table_and_writes_it_down(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "LARGE", replace(TOY, prompt=9))
    memory.main(["--vocabulary", "512", "--out", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    said = capsys.readouterr().out
    assert all(row["what"] in said for row in rows)
    assert len(rows) == 6
