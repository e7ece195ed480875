"""The projection onto the vocabulary in slices gives what one product gives, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dmllm.nn import unembedding
from dmllm.nn.unembedding import Unembedding


@pytest.mark.parametrize("rows", [1, 4, 19, 65])
@pytest.mark.parametrize("width", [64, 512])
def test_slices_are_one_product_to_the_bit(rows, width):
    torch.manual_seed(0)
    head = Unembedding(width, 3 * unembedding.AT_ONCE // width + 41)
    x = torch.randn(rows, width)
    with torch.no_grad():
        assert torch.equal(head(x), F.linear(x, head.weight))


def test_no_slice_is_larger_than_the_cache(monkeypatch):
    monkeypatch.setattr(unembedding, "AT_ONCE", 64)
    head, x, seen = Unembedding(8, 20), torch.randn(2, 3, 8), []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(tuple(b.shape)) or product(a, b, out=out))
    with torch.no_grad():
        assert torch.allclose(head(x), F.linear(x, head.weight))
    assert seen == [(8, 8), (8, 8), (8, 4)]


def test_gradients_and_other_dtypes_go_the_plain_way(monkeypatch):
    monkeypatch.setattr(unembedding, "AT_ONCE", 64)
    monkeypatch.setattr(torch, "mm", None)
    head = Unembedding(8, 20)
    head(torch.randn(2, 8)).sum().backward()
    assert isinstance(head, nn.Linear)
    assert head.weight.grad is not None
    with torch.no_grad():
        assert head.bfloat16()(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
