"""Tokens that are opened again: what is known at each time, and what the others say of a token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.samplers.revoke import masked_again
from dmllm.types import Step
from tests.samplers.table import NoiseModel, TableModel, generators

PROCESS: dict[str, Any] = {"schedule": "time", "remasking": "origin", "temperature": 1.0}


def fill(model, config: DecodeConfig, batch: int, length: int) -> list[Step]:
    return list(denoise(model, Canvas.blank(batch, length, model.mask), config, generators(*range(batch))))


def taken_back(steps: list[Step]) -> int:
    return sum(int((a.committed & ~b.committed).sum()) for a, b in pairwise(steps))


@pytest.mark.parametrize("options", [{"remdm": "cap", "eta": 0.2}, {"remdm": "rescale", "eta": 0.7}, {}], ids=str)
def test_at_every_time_as_much_is_known_as_without_masking_again(options: dict) -> None:
    """ReMDM's theorem: each token by itself is known at time s with probability alpha = 1 - s."""
    model, rows = TableModel(vocab=2, length=4), 2000
    steps = fill(model, DecodeConfig(steps=6, **PROCESS, **options), rows, 4)
    assert len(steps) == 6
    for step, time in zip(steps[:-1], torch.linspace(1, 1e-3, 7)[1:].tolist(), strict=False):
        alpha = 1 - time
        spread = (alpha * (1 - alpha) / rows) ** 0.5
        assert (step.committed.double().mean(0) - alpha).abs().max() < 4.5 * spread
        pairs = (step.committed[:, 0] & step.committed[:, 2]).double().mean()  # independently of one another
        assert abs(float(pairs) - alpha**2) < 4.5 * (alpha**2 * (1 - alpha**2) / rows) ** 0.5
    assert (taken_back(steps) > 500) == bool(options)


def test_by_confidence_the_less_probable_tokens_are_masked_again_more_often() -> None:
    config, rows = DecodeConfig(steps=10, **PROCESS, remdm="conf"), 20000
    canvas = Canvas.blank(rows, 4, 9)
    canvas = replace(
        canvas.commit(torch.arange(4).expand(rows, -1), canvas.ids * 0, canvas.ids > 0), block=canvas.calls
    )
    probable = torch.tensor([[1.0, 0.5, 0.1, 0.1]])
    canvas = replace(canvas, confidence=probable.expand(rows, -1), calls=canvas.calls + 6)
    draws = torch.rand(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = masked_again(canvas, config, 4, draws).double().mean(0)
    times = torch.linspace(1, 1e-3, 11)
    expected = times[7] / (1 - times[6]) * (-probable[0]).softmax(-1)
    torch.testing.assert_close(share, expected.double(), atol=0.01, rtol=0)
    assert not masked_again(replace(canvas, calls=canvas.calls + 3), config, 4, draws * 0).any()


def test_nothing_is_masked_again_where_eta_is_0() -> None:
    some, none = (fill(NoiseModel(), DecodeConfig(steps=6, **PROCESS, remdm="cap", eta=e), 4, 12) for e in (0.5, 0.0))
    plain = fill(NoiseModel(), DecodeConfig(steps=6, **PROCESS), 4, 12)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(none, plain, strict=True))
    assert taken_back(some) > 0


def agreeing() -> TableModel:
    """Of six tokens the first four are the same, almost always; the others are a toss of two."""
    model = TableModel(vocab=2, length=6)
    same = (model.texts[:, :4] == model.texts[:, :1]).all(1)
    model.probs = torch.where(same, 1.0, 1e-3).double()
    model.probs /= model.probs.sum()
    return model


def test_what_was_committed_together_and_does_not_fit_is_revoked() -> None:
    model = agreeing()
    common: dict[str, Any] = {"remasking": "sequential", "num_to_transfer": 2, "temperature": 1.0}
    agree = {}
    for revoke in (None, 0.5):
        sure: dict[str, Any] = {} if revoke is None else {"threshold": 1.0, "revoke_threshold": revoke}
        steps = fill(model, DecodeConfig(**common, **sure), 400, 6)
        ids = steps[-1].ids
        agree[revoke] = float((ids[:, :4] == ids[:, :1]).all(1).double().mean())
        assert (taken_back(steps) > 0) == (revoke is not None)
    assert agree[None] < 0.6
    assert agree[0.5] > 0.8


def test_a_judged_token_is_not_seen_by_the_model_and_half_of_the_others_is() -> None:
    model = NoiseModel()
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watching(canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        calls.append((canvas.committed[0], rows[0]))
        return model(canvas, rows)

    config = DecodeConfig(num_to_transfer=2, threshold=1.0, revoke_threshold=1.0)
    known = torch.tensor([[True] + [False] * 7])
    canvas = Canvas.of(torch.full((1, 8), 3), known, model.mask)
    steps = list(denoise(watching, canvas, config, generators(0)))
    assert len(calls) == 2 * len(steps) == int(steps[-1].num_forwards)
    for number in range(len(steps)):
        (before, _), (shown, rows) = calls[2 * number], calls[2 * number + 1]
        assert shown[0]  # what was given stays
        hidden = before & ~shown
        assert not (hidden & (torch.arange(8) % 2 != number % 2)).any()
        assert torch.equal(hidden.nonzero().squeeze(1), rows[before[rows] & (rows > 0)])
    assert int(steps[-1].num_forwards) <= 2 * 8
    assert steps[-1].ids[0, 0] == 3
