"""Which turns become a document, and what is cut first when a row is too long."""

import numpy as np
import pytest
import torch

from dmllm.data.packing import Chunk, fit, lay_out, length, split_turns
from dmllm.types import IGNORE, PREFIX, TEXT


def message(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


IMAGE = {"type": "image", "image": "x"}
TALK = [
    message("system", "s"),
    message("user", IMAGE, "a"),
    message("assistant", "A"),
    message("user", "b"),
    message("user", "c"),
    message("assistant", "C"),
    message("user", "unanswered"),
]


def said(conversations):
    return ["".join(p.get("text", "*") for m in c for p in m["content"]) for c in conversations]


def test_turns_all_one_and_each():
    draws = torch.Generator().manual_seed(0)
    assert said(split_turns(TALK, "all", draws)) == ["s*aAbcC"]
    assert said(split_turns(TALK, "each", draws)) == ["s*aA", "s*bcC"]
    assert {said(split_turns(TALK, "one", draws))[0] for _ in range(20)} == {"s*aA", "s*aAbcC"}
    with pytest.raises(ValueError, match="no assistant turn"):
        split_turns(TALK[:2], "all", draws)


def ids(*values):
    return np.array(values, dtype=np.int64)


def test_documents_are_laid_out_behind_the_rows_they_share():
    shared = [Chunk(ids(5)), Chunk(ids(9, 9), ids(0, 1))]
    documents = [
        [*shared, Chunk(ids(6)), Chunk(ids(7, 1), is_answer=True)],
        [*shared, Chunk(ids(8, 1), is_answer=True)],
    ]
    row = lay_out(documents, 2, None, 4)
    assert row.input_ids.tolist() == [5, 9, 9, 6, 7, 1, 8, 1]
    assert row.labels.tolist() == [IGNORE] * 4 + [7, 1, 8, 1]
    assert row.image_slots.tolist() == [TEXT, 0, 1] + [TEXT] * 5
    assert row.documents.tolist() == [PREFIX] * 3 + [0] * 3 + [1] * 2
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert row.index == 4


def test_rows_that_differ_in_front_of_the_image_cannot_be_shared():
    slots = ids(0)
    with pytest.raises(ValueError, match="differs between turns"):
        lay_out([[Chunk(ids(5)), Chunk(ids(9), slots)], [Chunk(ids(6)), Chunk(ids(9), slots)]], 2, None, 0)


def test_padding_is_cut_before_the_answer():
    document = [Chunk(ids(5)), Chunk(ids(7, 1), is_answer=True), Chunk(ids(1, 1, 1), is_padding=True)]
    for limit, answer, padding in ((6, 2, 3), (5, 2, 2), (4, 2, 1), (3, 2, 0), (2, 1, 0)):
        (kept,) = fit([document], 0, limit)
        assert length([c for c in kept if c.is_answer]) == answer
        assert length([c for c in kept if c.is_padding]) == padding
        assert length(kept) == min(limit, 6)
    with pytest.raises(ValueError, match="takes 1 rows"):
        fit([document], 0, 1)
