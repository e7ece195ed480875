"""Truths of the insertion process: what is shown, masked and gone at a time, and what expecting wrongly costs."""

import math

import pytest
import torch

from dmllm.diffusion.insertion import GONE, MASKED, SHOWN, Insertion, divergence, orders
from dmllm.diffusion.schedules import Cosine, Linear, Polynomial, elbo_weight

PAIRS = [(Linear(), Linear()), (Linear(), Cosine()), (Cosine(), Polynomial(2.0)), (Polynomial(0.5), Polynomial(3.0))]
TIMES = torch.tensor([0.01, 0.2, 0.5, 0.9, 1.0])


def test_both_schedules_linear_the_probabilities_are_closed_forms():
    t = TIMES.double()
    expected = torch.stack([1 - t + t * t.log(), -t * t.log(), t], -1)
    torch.testing.assert_close(Insertion(Linear(), Linear()).probabilities(t), expected, atol=1e-12, rtol=0)


def test_powers_of_time_have_closed_forms_too():
    p, q, t = 0.5, 3.0, TIMES.double()
    masked = p * t**q * (1 - t ** (p - q)) / (p - q)
    found = Insertion(Polynomial(p), Polynomial(q)).probabilities(t)
    torch.testing.assert_close(found[:, MASKED], masked, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_drawn_states_have_the_probabilities_that_are_said(pair):
    process, number = Insertion(*pair), 200_000
    uniform = torch.rand(number, 2, generator=torch.Generator().manual_seed(0))
    for t, expected in zip(TIMES, process.probabilities(TIMES), strict=True):
        seen = torch.bincount(process.states(t.expand(number), uniform), minlength=3).double() / number
        error = (expected * (1 - expected) / number).sqrt() + 1e-9
        assert bool(((seen - expected).abs() < 4 * error).all()), (t, seen, expected)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_token_is_never_unmasked_before_it_is_there_and_only_moves_towards_being_shown(pair):
    uniform = torch.rand(5000, 2, generator=torch.Generator().manual_seed(1))
    inserted, unmasked = Insertion(*pair).times(uniform)
    assert bool((unmasked <= inserted + 1e-6).all())
    walk = torch.stack([Insertion(*pair).states(torch.full((5000,), t), uniform) for t in (0.9, 0.6, 0.3, 0.1)])
    assert bool((walk.diff(dim=0) <= 0).all())
    assert SHOWN < MASKED < GONE


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_masked_is_unmasked_at_the_rate_of_its_schedule(pair):
    process, t, step = Insertion(*pair), 0.6, 1e-4
    uniform = torch.rand(400_000, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inserted, unmasked = process.times(uniform)
    masked = (unmasked < t) & (inserted >= t)
    rate = float(((unmasked >= t - 100 * step) & masked).sum() / masked.sum()) / (100 * step)
    middle = torch.tensor(t - 50 * step)
    assert rate == pytest.approx(float(elbo_weight(process.unmasking, middle)), rel=0.05)


def test_the_true_expectation_costs_nothing_and_any_other_something():
    missing = torch.tensor([0.0, 1.0, 2.0, 7.0])
    truth = missing.log().clamp(min=-100)
    torch.testing.assert_close(divergence(truth, missing), torch.zeros(4), atol=1e-5, rtol=0)
    for off in (-0.5, -0.01, 0.01, 0.5):
        assert bool((divergence(truth + off, missing)[1:] > 0).all())
    assert float(divergence(torch.tensor(0.0), torch.tensor(0.0))) == 1.0


def test_of_a_random_number_the_mean_is_the_cheapest_to_expect():
    missing = torch.tensor([0.0, 0.0, 1.0, 4.0, 5.0])
    log_expected = torch.tensor(0.3, requires_grad=True)
    costs = {y: float(divergence(torch.tensor(y).log(), missing).mean()) for y in (1.8, 1.9, 2.0, 2.1, 2.2)}
    assert min(costs, key=lambda y: costs[y]) == 2.0
    grads = [torch.autograd.grad(divergence(log_expected, missing, tight=t).sum(), log_expected)[0] for t in (0, 1)]
    assert grads[0] == grads[1]


def test_one_missing_token_of_a_uniform_vocabulary_is_log_v_and_for_edit_flows_one_more():
    """Edit Flows (arXiv:2506.09018, equation 23) pays sum of rates - log(rate x Q): at the ideal rate 1 + log V."""
    vocab, n = 11, torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:]
    weight, alone = 1 / n, torch.ones_like(n)
    tokens, missing = math.log(vocab) * alone, divergence(0 * n, alone).double()
    assert float((weight * n * (tokens + missing)).mean()) == pytest.approx(math.log(vocab), abs=1e-9)
    constant = alone  # g, which is as much a constant as g log g
    assert float((weight * n * (tokens + missing + constant)).mean()) == pytest.approx(1 + math.log(vocab), abs=1e-9)


def test_the_mean_log_of_the_gap_that_each_token_splits_is_that_of_all_orders():
    def split(gap: int) -> float:
        return 0.0 if gap == 0 else math.log(gap) + sum(split(k) + split(gap - 1 - k) for k in range(gap)) / gap

    assert orders(6) == pytest.approx([split(n) for n in range(7)])
