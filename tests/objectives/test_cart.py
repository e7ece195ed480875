"""Dream's weights: how much is shown near a hidden token."""

from __future__ import annotations

import pytest
import torch

from dmllm.objectives.cart import context_adaptive
from dmllm.types import PADDING, PREFIX


def test_the_weights_are_the_sum_over_what_is_shown_of_half_a_geometric_distribution():
    hidden = torch.tensor([[False, True, True, False, True]])
    zeros, places = torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None]
    weights = context_adaptive(hidden, zeros, places, 0.3)
    assert weights[hidden].tolist() == pytest.approx([0.255, 0.255, 0.5 * 0.3 * (1 + 0.7**3)])


def test_neither_another_document_nor_padding_is_context_and_a_shared_prefix_is_each_ones_own():
    hidden = torch.rand(1, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    alone = [context_adaptive(hidden[:, :4], torch.zeros(1, 4).long(), torch.arange(4)[None], 0.2),
             context_adaptive(hidden[:, 4:], torch.zeros(1, 5).long(), torch.arange(5)[None], 0.2)]  # fmt: skip
    documents = torch.tensor([[0] * 4 + [1] * 5 + [PADDING]])
    places = torch.tensor([[*range(4), *range(5), 0]])
    packed = context_adaptive(torch.cat([hidden, hidden[:, :1]], 1), documents, places, 0.2)
    torch.testing.assert_close(packed[:, :9], torch.cat(alone, 1))
    behind = torch.cat([torch.zeros(1, 2, dtype=torch.bool), hidden], 1)
    documents = torch.tensor([[PREFIX] * 2 + [0] * 4 + [1] * 5])
    places = torch.tensor([[0, 1, *range(2, 6), *range(2, 7)]])
    shared = context_adaptive(behind, documents, places, 0.2)
    for span in (slice(2, 6), slice(6, 11)):
        whole = torch.cat([behind[:, :2], behind[:, span]], 1)
        own = context_adaptive(whole, torch.zeros_like(whole).long(), torch.arange(whole.shape[1])[None], 0.2)
        torch.testing.assert_close(shared[:, span], own[:, 2:])
