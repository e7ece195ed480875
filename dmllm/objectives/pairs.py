"""Pairs for next-sentence prediction: the second part of some documents gives way to that of another example.

A document's second part is its last answer with all that stands behind it, or the second half of that answer. What
takes its place keeps its own tokens and labels, at the positions that follow the first part, so that a row may grow or
shrink. Whether, and by whose, is drawn for each document from its example's own numbers; whose it can be is what the
micro-batch holds, so that this alone of all corruptions depends on the split into micro-batches.

Source: Devlin et al., BERT, arXiv:1810.04805, section 3.1. Shapes: B rows, L tokens, L' after, D documents of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.objectives.draws import Draws
from dmllm.objectives.views import FILLERS
from dmllm.types import IGNORE, PADDING, Batch

COIN, CHOICE = 4, 5  # streams of an example's random numbers
NEXT, ANOTHER = 0, 1  # the classes


@dataclass(frozen=True)
class Pair:
    """One document of a batch, in columns of its row."""

    row: int
    document: int
    start: int
    cut: int  # where its second part begins
    end: int
    ids: tuple[int, ...]  # of the second part


def other_answers(batch: Batch, draws: Draws, cut: str) -> tuple[Batch, Tensor, Tensor]:
    """The batch with every second document's second part replaced by a different one of another document.

    Where there is none that differs, a document stays as it is.

    Args:
        cut: answer or half.

    Returns:
        The batch [B, L'], the first row of each document as an index into B * L', and its class; both [D] int64.

    Raises:
        ValueError: a step of several examples comes one by one.
    """
    pairs = [pair for row in range(len(batch)) for pair in _pairs(batch, row, cut)]
    if len(batch) == 1 < draws.num_examples and len(pairs) < 2:
        raise ValueError(
            "next_sentence takes other answers from the micro-batch, and this one holds a single example; set "
            "micro_batch_size=8, or more."
        )
    pairs.sort(key=lambda pair: (int(batch.indices[pair.row]), pair.document))
    width = max((pair.document for pair in pairs), default=0) + 1
    coin, choice = draws.uniform(width, COIN), draws.uniform(width, CHOICE)
    given: dict[tuple[int, int], Pair] = {}
    for pair in pairs:
        others = [one for one in pairs if one.ids != pair.ids]
        if others and coin[pair.row, pair.document] < 0.5:
            given[pair.row, pair.document] = others[int(choice[pair.row, pair.document] * len(others))]
    pairs.sort(key=lambda pair: (pair.row, pair.start))
    rows, firsts = [], []
    for number in range(len(batch)):
        pieces, at, length = [], 0, 0
        for pair in (own for own in pairs if own.row == number):
            firsts.append((number, length + pair.start - at))
            other = given.get((pair.row, pair.document), pair)
            pieces += [_piece(batch, number, at, pair.cut), _moved(batch, other, pair)]
            length += pair.cut - at + other.end - other.cut
            at = pair.end
        pieces.append(_piece(batch, number, at, batch.labels.shape[1]))
        rows.append({name: torch.cat([piece[name] for piece in pieces], -1) for name in FILLERS})
    streams = _stack(rows)
    device, length = batch.labels.device, streams["labels"].shape[1]
    first = torch.tensor([row * length + column for row, column in firsts], dtype=torch.int64, device=device)
    known = [ANOTHER if (pair.row, pair.document) in given else NEXT for pair in pairs]
    return replace(batch, **streams), first, torch.tensor(known, dtype=torch.int64, device=device)


def _pairs(batch: Batch, row: int, cut: str) -> list[Pair]:
    """The documents of a row that have an answer and something before it."""
    documents, labels, ids = batch.documents[row].cpu(), batch.labels[row].cpu(), batch.input_ids[row].cpu()
    found = []
    for number in documents[documents >= 0].unique().tolist():
        columns = (documents == number).nonzero().flatten()
        start, end = int(columns[0]), int(columns[-1]) + 1
        labelled = labels[start:end] != IGNORE
        if not bool(labelled.any()):
            continue
        stop = end - int(labelled.flip(0).int().argmax())  # behind the last labelled token
        shown = (labels[start:stop] == IGNORE).nonzero()
        answer = start + (int(shown[-1]) + 1 if len(shown) else 0)
        place = answer
        if cut == "half" or answer == start:
            place += (_written(labels[answer:stop]) + 1) // 2
        if start < place < stop:
            found.append(Pair(row, number, start, place, end, tuple(ids[place:stop].tolist())))
    return found


def _written(labels: Tensor) -> int:
    """How long an answer is without the repetitions of its last token that fill it up."""
    differs = (labels != labels[-1]).nonzero()
    return int(differs[-1]) + 2 if len(differs) else 1


def _piece(batch: Batch, row: int, start: int, end: int) -> dict[str, Tensor]:
    return {name: getattr(batch, name)[..., row, start:end] for name in FILLERS}


def _moved(batch: Batch, other: Pair, own: Pair) -> dict[str, Tensor]:
    """The second part of one document as that of another."""
    piece = _piece(batch, other.row, other.cut, other.end)
    shift = batch.positions[..., own.row, own.cut] - batch.positions[..., other.row, other.cut]
    documents = torch.full_like(piece["documents"], own.document)
    return {**piece, "positions": piece["positions"] + shift[..., None], "documents": documents}


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several lengths, padded to the longest without its own padding: [B, L'] or [4, B, L'] each."""
    real = [(row["documents"] != PADDING).nonzero().flatten() for row in rows]
    width = max([1, *(int(places[-1]) + 1 for places in real if len(places))])

    def fitted(row: dict[str, Tensor], name: str) -> Tensor:
        value = row[name][..., :width]
        return F.pad(value, (0, width - value.shape[-1]), value=FILLERS[name])

    return {name: torch.stack([fitted(row, name) for row in rows], -2) for name in FILLERS}
