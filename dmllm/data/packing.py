"""Documents behind one image prefix: which turns become a document, and how documents become one row.

A document is a list of chunks (ids that share slots and supervision). All documents of a row begin with the same
`shared` chunks when the image is a prefix; these are laid out once, as rows of document PREFIX at positions 0..p-1, and
every document continues at position p, so that a packed document has the ids and positions it has alone.

    turns: all    one document, every assistant turn labelled                      (LLaVA, LLaDA-V)
    turns: one    one document up to a random assistant turn, only that labelled   (LaViDa)
    turns: each   one document for every assistant turn, without the other turns
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from dmllm.tiling import Grid, Resize, axis_positions
from dmllm.types import IGNORE, PREFIX, TEXT, Example, Message, Part

Turns = Literal["all", "one", "each"]


class Chunk(NamedTuple):
    """Consecutive rows of one document that are alike."""

    ids: np.ndarray  # [n] int64
    slots: np.ndarray | None = None  # [n] int64 for the rows of an image
    is_answer: bool = False  # labelled; cut from the end if the row is too long
    is_padding: bool = False  # end tokens behind an answer
    is_scored: bool = True  # padding only: whether it is labelled
    grid: Grid | None = None  # of an image of native size


Document = list[Chunk]


def split_turns(messages: list[Message], turns: Turns, generator: torch.Generator) -> list[list[Message]]:
    """The conversations that a record's messages become, each ending in an assistant turn.

    Raises:
        ValueError: there is no assistant turn.
    """
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no assistant turn, so there is nothing to learn from.")
    if turns == "all":
        return [messages[: answers[-1] + 1]]
    if turns == "one":
        chosen = int(torch.randint(len(answers), (), generator=generator))
        return [messages[: answers[chosen] + 1]]
    conversations = []
    system = [m for m in messages[: answers[0]] if m["role"] == "system"]
    images: list[Part] = []
    start = len(system)
    for end in answers:
        turn = messages[start : end + 1]
        conversations.append([*system, *_with_images_in_front(turn, images)])
        images += [part for m in turn for part in m["content"] if part["type"] == "image"]
        start = end + 1
    return conversations


def _with_images_in_front(turn: list[Message], images: list[Part]) -> list[Message]:
    if not images:
        return turn
    for number, message in enumerate(turn):
        if message["role"] == "user":
            changed: Message = {**message, "content": [*images, *message["content"]]}
            return [*turn[:number], changed, *turn[number + 1 :]]
    return turn


def only_last_answer(document: Document) -> Document:
    """The document with its last answer labelled and the earlier ones not."""
    return [*(chunk._replace(is_answer=False) for chunk in document[:-1]), document[-1]]


def leading_images(messages: list[Message], document: Document) -> int:
    """How many chunks reach up to the last of the images that open the first question."""
    leading = 0
    for message in messages:
        images = [part["type"] == "image" for part in message["content"]]
        if message["role"] == "user":
            leading += images.index(False) if False in images else len(images)
            break
        leading += sum(images)
    places = [k + 1 for k, chunk in enumerate(document) if chunk.slots is not None]
    return places[leading - 1] if leading else 0


def tiles_of(documents: list[Document], rows_per_tile: int, resizes: Sequence[Resize] = ()) -> int:
    """How many tiles the documents refer to; a map that is resized to fewer rows than its tiles have needs all."""
    last = max((int(c.slots.max()) for d in documents for c in d if c.slots is not None), default=-1)
    tiles = last // rows_per_tile + 1
    return max([tiles, *(r.tile + r.down * r.across for r in resizes if r.tile < tiles)])


@lru_cache(maxsize=4096)
def repeated(token: int, count: int) -> np.ndarray:
    """`count` times the same id, read-only."""
    ids = np.full(count, token, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def length(chunks: Document) -> int:
    """Rows of a document."""
    return sum([len(chunk.ids) for chunk in chunks])


def fit(documents: list[Document], shared: int, max_length: int) -> list[Document]:
    """The documents that fit into `max_length` rows: whole later documents go first, then whole later turns of the
    only one, then the end of its answer. No image loses a row.

    Raises:
        ValueError: not even the images, or the first question, leave room for an answer.
    """
    prefix = length(documents[0][:shared])
    sizes = np.cumsum([length(d) - prefix for d in documents])
    if prefix + sizes[-1] <= max_length:
        return documents
    kept = int(np.searchsorted(sizes, max_length - prefix, side="right"))
    return documents[:kept] if kept else [_cut(documents[0], max_length)]


def _cut(document: Document, max_length: int) -> Document:
    ends = [k + 1 for k, chunk in enumerate(document) if chunk.is_answer or chunk.is_padding]
    turns = [document[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    room, kept = max_length, []
    for turn in turns:
        size = length(turn)
        if size > room:
            break
        kept += turn
        room -= size
    if any(chunk.is_answer for chunk in kept):
        last = next(k for k in reversed(range(len(kept))) if kept[k].is_answer or kept[k].is_padding)
        return _with_part_of_padding(document, kept[: last + 1], room)
    first = turns[0]
    question = length(first[:-1])
    if max_length - question < 1:
        images = sum(len(c.ids) for c in first if c.slots is not None)
        raise ValueError(
            f"the question takes {question} rows, {images} of them image rows, and max_length={max_length} leaves no "
            f"room for an answer; set max_length to at least {question + len(first[-1].ids)}, or fewer rows per image."
        )
    answer = first[-1]
    return [*first[:-1], answer._replace(ids=answer.ids[: max_length - question])]


def _with_part_of_padding(document: Document, kept: Document, room: int) -> Document:
    following = document[len(kept)] if len(kept) < len(document) else None
    if following is None or not following.is_padding or room < 1:
        return kept
    return [*kept, following._replace(ids=following.ids[:room])]


def lay_out(
    documents: list[Document],
    shared: int,
    pixel_values: torch.Tensor | None,
    index: int,
    resizes: Sequence[Resize] = (),
) -> Example:
    """One row of documents, the first `shared` chunks of each laid out once in front.

    Raises:
        ValueError: the shared chunks are not the same in every document.
    """
    front = documents[0][:shared]
    for document in documents[1:]:
        for a, b in zip(front, document, strict=False):
            if a.slots is not b.slots or a.ids.tobytes() != b.ids.tobytes():
                raise ValueError("what comes before the image differs between turns, so it cannot be a shared prefix.")
    chunks = list(front)
    prefix = length(front)
    owners, shifts = [PREFIX] * shared, [0] * shared
    at = prefix
    for number, document in enumerate(documents):
        own = document[shared:]
        chunks += own
        owners += [number] * len(own)
        shifts += [at - prefix] * len(own)
        at += length(own)
    sizes = [len(chunk.ids) for chunk in chunks]
    labelled = [c.is_answer or (c.is_padding and c.is_scored) for c in chunks]
    ids = np.concatenate([chunk.ids for chunk in chunks])
    scored, document_ids, shift = np.repeat(np.array([labelled, owners, shifts]), sizes, axis=1)
    slots = np.full(at, TEXT)
    start = 0
    for chunk, size in zip(chunks, sizes, strict=True):
        if chunk.slots is not None:
            slots[start : start + size] = chunk.slots
        start += size
    return Example(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(np.where(scored, ids, IGNORE)),
        image_slots=torch.from_numpy(slots),
        documents=torch.from_numpy(document_ids),
        positions=torch.from_numpy(_positions(documents, shared, np.arange(at) - shift)),
        pixel_values=pixel_values,
        image_resizes=torch.tensor(resizes) if resizes else None,
        image_grids=_grids(chunks),
        index=index,
    )


def _positions(documents: list[Document], shared: int, place: np.ndarray) -> np.ndarray:
    """Each row's place [L]; with images of native size [4, L], the place, then time, height and width."""
    if all(chunk.grid is None for document in documents for chunk in document):
        return place
    front, *own = [
        [chunk.grid or len(chunk.ids) for chunk in part]
        for part in (documents[0][:shared], *(document[shared:] for document in documents))
    ]
    axes = axis_positions(front)
    behind = int(axes.max(initial=-1)) + 1
    return np.concatenate([place[None], np.concatenate([axes, *(axis_positions(o, behind) for o in own)], 1)])


def _grids(chunks: Document) -> torch.Tensor | None:
    """The grids of the images [N, 3], in the order of their tiles."""
    grids = {int(chunk.slots[0]): chunk.grid for chunk in chunks if chunk.slots is not None and chunk.grid is not None}
    return torch.tensor([grids[first] for first in sorted(grids)]) if grids else None
