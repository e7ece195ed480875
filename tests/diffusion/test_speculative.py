"""Speculative sampling keeps the distribution exactly, whatever drafts come from."""

from __future__ import annotations

import pytest
import torch

from dmllm.diffusion.speculative import verify
from tests.exact import total_variation

SHARE = 4000  # of the unit interval, evenly: an integral over the uniform number


def outcomes(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """How a single draft from q [V] ends as a token, [V], by summing over drafts and uniform numbers."""
    uniform = (torch.arange(SHARE, dtype=torch.float64) + 0.5) / SHARE
    found = torch.zeros_like(p)
    for draft in range(len(p)):
        drafts = torch.full((SHARE, 1), draft)
        count, rest = verify(p.expand(SHARE, 2, -1), q.expand(SHARE, 1, -1), drafts, uniform[:, None])
        rejected = rest[count == 0]
        found += q[draft] * (rejected / rejected.sum(-1, keepdim=True)).sum(0) / SHARE
        found[draft] += q[draft] * (count == 1).double().mean()
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_token_is_distributed_as_without_drafts(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(5, generator=draws, dtype=torch.float64).mul(2).softmax(0) for _ in range(2))
    assert total_variation(p, q) > 0.1
    assert total_variation(outcomes(p, q), p) < 1e-3


def test_a_draft_that_cannot_be_is_never_kept_and_a_sure_one_always() -> None:
    p = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    torch.testing.assert_close(outcomes(p, torch.tensor([1.0, 0.0, 0.0]).double()), p, atol=1e-3, rtol=0)
    torch.testing.assert_close(outcomes(p, p), p, atol=1e-3, rtol=0)
    count, _ = verify(
        p.expand(1, 2, -1), p.expand(1, 1, -1), torch.tensor([[2]]), torch.full((1, 1), 1 - 2**-30, dtype=torch.float64)
    )
    assert int(count) == 1


def test_where_nothing_was_drafted_the_token_is_a_plain_draw() -> None:
    """Masses of zero at a token that cannot be, as the mask token, say so."""
    p = torch.tensor([0.0, 0.2, 0.8])
    count, rest = verify(p.expand(1, 2, -1), torch.zeros(1, 1, 3), torch.tensor([[0]]), torch.zeros(1, 1))
    assert int(count) == 0
    assert torch.equal(rest[0], p)


def test_drafts_behind_one_that_fails_are_not_kept() -> None:
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]])
    q = torch.full((1, 3, 2), 0.5)
    count, rest = verify(p, q, torch.tensor([[0, 0, 0]]), torch.full((1, 3), 0.5))
    assert int(count) == 1
    assert torch.equal(rest[0], torch.tensor([0.0, 0.5]))
