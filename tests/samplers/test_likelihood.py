"""The likelihood of an answer under a model with exact conditionals is the model's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.likelihood import Noise, bound, draw_views, likelihood, view_values
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


def of_noise(model: TableModel, answer: torch.Tensor, noise: Noise) -> torch.Tensor:
    """What each view says of a whole answer, [S, 1]."""
    length = len(answer)
    return view_values(model, answer, noise.hides(torch.arange(length)), model.mask, 1000)[:, None]


class Wrong(Sure):
    """Conditionals that belong to no joint distribution: each sharper than it should be."""

    def __call__(self, canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        return 1.7 * super().__call__(canvas, rows).log_softmax(-1).clamp(min=-1e9)


def in_any_order(model: TableModel, answer: torch.Tensor) -> float:
    """The probability of writing `answer` token by token in an order drawn at random."""
    total, length = 0.0, len(answer)
    orders = list(itertools.permutations(range(length)))
    for order in orders:
        known, log_prob = torch.zeros(1, length, dtype=torch.bool), 0.0
        for place in order:
            canvas = Canvas.of(answer[None], known, model.mask)
            log_prob += float(model(canvas, torch.tensor([[place]])).log_softmax(-1)[0, 0, answer[place]])
            known = known.clone()
            known[0, place] = True
        total += torch.tensor(log_prob).exp().item() / len(orders)
    return total


def test_it_is_a_lower_bound_and_tight_where_the_conditionals_are_exact() -> None:
    noise = Noise.draw(8, 3, torch.Generator().manual_seed(0))
    exact, wrong = Sure(vocab=3, length=3), Wrong(vocab=3, length=3)
    gaps = []
    for answer, probability in zip(exact.texts, exact.probs, strict=True):
        for model, gap in ((exact, 0.0), (wrong, None)):
            whole = bound(model, answer, noise, torch.arange(3), 0, model.mask, 100)
            assert torch.equal(whole, whole[:1].expand(8)), "seven views are all there are"
            behind = torch.tensor(in_any_order(model, answer)).log() - float(whole[0])
            assert behind > -1e-4
            if gap is None:
                gaps.append(float(behind))
            else:
                torch.testing.assert_close(whole[0], probability.log(), atol=1e-5, rtol=0)
    assert max(gaps) > 0.01


def test_the_standard_error_is_the_spread_over_seeds() -> None:
    model = Sure(vocab=3, length=6, seed=1)
    answer, found, errors = model.texts[100], [], []
    for seed in range(150):
        noise = Noise.draw(64, 6, torch.Generator().manual_seed(seed))
        values = of_noise(model, answer, noise)
        found.append(float(values.mean()))
        errors.append(noise.standard_error(values))
    spread = float(torch.tensor(found).std())
    assert abs(float(torch.tensor(found).mean()) - float(model.probs[100].log())) < 4 * spread / 150**0.5
    assert 0.8 < float(torch.tensor(errors).mean()) / spread < 1.25


def test_of_several_blocks_the_standard_error_adds_up() -> None:
    """Blocks have lines of their own, each spread evenly, drawn apart: what they say is not correlated."""
    found, errors = [], []
    for seed in range(300):
        noise = Noise.draw(32, 4, torch.Generator().manual_seed(seed), blocks=2)
        assert all(torch.bincount((noise.level[:, b] * 4).long()).tolist() == [8] * 4 for b in range(2))
        shown = torch.stack([noise.hides(torch.arange(4), b).double() @ torch.randn(4).double() for b in range(2)], 1)
        shown += torch.randn(shown.shape)
        found.append(float((shown - shown.mean(0)).sum(1).var() / 32))
        errors.append(noise.standard_error(shown) ** 2)
    assert float(torch.tensor(errors).mean()) < 1.1 * float(torch.tensor(found).mean())
    assert Noise.draw(4, 3, torch.Generator()).standard_error(torch.ones(4, 1)) == 0


def test_views_in_common_make_differences_less_noisy() -> None:
    """Two answers that differ in one token, hidden alike and by numbers of their own; neighbours go together."""
    model = Sure(vocab=3, length=6)
    draws = torch.Generator().manual_seed(0)
    alone, pairs = (torch.randn(n, 3, generator=draws, dtype=torch.float64) for n in (6, 3))
    energy = sum(alone[i, model.texts[:, i]] + 2 * pairs[model.texts[:, i], model.texts[:, i - 1]] for i in range(6))
    model.probs = torch.as_tensor(energy).softmax(0)
    first, second = model.texts[100], model.texts[101]
    common, apart, errors = [], [], []
    for seed in range(100):
        noise, other = (Noise.draw(64, 6, torch.Generator().manual_seed(s)) for s in (seed, seed + 1000))
        alike = of_noise(model, first, noise) - of_noise(model, second, noise)
        common.append(float(alike.mean()))
        errors.append(noise.standard_error(alike))
        apart.append(float((of_noise(model, first, noise) - of_noise(model, second, other)).mean()))
    spread = torch.tensor(common).std()
    assert float(spread) < 0.8 * float(torch.tensor(apart).std())
    assert 0.75 < float(torch.tensor(errors).mean() / spread) < 1.3


def test_a_token_is_hidden_alike_in_answers_of_other_lengths() -> None:
    noise = Noise.draw(50, 9, torch.Generator().manual_seed(0))
    short, long = noise.hides(torch.arange(4)), noise.hides(torch.arange(8))
    alike = (short == long[:, :4]).double().mean()
    other = Noise.draw(50, 9, torch.Generator().manual_seed(1)).hides(torch.arange(8))
    assert alike > 0.8 > (short == other[:, :4]).double().mean() + 0.1


def test_of_a_constant_cost_the_exact_count_has_no_variance_and_times_of_ones_own_have() -> None:
    """Where as many are hidden as the weight says, nothing varies; where each is hidden alone, their number does."""
    uniform = lambda canvas, rows: torch.zeros(*rows.shape, 5)
    answer = torch.zeros(64, dtype=torch.int64)
    draws = torch.Generator().manual_seed(0)
    values = view_values(uniform, answer, draw_views(64, 100, draws), 4, 100)
    torch.testing.assert_close(values, values[:1].expand(100), atol=1e-4, rtol=0)
    torch.testing.assert_close(values[0], 64 * torch.tensor(1 / 5, dtype=torch.float64).log(), atol=1e-4, rtol=0)
    time = torch.rand(4000, 1, generator=draws, dtype=torch.float64).clamp(min=0.05)
    weighted = (torch.rand(4000, 64, generator=draws) < time).sum(1) / (64 * time.squeeze(1))  # 1 on average
    assert float(weighted.var()) > 0.02


def test_a_view_coupled_with_its_complement_is_unbiased_and_varies_less() -> None:
    """l hidden of n with l from 0 to n, weight (n + 1) / l, averaged with the n - l others (ESPO)."""
    model = Wrong(vocab=3, length=4)
    answer, subsets = model.texts[40], torch.tensor(list(itertools.product([False, True], repeat=4)))
    sizes = subsets.sum(1)
    chance = 1 / (5 * torch.bincount(sizes)[sizes].double())
    values = torch.zeros(16, dtype=torch.float64)
    values[1:] = view_values(model, answer, subsets[1:], model.mask, 100) * 5 / 4
    coupled = (values + values.flip(0)) / 2  # the complement of a subset is its mirror image in this order
    assert torch.equal(subsets.flip(0), ~subsets)
    expected = likelihood(model, answer, views(4), model.mask, 1000)
    for estimate in (values, coupled):
        torch.testing.assert_close((estimate * chance).sum(), expected, atol=1e-6, rtol=0)
    spread = [float((chance * (estimate - expected) ** 2).sum()) for estimate in (values, coupled)]
    assert spread[1] < 0.5 * spread[0]
