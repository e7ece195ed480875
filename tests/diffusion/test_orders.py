"""Orders: counted within a document, ties from left to right."""

from __future__ import annotations

import torch

from dmllm.diffusion.orders import ranks
from dmllm.types import PADDING, PREFIX


def test_orders_are_counted_within_each_document_and_padding_has_none():
    documents = torch.tensor([[PREFIX, 0, 0, 0, 1, 1, PADDING]])
    chosen = torch.tensor([[False, False, True, True, True, True, False]])
    key = torch.tensor([[0.0, 0.0, 0.9, 0.1, 0.5, 0.6, 0.0]])
    assert ranks(key, documents, chosen).tolist() == [[-1, -1, 1, 0, 0, 1, -1]]
    assert ranks(torch.zeros(1, 7), documents, chosen).tolist() == [[-1, -1, 0, 1, 0, 1, -1]]
