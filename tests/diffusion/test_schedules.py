"""Noise schedules: what is kept falls from 1 to 0, its derivative is its derivative, and times come back."""

import pytest
import torch

from dmllm.diffusion.schedules import SCHEDULES
from dmllm.samplers.schedules import open_shares


@pytest.mark.parametrize("name", [*SCHEDULES])
def test_what_is_kept_falls_from_one_to_nothing_at_the_rate_that_is_said(name):
    schedule = SCHEDULES.load(name)()
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-7, rtol=0)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    kept = schedule.alpha(t)
    (slope,) = torch.autograd.grad(kept.sum(), t)
    torch.testing.assert_close(schedule.alpha_prime(t), slope, atol=1e-7, rtol=0)
    assert bool((slope < 0).all())
    torch.testing.assert_close(schedule.time(1 - kept), t, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [*SCHEDULES])
def test_what_a_call_leaves_open_is_what_training_hides_at_that_time(name):
    shares = open_shares(name, 10, torch.device("cpu"))
    left = 1 - torch.arange(1, 11) / 10
    torch.testing.assert_close(shares, 1 - SCHEDULES.load(name)().alpha(left), atol=1e-6, rtol=0)
