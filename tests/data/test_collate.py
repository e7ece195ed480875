"""Rows of different lengths and images as one batch, from which each row can be read back."""

import pytest
import torch
from PIL import Image

from dmllm.data.collate import collate
from dmllm.types import IGNORE, PADDING, PREFIX, ROW_BREAK, TEXT, Example, SpecialTokens

SPECIAL = SpecialTokens(pad=0, eos=1, mask=2, image=3)
RED = Image.new("RGB", (4, 4), (255, 0, 0))


def example(length, tiles=0, index=0):
    slots = torch.full((length,), TEXT)
    slots[: 4 * tiles] = torch.arange(4 * tiles)
    if tiles:
        slots[4 * tiles] = ROW_BREAK
    return Example(
        input_ids=torch.arange(10, 10 + length),
        labels=torch.full((length,), IGNORE),
        image_slots=slots,
        documents=torch.zeros(length, dtype=torch.int64),
        positions=torch.arange(length),
        pixel_values=torch.full((tiles, 3, 2, 2), index, dtype=torch.uint8) if tiles else None,
        index=index,
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_row_is_found_again_behind_its_padding(side):
    rows = [example(6, 1, 5), example(3, 0, 6), example(9, 2, 7)]
    batch = collate(rows, SPECIAL, rows_per_tile=4, side=side)
    assert batch.input_ids.shape == (3, 9)
    assert batch.indices.tolist() == [5, 6, 7]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [5, 7, 7]
    for row, one in enumerate(rows):
        kept = batch.documents[row] != PADDING
        assert kept.tolist() == sorted(kept.tolist(), reverse=side == "right")
        assert torch.equal(batch.input_ids[row][kept], one.input_ids)
        assert torch.equal(batch.positions[row][kept], one.positions)
        assert (batch.input_ids[row][~kept] == SPECIAL.pad).all()
        assert (batch.labels[row][~kept] == IGNORE).all()
        assert (batch.image_slots[row][~kept] == TEXT).all()
        assert (batch.positions[row][~kept] == 0).all()
    slots = [batch.image_slots[row][batch.image_slots[row] >= 0].tolist() for row in range(3)]
    assert slots == [[0, 1, 2, 3], [], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert (batch.image_slots == ROW_BREAK).sum() == 2


def test_a_batch_of_text_has_no_pixels():
    assert collate([example(3), example(2)], SPECIAL).pixel_values is None


def test_lengths_are_rounded_up():
    assert collate([example(3)], SPECIAL, pad_to_multiple=8).input_ids.shape == (1, 8)
    assert collate([example(16)], SPECIAL, pad_to_multiple=8).input_ids.shape == (1, 16)


@pytest.mark.parametrize("scored", [True, False])
def test_end_tokens_continue_the_last_document(make_processor, record, scored):
    processor = make_processor(turns="each", image_prefix=True)
    turns = [("user", [("image", RED), "a?"]), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    one = processor.example(record(*turns), generator=torch.Generator())
    batch = collate([one, example(len(one) + 3)], SPECIAL, rows_per_tile=4, eos_padding="batch", score_padding=scored)
    assert batch.input_ids[0, -3:].tolist() == [1, 1, 1]
    assert batch.labels[0, -3:].tolist() == ([1, 1, 1] if scored else [IGNORE] * 3)
    assert batch.documents[0, -3:].tolist() == [1, 1, 1]
    last = int(one.positions[-1])
    assert batch.positions[0, -3:].tolist() == [last + 1, last + 2, last + 3]
    assert torch.equal(batch.input_ids[0, :-3], one.input_ids)
    assert batch.documents[0, 0] == PREFIX


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="at least one example"):
        collate([], SPECIAL)
    with pytest.raises(ValueError, match="rows_per_tile"):
        collate([example(6, 1)], SPECIAL)
    with pytest.raises(ValueError, match="side='right'"):
        collate([example(3)], SPECIAL, side="left", eos_padding="batch")
