"""Quality against calls: rules are asked the same questions, the cheapest good one is named, the curves are drawn."""

from __future__ import annotations

import json

import pytest

from benchmarks import batch, quality
from benchmarks.quality import SINGLE, Setting
from benchmarks.shape import Shape
from dmllm.samplers.config import decode_config


def row(rule: str, score: float, forwards: float) -> dict:
    return {"rule": rule, "score": score, "forwards": forwards}


def test_the_best_is_the_fewest_calls_within_a_point():
    rows = [row(SINGLE, 0.98, 30), row("a", 0.975, 9), row("b", 0.97, 3), row("c", 0.9, 1)]
    assert quality.best(rows)["rule"] == "b"
    assert quality.best(rows[:2] + rows[3:])["rule"] == "a"


def test_the_shipped_model_is_asked_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    some = [Setting(SINGLE, "", {"threshold": None, "steps": 32}), Setting("threshold", "0.9", {"threshold": 0.9})]
    monkeypatch.setattr(quality, "settings", lambda length: some)
    out, picture = tmp_path / "found.json", tmp_path / "curve.svg"
    options = ["--pictures", "3", "--rounds", "1", "--kinds", "count", "--out", str(out), "--picture", str(picture)]
    quality.main(options)
    found = json.loads(out.read_text())
    single, sure = found["rows"]
    assert single["forwards"] > 8 * sure["forwards"]
    assert single["score"] == sure["score"] == 1.0
    assert found["left_to_right"]["count"]["forwards"] == single["tokens"] == 2.0  # a number and the end
    said = capsys.readouterr().out
    assert "within 1 point of a token a call: threshold 0.9" in said
    assert picture.read_text().startswith("<?xml")


def test_every_setting_is_one_that_decoding_takes():
    rules = [setting for setting in quality.settings(32) if decode_config(setting.decode, {"threshold": 0.9})]
    assert {setting.rule for setting in rules} == {SINGLE, "tokens a call", "threshold", "entropy bound", "factor"}


def test_a_batch_of_mixed_lengths_answers_as_one_by_one(tmp_path, capsys, monkeypatch):
    toy = Shape(width=32, layers=2, heads=2, inner=48, vocabulary=160, prompt=16, tokens=8, block=4, per_call=2)
    monkeypatch.setattr(batch, "SHAPES", {"small": toy})
    out = tmp_path / "found.json"
    batch.main(["--shapes", "small", "--sizes", "1", "3", "--rounds", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["shapes"]["small"]["rows"]
    assert [(r["kept"], r["size"], r["same"]) for r in rows] == [(k, n, n) for k in batch.KEPT for n in (1, 3)]
    assert capsys.readouterr().out.count("3 of 3") == 3
