"""Truths of the bounds for tokens that turn into words or masks: one token of known distribution, all sums exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dmllm.diffusion.bounds import continuous, discrete, score_entropy
from dmllm.diffusion.schedules import SCHEDULES, Linear, Polynomial, elbo_weight
from dmllm.diffusion.uniform import HybridNoise, Noise, UniformNoise, leave_one_out, posterior
from tests.exact import quadrature

WORDS, MASK = 5, 5
P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
ENTROPY = float(torch.special.entr(P).sum())
UNIFORM = [UniformNoise(WORDS, SCHEDULES.load(name)()) for name in ("linear", "cosine", "polynomial")]
HYBRID = [HybridNoise(WORDS, p) for p in (0.1, 0.2, 0.5)] + [HybridNoise(WORDS, 0.2, gamma=1.5)]


def prior(noised: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """What is known of one token without looking at it: the leave-one-out prediction, as logits [N, V]."""
    return torch.cat([P.log(), torch.tensor([-torch.inf])]).expand(len(noised), -1).clone()


def truth(noised: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """p(x_0 | x_t)."""
    return posterior(prior(noised, t, noise), noised, noise.at(t), MASK)


def ignorant(noised: Tensor, t: Tensor, noise: Noise) -> Tensor:
    return torch.zeros(len(noised), WORDS + 1, dtype=torch.float64).index_fill(-1, torch.tensor(MASK), -torch.inf)


def everything(t: Tensor, noise: Noise, p: Tensor = P) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of x_0 and x_t at the times [T], their probabilities and times: [N] each."""
    grid = torch.cartesian_prod(torch.arange(WORDS), torch.arange(WORDS + 1))
    targets, noised = grid.T.repeat(1, len(t))
    times = t.repeat_interleave(len(grid))
    level = noise.at(times)
    return targets, noised, times, p[targets] * (level.noise(noised, MASK) + level.alpha * (targets == noised))


def bound(noise: Noise, model=prior, p: Tensor = P) -> float:
    t, weight = quadrature(edge=1e-7 if isinstance(noise, HybridNoise) else 3e-4)
    targets, noised, times, mass = everything(t, noise, p)
    log_x = model(noised, times, noise).log_softmax(-1)
    found = continuous(log_x, targets, noised, noise, times, MASK)
    return float((mass * found).view(len(t), -1).sum(1) @ weight)


def steps_bound(noise: Noise, steps: int, model=prior) -> float:
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    targets, noised, times, mass = everything(t, noise)
    log_x = model(noised, times, noise).log_softmax(-1)
    found = discrete(log_x, targets, noised, noise, times - 1 / steps, times, MASK)
    return float(torch.where(mass > 0, mass * found, 0.0).sum())


@pytest.mark.parametrize("noise", [*UNIFORM, *HYBRID], ids=str)
def test_a_uniform_predictor_scores_log_v(noise: Noise) -> None:
    assert bound(noise, ignorant) == pytest.approx(math.log(WORDS), abs=3e-5)


@pytest.mark.parametrize("noise", [UNIFORM[0], HYBRID[1], HybridNoise(WORDS, 0.0)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_a_uniform_predictor_scores_log_v_in_any_number_of_steps(noise: Noise, steps: int) -> None:
    assert steps_bound(noise, steps, ignorant) == pytest.approx(math.log(WORDS), abs=1e-9)


@pytest.mark.parametrize("noise", [*UNIFORM, *HYBRID], ids=str)
def test_the_leave_one_out_predictor_reaches_the_entropy_and_the_posterior_does_not(noise: Noise) -> None:
    assert bound(noise) == pytest.approx(ENTROPY, abs=3e-5)
    assert bound(noise, truth) > ENTROPY + 0.1
    converted = lambda z, t, noise: leave_one_out(truth(z, t, noise), z, noise.at(t), MASK)
    assert bound(noise, converted) == pytest.approx(ENTROPY, abs=3e-5)


@pytest.mark.parametrize("noise", [UNIFORM[0], UNIFORM[1], HYBRID[1]], ids=str)
def test_in_steps_too_and_each_number_of_them_is_tight(noise: Noise) -> None:
    for steps in (1, 3, 30):
        assert steps_bound(noise, steps) == pytest.approx(ENTROPY, abs=1e-9)
    assert steps_bound(noise, 30, truth) > ENTROPY + 0.1


@pytest.mark.parametrize("noise", [UNIFORM[1], HYBRID[1]], ids=str)
def test_many_steps_are_continuous_time(noise: Noise) -> None:
    wrong = lambda z, t, noise: prior(z, t, noise) * 0.5
    assert steps_bound(noise, 4000, wrong) == pytest.approx(bound(noise, wrong), abs=1e-3)


def rows(seed: int, count: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, WORDS + 1, generator=draws, dtype=torch.float64) * 2
    logits[:, MASK] = -torch.inf
    integers = lambda high: torch.randint(high, (count,), generator=draws)
    t = torch.rand(count, generator=draws, dtype=torch.float64) * 0.98 + 0.01
    return logits.log_softmax(-1), integers(WORDS), integers(WORDS + 1), t


@pytest.mark.parametrize("schedule", [Linear(), Polynomial(2.0)], ids=str)
def test_without_random_words_the_bound_is_the_weighted_cross_entropy_of_masks(schedule) -> None:
    log_x, targets, noised, t = rows(0)
    noised = torch.where(noised == MASK, MASK, targets)  # a token is kept or masked
    share = 1 - schedule.alpha(t)  # hybrid noise counts its own time
    found = continuous(log_x, targets, noised, HybridNoise(WORDS, 0.0), share, MASK)
    found = found * -schedule.alpha_prime(t)  # d share / dt
    loss = -log_x.gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(found, torch.where(noised == MASK, loss * elbo_weight(schedule, t), 0.0), rtol=1e-9)


def test_few_random_words_are_nearly_none() -> None:
    noise = HybridNoise(WORDS, 1e-12)
    masks_alone = HybridNoise(WORDS, 0.0)
    log_x, targets, noised, t = rows(1)
    noised = torch.where(noised == MASK, MASK, targets)
    found, expected = (continuous(log_x, targets, noised, n, t, MASK) for n in (noise, masks_alone))
    assert torch.allclose(found, expected, atol=1e-6)


def test_masks_alone_in_steps_become_the_weighted_cross_entropy() -> None:
    log_x, targets, _, t = rows(2)
    noised, noise = torch.full_like(targets, MASK), HybridNoise(WORDS, 0.0)
    loss = -log_x.gather(1, targets[:, None]).squeeze(1)
    for steps in (10, 1000):
        step = (t * steps).ceil() / steps
        found = steps * discrete(log_x, targets, noised, noise, step - 1 / steps, step, MASK)
        assert torch.allclose(found, loss / step, rtol=1e-9)  # of a linear schedule at any number of steps


def test_published_formula_of_uniform_noise() -> None:
    """Duo's, arXiv:2506.10892: with a = K alpha x + 1 - alpha for x_0 and for its prediction."""
    log_x, targets, noised, t = rows(3)
    noised = noised.clamp(max=WORDS - 1)
    noise, size = UniformNoise(WORDS, Linear()), WORDS
    alpha = 1 - t
    bars = size * alpha[:, None] * log_x[:, :WORDS].exp() + 1 - alpha[:, None]
    same = (targets == noised).double()
    at = lambda ids: bars.gather(1, ids[:, None]).squeeze(1)
    ratio = (1 - alpha) / (size * alpha + 1 - alpha)
    first = size * (1 / (1 - alpha + size * alpha * same) - 1 / at(noised))
    second = (
        -(same * ratio + 1 - same) * (bars.log().sum(1) - size * at(noised).log())
        - size * alpha / (1 - alpha) * (at(targets) / at(noised)).log() * (1 - same)
        + ((size - 1) * ratio * same - (1 - same) / ratio) * ratio.log()
    )
    expected = -1 / (size * alpha) * (first - second)
    assert torch.allclose(continuous(log_x, targets, noised, noise, t, MASK), expected, rtol=1e-7)


@pytest.mark.parametrize("noise", [UniformNoise(WORDS, Linear()), HybridNoise(WORDS, 0.0)], ids=str)
def test_score_entropy_of_ratios_is_the_bound(noise: Noise) -> None:
    log_x, targets, noised, t = rows(4)
    masks = isinstance(noise, HybridNoise)
    noised = torch.full_like(noised, MASK) if masks else noised.clamp(max=WORDS - 1)
    level = noise.at(t)
    mass = level.alpha[:, None] * log_x.exp() + level.uniform[:, None]
    mass[:, MASK] = level.masked
    scores = mass.log() - mass.log().gather(1, noised[:, None])
    words = torch.arange(WORDS + 1) != MASK
    found = score_entropy(scores.clamp(min=-50), targets, noised, noise, t, MASK, words)
    assert torch.allclose(found, continuous(log_x, targets, noised, noise, t, MASK), rtol=1e-7)
    worse = score_entropy(scores.clamp(min=-50) + 0.3, targets, noised, noise, t, MASK, words)
    ideal = continuous(torch.nn.functional.one_hot(targets, WORDS + 1).log(), targets, noised, noise, t, MASK)
    assert bool((worse >= ideal - 1e-9).all())
    assert torch.allclose(ideal, torch.zeros_like(ideal), atol=1e-9)  # who knows the token pays nothing


def test_single_precision_is_enough_over_the_whole_range_of_times() -> None:
    log_x, targets, noised, _ = rows(5, 2000)
    t = torch.linspace(1e-3, 1 - 1e-3, 2000, dtype=torch.float64)
    for noise, z in ((UNIFORM[0], noised.clamp(max=WORDS - 1)), (HYBRID[0], noised)):
        exact = continuous(log_x, targets, z, noise, t, MASK)
        found = continuous(log_x.float(), targets, z, noise, t.float(), MASK).double()
        assert torch.allclose(found, exact, rtol=1e-3, atol=1e-3)
