"""What is read from the logits, against its definitions in float64 and against what float32 would lose."""

from __future__ import annotations

import pytest
import torch

import dmllm.samplers.estimate as reading
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.estimate import Estimate, draw, estimate
from dmllm.samplers.rules import entropy, low_confidence, margin

GREEDY = DecodeConfig()
LOGITS = 4 * torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
MASK = 19


def exact() -> torch.Tensor:
    return LOGITS.double().index_fill(-1, torch.tensor(MASK), -torch.inf).softmax(-1)


def of(remasking: str) -> Estimate:
    return estimate(LOGITS, MASK, DecodeConfig(remasking=remasking))


def test_doubts_are_one_minus_the_probability_or_the_margin_and_the_entropy() -> None:
    none = torch.zeros(2, 5)
    first, second = exact().topk(2, -1).values.unbind(-1)
    torch.testing.assert_close(low_confidence(of("low_confidence"), none).double(), 1 - first, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(margin(of("margin"), none).double(), 1 - first + second, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        entropy(of("entropy"), none).double(), torch.special.entr(exact()).sum(-1), atol=1e-6, rtol=1e-5
    )
    assert torch.equal(of("entropy").tokens, exact().argmax(-1))


@pytest.mark.parametrize("at_once", [1, 60, 1000])
def test_however_many_rows_are_read_at_a_time_the_outcome_is_the_same(at_once: int, monkeypatch) -> None:
    config = DecodeConfig(remasking="entropy", temperature=1.0, distrust_ids=[3], count_mask=True)
    uniform = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = estimate(LOGITS, MASK, config, uniform)
    monkeypatch.setitem(reading.READ, "cpu", at_once)
    apart = estimate(LOGITS, MASK, config, uniform)
    for name in vars(whole):
        assert torch.equal(getattr(whole, name), getattr(apart, name)), name


def test_of_equal_logits_the_first_is_the_most_probable_and_padding_of_the_buffer_never_is() -> None:
    logits = torch.full((1, 3, 700), -torch.inf)
    logits[0, 0, [300, 301, 699]] = 2.0
    logits[0, 1, [5, 6]] = -2e4
    logits[0, 2, 699] = 0.0
    seen = estimate(logits, 0, DecodeConfig(remasking="entropy"))
    assert seen.tokens[0].tolist() == [300, 5, 699]
    torch.testing.assert_close(seen.entropy, torch.tensor([[3.0, 2.0, 1.0]]).log())
    assert estimate(logits[:, :0], 0, GREEDY).tokens.shape == (1, 0)


def test_the_logits_are_left_as_they_are() -> None:
    before = LOGITS.clone()
    estimate(LOGITS, MASK, DecodeConfig(temperature=1.0, top_p=0.5), torch.rand(2, 5, dtype=torch.float64))
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize("rule", [low_confidence, margin, entropy])
def test_near_certain_tokens_do_not_tie(rule) -> None:
    """Gaps of 20, 25 and 30: all three probabilities are 1.0 in float32, their order is still right."""
    logits = torch.tensor([[[25.0, 0, 0], [20.0, 0, 0], [30.0, 0, 0]]])
    assert (logits.softmax(-1)[..., 0] == 1).all()
    doubt = rule(estimate(logits, 2, DecodeConfig(remasking=rule.__name__)), torch.zeros(1, 3))
    assert doubt.argsort(-1)[0].tolist() == [2, 0, 1]


def test_a_drawn_tokens_doubt_is_its_own() -> None:
    config = DecodeConfig(temperature=1.0)
    uniform = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen = estimate(LOGITS, MASK, config, uniform)
    assert not torch.equal(seen.tokens, seen.top)
    own = exact().gather(-1, seen.tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(seen.against.double(), 1 - own, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature: float) -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    n = 20000
    uniform = torch.rand(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = torch.bincount(draw(scores.expand(1, n, 5), uniform, temperature, 1.0).flatten(), minlength=5)
    expected = (scores / temperature).softmax(-1) * n
    assert seen[4] == 0
    assert float(((seen[:4] - expected[:4]) ** 2 / expected[:4]).sum()) < 16.3  # 3 degrees of freedom, 99.9 %


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    scores = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    uniform = torch.linspace(0, 1 - 1e-12, 1000, dtype=torch.float64)[None]
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        tokens = draw(scores.expand(1, 1000, 4), uniform, 1.0, top_p)
        assert set(tokens.flatten().tolist()) == kept


def test_the_extremes_of_the_uniform_draw_never_pick_a_token_without_mass() -> None:
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(1, 2, 5)
    uniform = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert draw(scores, uniform, 1.0, 1.0).tolist() == [[1, 3]]
