"""What becomes of a token, and what a prediction of it is worth."""

from __future__ import annotations

import pytest
import torch

from dmllm.diffusion.schedules import Cosine, Linear, Polynomial
from dmllm.diffusion.uniform import (
    HybridNoise,
    MaskNoise,
    Noise,
    UniformNoise,
    corrupt,
    draw_words,
    fresh,
    leave_one_out,
    posterior,
)
from dmllm.types import Vocabulary

VOCABULARY = Vocabulary(mask=2, eos=5, pad=0, image=6, size=8)
WORDS = [1, 3, 4, 5, 7]
KINDS = [
    UniformNoise(5, Linear()),
    UniformNoise(5, Cosine()),
    UniformNoise(5, Polynomial(2.0)),
    MaskNoise(5, Linear()),
    HybridNoise(5, 0.1),
    HybridNoise(5, 0.4, gamma=1.5),
    HybridNoise(5, 0.0),
]


@pytest.mark.parametrize("noise", KINDS, ids=str)
def test_all_mass_is_somewhere_and_at_the_ends_all_is_text_or_all_is_noise(noise: Noise) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    level = noise.at(t)
    assert torch.allclose(level.alpha + 5 * level.uniform + level.masked, torch.ones_like(t))
    assert level.alpha[[0, -1]].tolist() == pytest.approx([1, 0])
    assert bool((level.alpha.diff() < 0).all())
    assert bool(torch.isfinite(level.log_odds).all())
    inside = slice(5, 95)
    assert torch.allclose(noise.time(1 - level.alpha[inside]), t[inside], atol=1e-6)
    assert noise.time(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("noise", KINDS, ids=str)
def test_the_pull_is_the_slope_of_the_log_of_noise_to_signal(noise: Noise) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    level, (word, mask) = noise.at(t), noise.pull(t)
    for mass, pull in ((level.uniform, word), (level.masked, mask)):
        if bool((mass > 0).all()):
            slope = torch.autograd.grad((mass / level.alpha).log().sum(), t, retain_graph=True)[0]
            assert torch.allclose(slope, pull)


def test_hybrid_noise_at_half_time_is_words_to_the_share_that_is_said() -> None:
    for gamma in (0.5, 1.0, 2.0):
        assert float(5 * HybridNoise(5, 0.3, gamma).at(torch.tensor(0.5)).uniform) == pytest.approx(0.3)


def test_words_are_drawn_alike_and_nothing_else_is() -> None:
    drawn = draw_words(torch.arange(1000) / 1000, VOCABULARY)
    assert torch.bincount(drawn, minlength=8)[WORDS].tolist() == [200] * 5
    assert draw_words(torch.tensor([1 - 2**-24]), VOCABULARY).tolist() == [7]


@pytest.mark.parametrize("noise", KINDS, ids=str)
def test_what_is_drawn_has_the_marginal(noise: Noise) -> None:
    draws = torch.Generator().manual_seed(0)
    count, ids = 200_000, torch.full((200_000,), 4)
    which, word = torch.rand(2, count, generator=draws)
    for time in (0.2, 0.7):
        level = noise.at(torch.tensor(time))
        expected = torch.zeros(8)
        expected[WORDS] = level.uniform
        expected[4] += level.alpha
        expected[2] += level.masked
        share = torch.bincount(corrupt(ids, level, which, word, VOCABULARY), minlength=8) / count
        assert torch.allclose(share, expected, atol=0.005)
        alone = torch.bincount(fresh(level, which, word, VOCABULARY), minlength=8) / count
        expected[4] -= level.alpha
        assert torch.allclose(alone, expected / expected.sum(), atol=0.005)


def test_a_prediction_and_the_one_that_leaves_its_place_out_are_each_others_inverse() -> None:
    noise, logits = KINDS[4], torch.randn(6, 8)
    noised, level = torch.tensor([1, 3, 2, 5, 7, 2]), noise.at(torch.linspace(0.1, 0.9, 6))
    there = posterior(logits, noised, level, 2)
    assert torch.allclose(leave_one_out(there, noised, level, 2), logits, atol=1e-4)
    assert torch.equal(there[noised == 2], logits[noised == 2])  # a mask says nothing of what it was
    assert bool((there >= logits).all())
