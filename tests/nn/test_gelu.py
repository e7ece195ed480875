"""A GELU that the number of threads does not change."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dmllm.nn.gelu import GRAIN, SteadyGELU


@pytest.fixture
def any_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("count", [7, GRAIN, GRAIN + 1, 17 * 2503, 3 * 729 * 24])
def test_it_has_the_rounding_of_as_many_threads_as_asked_for_whatever_there_are(any_threads, approximate, count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 3
    for parts in (1, 2, 3):
        torch.set_num_threads(parts)
        wanted = F.gelu(x, approximate=approximate)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(SteadyGELU(approximate, parts)(x), wanted)


def test_gradients_and_shapes_are_those_of_gelu():
    x = torch.randn(3, 729, 24, requires_grad=True)
    SteadyGELU("tanh")(x).square().sum().backward()
    own, x.grad = x.grad, None
    F.gelu(x, approximate="tanh").square().sum().backward()
    torch.testing.assert_close(own, x.grad)
    assert SteadyGELU()(x).shape == x.shape
    assert SteadyGELU()(x.bfloat16()).dtype == torch.bfloat16
