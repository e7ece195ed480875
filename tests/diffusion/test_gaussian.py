"""Identities of the Gaussian processes, in float64."""

import math

import pytest
import torch

from dmllm.diffusion.gaussian import (
    GAUSSIAN_SCHEDULES,
    Level,
    Linear,
    LogSNR,
    Sqrt,
    ddim,
    ddpm,
    euler,
    evened,
    of_log_snr,
    posterior,
    vdm_weight,
)

NAMES = list(GAUSSIAN_SCHEDULES)
TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)


def levels(name, t=TIMES):
    return GAUSSIAN_SCHEDULES.load(name)().level(t)


def at(level, index):
    return Level(level.signal[index], level.noise[index])


@pytest.mark.parametrize("name", NAMES)
def test_signal_and_snr_fall_with_time(name):
    level = levels(name, TIMES[1:])
    assert (level.signal.diff() < 0).all()
    assert (level.snr.diff() < 0).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "linear"])
def test_variance_is_preserved(name):
    level = levels(name)
    assert torch.allclose(level.signal**2 + level.noise**2, torch.ones_like(TIMES), atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_of_any_two_times_has_the_marginal_of_the_earlier(name):
    """Its mean keeps the signal, and the variances of the two steps add up to the earlier noise."""
    level = levels(name)
    for t, s in ((100, 99), (100, 0), (50, 10), (2, 1), (1, 0)):
        now, then = at(level, t), at(level, s)
        of_x, of_z, deviation = posterior(now, then)
        assert float(of_x + of_z * now.signal) == pytest.approx(float(then.signal), abs=1e-14)
        assert float((of_z * now.noise) ** 2 + deviation**2) == pytest.approx(float(then.noise) ** 2, abs=1e-14)


def test_the_sqrt_chain_has_the_ends_of_the_published_one():
    """Betas of 2000 steps, each at most 0.999: alpha-bar is .98536 after the first and 2e-7 after the last."""
    t = torch.arange(2001, dtype=torch.float64) / 2000
    raw = 1 - (t + 1e-4).sqrt()
    chain = (1 - (1 - raw[1:] / raw[:-1]).clamp(max=0.999)).cumprod(0)
    ours = Sqrt().alpha_bar(t[1:])
    assert torch.allclose(ours, chain, rtol=1e-9, atol=0)
    assert float(ours[0]) == pytest.approx(0.98536, abs=1e-5)
    assert float(ours[-1]) == pytest.approx(2e-7, rel=0.02)
    beta, before = 1 - chain[1:] / chain[:-1], chain[:-1]
    of_x, of_z, deviation = posterior(Sqrt().level(t[2:]), Sqrt().level(t[1:-1]))
    assert torch.allclose(of_x, beta * before.sqrt() / (1 - chain[1:]), rtol=1e-6)
    assert torch.allclose(of_z, (1 - before) * (1 - beta).sqrt() / (1 - chain[1:]), rtol=1e-6)
    assert torch.allclose(deviation**2, beta * (1 - before) / (1 - chain[1:]), rtol=1e-6)


def test_the_vdm_term_of_normal_data_is_what_it_is_in_closed_form():
    """With the ideal x-hat = signal z of x ~ N(0, 1), E|x - x-hat|^2 = noise^2."""
    level = LogSNR().level(torch.linspace(0, 1, 200_001, dtype=torch.float64))
    now, then = at(level, slice(1, None)), at(level, slice(None, -1))
    middle = (now.noise**2 + then.noise**2) / 2
    value = float((vdm_weight(now, then) * middle).sum())
    assert value == pytest.approx(0.5 * math.log((1 + math.exp(3)) / (1 + math.exp(-6))), abs=1e-8)
    assert value == pytest.approx(1.52306, abs=1e-5)


def test_euler_with_the_exact_x_lands_on_it_in_one_step_from_any_time():
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.1, 1, 9, dtype=torch.float64)
    z = Linear().level(t).mix(x, eps)
    assert torch.allclose(euler(z, x, t, torch.zeros_like(t)), x, atol=1e-14)


def test_on_the_linear_path_euler_is_ddim():
    generator = torch.Generator().manual_seed(0)
    z, x_hat = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    t, s = torch.full((5,), 0.7, dtype=torch.float64), torch.linspace(0, 0.6, 5, dtype=torch.float64)
    assert torch.allclose(euler(z, x_hat, t, s), ddim(z, x_hat, Linear().level(t), Linear().level(s)), atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_back_keep_the_marginal_of_normal_data(name):
    """For x ~ N(0, 1) the ideal x-hat is E[x | z]; many small steps lead from noise to data of variance 1."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(1, 0, 201, dtype=torch.float64) ** 2
    level = levels(name, t)
    start = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    random, fixed = start * (at(level, 0).signal ** 2 + at(level, 0).noise ** 2).sqrt(), start
    for now, then in zip(range(200), range(1, 201), strict=True):
        now, then = at(level, slice(now, now + 1)), at(level, slice(then, then + 1))
        share = now.signal / (now.signal**2 + now.noise**2)
        eps = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        random, fixed = ddpm(random, share * random, now, then, eps), ddim(fixed, share * fixed, now, then)
    wanted = float(at(level, 200).signal ** 2 + at(level, 200).noise ** 2)
    assert float(random.var()) == pytest.approx(wanted, rel=0.05)
    assert float(fixed.var()) == pytest.approx(wanted, rel=0.05)


def test_a_log_snr_says_the_same_as_alpha_bar():
    alpha_bar = torch.tensor([0.9853, 0.5, 2e-7], dtype=torch.float64)
    level = of_log_snr(alpha_bar.logit())
    assert torch.allclose(level.signal**2, alpha_bar)
    assert torch.allclose(level.noise**2, 1 - alpha_bar)


def test_an_evened_chain_falls_and_makes_the_loss_rise_in_equal_steps():
    """Where the loss is already a straight line of the step, nothing but the very ends moves; where it is a known
    function of alpha-bar, the new chain inverts it."""
    chain = Sqrt(200).alpha_bar(torch.arange(1, 201, dtype=torch.float64) / 200)[:, None].expand(-1, 2)
    bins = chain.reshape(20, 10, 2).mean(1)
    straight, loss = torch.linspace(0.1, 0.9, 20, dtype=torch.float64), (1 - bins) ** 2
    new = evened(chain, torch.stack([straight, loss[:, 1]], 1))
    assert (new.diff(dim=0) <= 0).all()
    assert (new[20:-10, 0] - chain[20:-10, 0]).abs().max() < 0.01
    steps = ((1 - new[20:-10, 1]) ** 2).diff()
    assert float(steps.max() / steps.min()) < 1.35
    falling = evened(chain, 1 - loss)
    assert (falling.diff(dim=0) <= 0).all(), "losses that do not rise are made to"
