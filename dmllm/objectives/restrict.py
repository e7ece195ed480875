"""One block of an answer at a time: what is before it is given, what is behind it is all hidden, and it is learned.

That is what a masked model sees when it decodes block after block on one canvas, which hiding tokens anywhere shows it
hardly ever. A block stands for as many as its answer has, so that the sum over an answer, and with exact conditionals
the bound, is what it is without restriction (tests/objectives/test_restrict.py).

Source: dParallel, arXiv:2509.26488, section 3.2. Shapes: B rows, L tokens, D documents.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmllm.objectives.loss import per_document
from dmllm.types import IGNORE, Batch


def one_block(batch: Batch, length: int, uniform: Tensor, mask: int) -> tuple[Batch, Tensor]:
    """The batch with labels in one block of each document's labelled tokens, and `mask` for those behind it.

    Args:
        length: of a block, in labelled tokens, counted from the first of the document.
        uniform: [B, D] in [0, 1): which of its blocks each document keeps.

    Returns:
        The batch, and the shares [B, L] float: for how many blocks each token of the one stands, 0 elsewhere.
    """
    scorable = batch.labels != IGNORE
    document = batch.documents.clamp(min=0)
    number = per_document(scorable.float(), batch.documents)  # [B, D] labelled tokens
    before = number.cumsum(1) - number  # in the documents before
    place = scorable.cumsum(1) - 1 - before.long().gather(1, document)
    blocks = (number / length).ceil()
    chosen = (uniform[:, : number.shape[1]].to(blocks) * blocks).long()
    block, kept = place // length, chosen.gather(1, document)
    inside, behind = scorable & (block == kept), scorable & (block > kept)
    batch = replace(
        batch,
        labels=batch.labels.masked_fill(~inside, IGNORE),
        input_ids=batch.input_ids.masked_fill(behind, mask),
    )
    return batch, torch.where(inside, blocks.gather(1, document), 0.0)
