"""How the noised copies ("views") of a batch are laid out in what the model is fed.

Each layout returns the batch, who sees whom in it, and `source` [B', L']: which row of which view each stream row is,
as an index into V * B * L (view, batch row, column), or V * B * L itself for rows that are never noised.

    repeat_batch    every row once a view, one below the other; images are encoded once
    append_canvas   prefix visibility: only the canvas a second time, behind its row
    two_copies      block visibility: what is given, and behind it each view of the blocks that are scored
    two_streams     permutation visibility: all that is there, and behind it the tokens that are to be predicted

Sources: BD3-LM, arXiv:2503.09573, section 3.2 (two copies in one pass); LaViDa, arXiv:2505.16839, section 3.2
(complementary views); XLNet, arXiv:1906.08237, section 2.3 (two streams). Shapes: V views, B rows of the batch, L
tokens, C rows of the longest canvas.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmllm.nn.rope import places
from dmllm.nn.visibility import Visibility
from dmllm.objectives.loss import per_document
from dmllm.types import IGNORE, PADDING, PREFIX, TEXT, Batch

Laid = tuple[Batch, Visibility, Tensor]
FILLERS = {"input_ids": 0, "labels": IGNORE, "image_slots": TEXT, "documents": PADDING, "positions": 0}


def repeat_batch(batch: Batch, look: Visibility, views: int) -> Laid:
    """Every row once for each view, the first views of all rows above the second ones."""
    source = torch.arange(views * batch.labels.numel(), device=batch.labels.device).view(-1, batch.labels.shape[1])
    if views == 1:
        return batch, look, source
    repeated = {name: torch.cat([getattr(batch, name)] * views, getattr(batch, name).ndim - 2) for name in FILLERS}
    batch = replace(batch, indices=torch.cat([batch.indices] * views), **repeated)
    return batch, look.repeat(views), source


def append_canvas(batch: Batch, look: Visibility, scorable: Tensor) -> Laid:
    """A second view of what is `scorable` [B, L], behind the row: what is given does not see the canvas.

    The second view has the next rank: it sees what is given and itself, not the first view, and is not seen by it.
    """
    place, there = _in_front(scorable)
    longer = {name: _cat(getattr(batch, name), _take(getattr(batch, name), place, there, filler))
              for name, filler in FILLERS.items()}  # fmt: skip
    rank = torch.cat([look.rank, _take(look.rank + 1, place, there, 0)], 1)
    rule = Visibility(rank, torch.cat([look.canvas, there], 1), longer["documents"])
    own = torch.arange(scorable.numel(), device=place.device).view_as(scorable)
    second = _take(own + scorable.numel(), place, there, 2 * scorable.numel())
    return replace(batch, **longer), rule, torch.cat([own, second], 1)


def two_copies(batch: Batch, block_length: int, views: int) -> Laid:
    """What is given in full, and behind it, at the same positions, `views` canvas copies of the scored blocks.

    A canvas block sees itself and what is given in the blocks before it, which is what it sees when it is decoded. It
    holds every row of its block, also those of the prompt. With two views the context's ranks are even, so that each
    block has a rank for either.

    Raises:
        ValueError: a shared prefix ends within a block: its rows would then have to see each document's.
    """
    block = places(batch.positions) // block_length
    prefix = (batch.documents == PREFIX).sum(1)
    if bool((prefix % block_length).any()):
        raise ValueError(
            f"The prefix that documents share has {int(prefix[prefix % block_length > 0][0])} rows, which is not a "
            f"whole number of blocks of {block_length}; use model.processor.image_prefix=false, turns=all."
        )
    scored = per_document((batch.labels != IGNORE).float(), number := number_blocks(batch.documents, block)) > 0
    place, there = _in_front(scored.gather(1, number) & (batch.documents >= 0))
    streams = {
        name: _cat(getattr(batch, name), *[_take(getattr(batch, name), place, there, filler)] * views)
        for name, filler in FILLERS.items()
    }
    streams["labels"][:, : block.shape[1]] = IGNORE
    copies = [_take(views * block - view, place, there, 0) for view in range(views)]
    canvas = torch.cat([torch.zeros_like(block, dtype=torch.bool), *[there] * views], 1)
    rule = Visibility(torch.cat([views * block, *copies], 1), canvas, streams["documents"])
    never = views * block.numel()
    own = torch.arange(block.numel(), device=block.device).view_as(block)
    seen = [_take(own + view * block.numel(), place, there, never) for view in range(views)]
    return replace(batch, **streams), rule, torch.cat([torch.full_like(own, never), *seen], 1)


def two_streams(batch: Batch, rank: Tensor, predicted: Tensor) -> Laid:
    """Every token as itself, and behind all of them, at the same positions, those that are `predicted` [B, L] bool.

    Args:
        rank: [B, L] int64, when a token comes in the order of its document, -1 where it is given: what is given sees
            what is given, a token itself and those before it, and one that is predicted only those before it.
    """
    place, there = _in_front(predicted)
    streams = {name: _cat(getattr(batch, name), _take(getattr(batch, name), place, there, filler))
               for name, filler in FILLERS.items()}  # fmt: skip
    streams["labels"][:, : rank.shape[1]] = IGNORE
    never = rank.numel()
    own = torch.arange(never, device=rank.device).view_as(rank)
    source = _cat(torch.full_like(own, never), _take(own, place, there, never))
    rank = torch.where(batch.documents == PREFIX, -2, rank)
    canvas = _cat(torch.zeros_like(predicted), there)
    rule = Visibility(_cat(rank, _take(rank, place, there, 0)), canvas, streams["documents"])
    return replace(batch, **streams), rule, source


def number_blocks(documents: Tensor, block: Tensor) -> Tensor:
    """The blocks of each row's documents, counted from 0 along the row: [B, L]; rows of no document have any number.

    `block` [B, L] is each row's block within its document.
    """
    real = documents >= 0
    first = real.clone()
    first[:, 1:] &= (documents[:, 1:] != documents[:, :-1]) | (block[:, 1:] != block[:, :-1])
    return (first.cumsum(1) - 1).clamp(min=0)


def show_padding(look: Visibility, *, faint: bool) -> Visibility:
    """Padding as rows of its row's one document, `faint` or not.

    Raises:
        ValueError: a row holds several documents; which one would see the padding is not said.
    """
    if bool(((look.document != 0) & (look.document != PADDING)).any()):
        raise ValueError(
            "Padding is seen only where each row is one conversation; use objective.options.padding=hidden."
        )
    padding = look.document == PADDING
    return replace(look, document=torch.zeros_like(look.document), faint=padding if faint else None)


def spread(views: list[Tensor], source: Tensor) -> Tensor:
    """What the views [B, L] say of each stream row, [B', L']; zero (False) for rows that are never noised."""
    flat = torch.cat([view.flatten() for view in views])
    return torch.cat([flat, flat.new_zeros(1)])[source]


def _in_front(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of what is chosen [B, L], in order, and which of them are there: both [B, C]."""
    place = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(chosen.sum(1).max())]
    return place, chosen.gather(1, place)


def _take(stream: Tensor, place: Tensor, there: Tensor, filler: int) -> Tensor:
    """The columns `place` of a stream [B, L], or of each axis of one [A, B, L]."""
    place, there = place.expand(*stream.shape[:-1], -1), there.expand(*stream.shape[:-1], -1)
    return stream.gather(-1, place).masked_fill(~there, filler)


def _cat(*streams: Tensor) -> Tensor:
    return torch.cat(streams, -1)
