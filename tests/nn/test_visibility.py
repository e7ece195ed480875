"""The rule of attention equals the masks written out by hand, in its dense and in its flex form."""

from dataclasses import replace

import pytest
import torch

from dmllm.nn.visibility import Visibility, layout, visible
from dmllm.types import PADDING, PREFIX


def rows(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def mask(visibility: Visibility, context: Visibility | None = None) -> list[list[int]]:
    return visibility.dense(None if context is None else Visibility.cat(context, visibility))[0, 0].int().tolist()


def test_full_layout_sees_all_of_its_document_and_nothing_else():
    look = layout("full", documents=rows(0, 0, 1, 1, PADDING), canvas=rows(0, 1, 0, 1, 0).bool())
    assert mask(look) == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_causal_layout_is_the_lower_triangle():
    look = layout("causal", documents=rows(0, 0, 0), canvas=rows(1, 1, 1).bool())
    assert mask(look) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_prefix_layout_shows_the_prompt_to_the_answer_and_not_the_answer_to_the_prompt():
    look = layout("prefix", documents=rows(0, 0, 0, 0), canvas=rows(0, 0, 1, 1).bool())
    assert mask(look) == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_prefix_rows_are_seen_by_every_document_and_see_only_each_other():
    look = layout("prefix", documents=rows(PREFIX, PREFIX, 0, 0, 1, 1), canvas=rows(0, 0, 0, 1, 0, 1).bool())
    assert mask(look) == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_block_diffusion_training_mask_is_that_of_bd3lm():
    """Noisy copy x_t then clean copy x_0, blocks of two: block-diagonal, offset block-causal, block-causal."""
    rank = rows(0, 0, 1, 1, 0, 0, 1, 1)
    look = Visibility(rank, rows(1, 1, 1, 1, 0, 0, 0, 0).bool(), torch.zeros_like(rank))
    assert mask(look) == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


def test_permutation_streams_follow_the_order_not_the_place():
    """XLNet: order 2, 0, 1; queries see content of lower rank, content sees content up to its own rank."""
    order = rows(1, 2, 0, 1, 2, 0)
    look = Visibility(order, rows(1, 1, 1, 0, 0, 0).bool(), torch.zeros_like(order))
    by_hand = [
        [1, 0, 0, 0, 0, 1],
        [0, 1, 0, 1, 0, 1],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 1],
    ]
    assert mask(look) == by_hand


def test_padding_sees_only_itself_and_is_never_seen():
    look = layout("prefix", documents=rows(0, 0, PADDING, PADDING), canvas=rows(0, 1, 0, 0).bool())
    assert mask(look) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_rows_behind_a_cache_see_what_they_would_see_in_one_stream():
    torch.manual_seed(0)
    documents = torch.tensor([[PREFIX, 0, 0, 0, PADDING, 0, 0]])
    canvas = torch.tensor([[0, 0, 0, 0, 0, 1, 1]]).bool()
    whole = layout("prefix", documents=documents, canvas=canvas)
    head, tail = (
        Visibility(whole.rank[:, s], whole.canvas[:, s], whole.document[:, s]) for s in (slice(5), slice(5, 7))
    )
    assert mask(tail, head) == mask(whole)[5:]


@pytest.mark.parametrize("narrowed", [False, True])
def test_dense_and_flex_forms_are_one_rule(narrowed):
    torch.manual_seed(1)
    rank = torch.randint(-2, 3, (2, 24))
    look = Visibility(rank, torch.rand(2, 24) < 0.5, torch.randint(-2, 3, (2, 24)))
    if narrowed:
        look = replace(look, place=torch.randint(0, 9, (2, 24)), extra=torch.rand(9, 9) < 0.5)
    block = look.flex()
    grid = [
        torch.arange(n).view([-1 if i == d else 1 for d in range(4)]) for i, n in enumerate((2, 1, 24, 24)) for d in [i]
    ]
    assert torch.equal(block.mask_mod(*grid).expand(2, 1, 24, 24), look.dense())


def test_a_mask_over_places_narrows_what_the_rule_shows_wherever_rows_are_moved_to():
    torch.manual_seed(2)
    documents, canvas = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, PADDING]]), torch.ones(2, 5).bool()
    look, place = layout("full", documents=documents, canvas=canvas), torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
    extra = torch.rand(4, 4) < 0.5
    narrowed = replace(look, place=place, extra=extra)
    itself = torch.eye(5, dtype=torch.bool)
    for row in range(2):
        by_hand = look.dense()[row, 0] & extra[place[row][:, None], place[row]] | itself
        assert torch.equal(narrowed.dense()[row, 0], by_hand)
        assert torch.equal(narrowed.select(slice(row, row + 1)).dense()[0, 0], by_hand)
        assert torch.equal(narrowed.repeat(2).dense()[2 + row, 0], by_hand)
        order = torch.randperm(5)
        assert torch.equal(narrowed.take(order.expand(2, -1)).dense()[row, 0], by_hand[order][:, order])
    with pytest.raises(ValueError, match="leave the cache out"):
        narrowed.dense(look)


def test_the_rule_is_its_four_lines():
    """Exhaustively over two ranks, both streams: canvas-canvas equal, canvas-context below, context-context up to."""
    for q_rank in (0, 1):
        for k_rank in (0, 1):
            for q_canvas in (True, False):
                for k_canvas in (True, False):
                    q = (torch.tensor(q_rank), torch.tensor(q_canvas), torch.tensor(0))
                    k = (torch.tensor(k_rank), torch.tensor(k_canvas), torch.tensor(0))
                    expected = {
                        (True, True): k_rank == q_rank,
                        (True, False): k_rank < q_rank,
                        (False, False): k_rank <= q_rank,
                        (False, True): False,
                    }[q_canvas, k_canvas]
                    assert bool(visible(*q, *k)) == expected
