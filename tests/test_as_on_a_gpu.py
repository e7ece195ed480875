"""Infilling and ranking as on a GPU, where no shape depends on data, acted out on a CPU: the same texts and numbers."""

from __future__ import annotations

import pytest

import dmllm.samplers.absorbing
import dmllm.samplers.ahead
import dmllm.samplers.denoise
import dmllm.samplers.stream
from tests.samplers.test_ahead import Late, Replayed
from tests.test_pipeline import make, picture
from tests.test_scoring import bare, values

TEXTS = ["A [MASK:1..3] is left of the [MASK:2].", "[MASK:4]", "a[MASK]b [MASK:2..3]"]


def act(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmllm.samplers.stream, "is_static", lambda device: True)
    monkeypatch.setattr(dmllm.samplers.denoise, "is_static", lambda device: True)
    monkeypatch.setattr(dmllm.samplers.absorbing, "is_static", lambda device: True)
    monkeypatch.setattr(dmllm.samplers.stream, "Graphed", Replayed)
    monkeypatch.setattr(dmllm.samplers.ahead, "Flag", Late)


@pytest.mark.parametrize("kind", ["full", "prefix", "permutation"])
def test_holes_are_filled_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, pictures = make(kind), [picture(0), None, [picture(1), picture(2)]]
    options = {"temperature": 0.7, "block_length": 4, "cfg_scale": 0.3, "num_samples": 4}

    def fill() -> list:
        return pipeline.infill(TEXTS, ["what?", None, "and now?"], pictures, generator=3, **options)

    plain = fill()
    act(monkeypatch)
    assert [(one.text, one.num_forwards) for one in fill()] == [(one.text, one.num_forwards) for one in plain]


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("kind", ["full", "prefix", "causal", "block:1", "block:4", "permutation"])
def test_answers_are_scored_alike(kind: str, shift: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, answer = bare(kind, shift), [7, 8, 9, 10, 11, 12, 13]
    plain = values(pipe, answer, count=32)
    act(monkeypatch)
    assert values(pipe, answer, count=32) == pytest.approx(plain, abs=1e-3)
