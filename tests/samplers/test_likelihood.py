"""The likelihood of an answer under a model with exact conditionals is the model's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.likelihood import draw_views, likelihood
from tests.samplers.table import TableModel


class Sure(TableModel):
    """It never says "mask", whose share is lost to the others (as in the authors' code)."""

    def __call__(self, canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        return super().__call__(canvas, rows).index_fill(-1, torch.tensor(self.mask), -torch.inf)


def views(length: int) -> torch.Tensor:
    """Every view, as often as makes each number of hidden tokens equally frequent."""
    subsets = [torch.tensor(view) for view in itertools.product([False, True], repeat=length) if any(view)]
    sizes = [sum(int(view.sum()) == k for view in subsets) for k in range(1, length + 1)]
    common = int(torch.tensor(sizes).prod())
    return torch.stack([view for view in subsets for _ in range(common // sizes[int(view.sum()) - 1])])


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_over_all_views_it_is_exact(batch_size: int) -> None:
    model = Sure(vocab=3, length=3)
    for answer, probability in zip(model.texts, model.probs, strict=True):
        found = likelihood(model, answer, views(3), model.mask, batch_size)
        torch.testing.assert_close(found, probability.log(), atol=1e-5, rtol=0)


def test_over_drawn_views_it_is_unbiased() -> None:
    model = Sure(vocab=3, length=4)
    answer = model.texts[17]
    drawn = draw_views(4, 4000, torch.Generator().manual_seed(0))
    found = likelihood(model, answer, drawn, model.mask, 500)
    assert abs(float(found - model.probs[17].log())) < 0.05


def test_drawn_views_hide_every_number_of_tokens_equally_often_and_every_token_too() -> None:
    drawn = draw_views(5, 1000, torch.Generator().manual_seed(1))
    assert torch.bincount(drawn.sum(1), minlength=6).tolist() == [0, *[200] * 5]
    assert (drawn.double().mean(0) - 0.6).abs().max() < 0.06
    assert draw_views(1, 3, torch.Generator().manual_seed(2)).all()
