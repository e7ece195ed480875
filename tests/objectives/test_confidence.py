"""Confidence: to be surer of what is right already, whatever the split into micro-batches."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dmllm.objectives import build_objective
from dmllm.objectives.confidence import confidence_loss
from dmllm.objectives.draws import Draws
from dmllm.types import IGNORE, PADDING, Batch, SpecialTokens

WORDS, MASK = 6, 6
SPECIAL = SpecialTokens(mask=MASK, eos=0, pad=0)
LOG = torch.log(torch.tensor([0.5, 0.3, 0.2]))  # most probable: word 0
ENTROPY = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))


def loss(logits, targets, answers=None, temperature=1.0) -> float:
    answers = torch.zeros(len(targets), dtype=torch.int64) if answers is None else torch.tensor(answers)
    found = confidence_loss(logits, torch.tensor(targets), answers, torch.tensor(1.0), temperature)
    return float(found.total)


def test_it_is_the_mean_entropy_where_the_most_probable_word_is_right():
    uniform = torch.tensor([1e-4, 0.0, 0.0])
    logits = torch.stack([LOG, LOG, uniform])
    assert loss(logits, [0, 1, 0]) == pytest.approx((ENTROPY + math.log(3)) / 2, rel=1e-4)
    assert loss(logits, [1, 2, 1]) == 0, "nothing is right"


def test_a_temperature_of_one_half_measures_the_squared_probabilities():
    squared = torch.tensor([0.25, 0.09, 0.04])
    squared = squared / squared.sum()
    assert loss(LOG[None], [0], temperature=0.5) == pytest.approx(float(torch.special.entr(squared).sum()), rel=1e-5)


def test_answers_count_alike_however_many_of_their_tokens_are_right():
    uniform = torch.tensor([1e-4, 0.0, 0.0])
    logits = torch.stack([LOG, LOG, LOG, uniform, LOG])
    assert loss(logits, [0, 0, 0, 0, 2], [0, 0, 0, 1, 2]) == pytest.approx(ENTROPY + math.log(3), rel=1e-4)


def test_what_is_wrong_has_no_gradient_and_what_is_right_becomes_more_probable():
    logits = torch.stack([LOG, LOG, LOG]).requires_grad_()
    impossible = logits.masked_fill(torch.tensor([False, False, True]), -torch.inf)  # as zero masking does
    answers = torch.zeros(3, dtype=torch.int64)
    confidence_loss(impossible, torch.tensor([0, 1, 0]), answers, torch.tensor(1.0), 0.5).total.backward()
    assert logits.grad is not None
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[:, 2] == 0).all()
    assert (logits.grad[[0, 2], 0] < 0).all()
    assert (logits.grad[[0, 2], 1] > 0).all()


def batch_of(rows: list[int], width: int, start: int) -> Batch:
    """Rows of two documents, the second of `rows` tokens, whose first token is the prompt."""
    documents = torch.tensor([[0] * 3 + [1] * n + [PADDING] * (width - 3 - n) for n in rows])
    ids = torch.randint(0, WORDS, (9, 12), generator=torch.Generator().manual_seed(0))[
        start : start + len(rows), :width
    ]
    labels = ids.masked_fill(documents == PADDING, IGNORE)
    labels[:, [0, 3]] = IGNORE
    positions = torch.tensor([[0, 1, 2, *range(n), *[0] * (width - 3 - n)] for n in rows])
    indices = torch.arange(start, start + len(rows))
    slots = torch.full_like(ids, -1)
    return Batch(
        input_ids=ids, labels=labels, image_slots=slots, documents=documents, positions=positions, indices=indices
    )


def table(*, input_ids, positions, rows, **_):
    """A model that says for each token something of its own, which depends on what is shown at its left."""
    left = input_ids.roll(1, 1).flatten()[rows]
    scores = torch.randn(WORDS + 1, 12, WORDS + 1, generator=torch.Generator().manual_seed(3)) * 2
    return SimpleNamespace(logits=scores[left, positions.flatten()[rows]])


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize(("name", "visibility"), [("masked", "full"), ("masked", "prefix"), ("block", "block:2")])
def test_it_is_the_mean_over_answers_in_one_batch_or_several(name, visibility, complementary):
    """By hand: per answer and view, over hidden tokens that are predicted right; an answer without any counts 0."""
    options = {"confidence": 2.0, "confidence_temperature": 0.5, "complementary": complementary}
    learned = build_objective(name, options, SPECIAL, visibility)
    assert learned.coefficients == {"confidence": 2.0}

    def summed(parts: list[Batch]) -> tuple[list[float], list]:
        noised = [learned.prepare(p, Draws(seed=0, step=0, num_examples=4, indices=p.indices)) for p in parts]
        losses = [learned.loss(table, n)["confidence"] for n in noised]
        assert [float(x.count) for x in losses] == [float(n.counts["confidence"]) for n in noised]
        return [float(sum(x.total for x in losses)), float(sum(x.count for x in losses))], noised

    whole, (noised,) = summed([batch_of([6, 4, 2, 5], 9, 0)])
    split, _ = summed([batch_of([6], 11, 0), batch_of([4, 2, 5], 8, 1)])
    assert split == pytest.approx(whole, rel=1e-5)
    assert whole[1] == (16 if complementary else 8)

    batch, found = noised.batch, {}
    logits = table(input_ids=batch.input_ids, positions=batch.positions, rows=noised.rows).logits
    length = batch.input_ids.shape[1]
    for row, target, scores in zip(noised.rows.tolist(), noised.targets.tolist(), logits, strict=True):
        at, column = divmod(row, length)
        answer = at, batch.documents[at, column].item(), view(noised, at, column)
        right = found.setdefault(answer, [])
        if scores.argmax() == target:
            right.append(float(torch.special.entr((scores / 0.5).softmax(-1)).sum()))
    assert whole[0] == pytest.approx(sum(sum(x) / len(x) for x in found.values() if x), rel=1e-4)
    assert any(found.values())


def view(noised, row: int, column: int) -> int:
    """Which view a row of the stream is of, where they stand behind one another: by their ranks."""
    look = noised.visibility
    copies = look.canvas[row] & (noised.batch.documents[row] == noised.batch.documents[row, column])
    same = copies & (noised.batch.positions[row] == noised.batch.positions[row, column])
    return int((same[: column + 1]).sum())


def test_it_changes_nothing_else():
    batch = batch_of([6, 4], 9, 0)
    losses = []
    for options in ({}, {"confidence": 1.0}):
        learned = build_objective("masked", options, SPECIAL, "full")
        draws = Draws(seed=0, step=0, num_examples=2, indices=batch.indices)
        losses.append(learned.loss(table, learned.prepare(batch, draws)))
    assert torch.equal(losses[0]["masked"].total, losses[1]["masked"].total)
    assert [*losses[0]] == ["masked"]
    with pytest.raises(ValueError, match=r"dParallel has 2 and 0\.5"):
        build_objective("masked", {"confidence": -1.0}, SPECIAL, "full")


def test_a_model_that_learns_it_becomes_surer_and_no_less_right():
    """A table of logits per token: with the loss alone 0.8 is reached by the data's shares; with confidence more."""
    targets = torch.tensor([0] * 8 + [1] * 2)
    answers, sure = torch.arange(10), []
    for coefficient in (0.0, 1.0):
        logits = torch.zeros(3, requires_grad=True)
        for _ in range(300):
            rows = logits.expand(10, 3)
            total = F.cross_entropy(rows, targets)
            total = total + coefficient * confidence_loss(rows, targets, answers, torch.tensor(10.0), 1.0).total / 10
            (gradient,) = torch.autograd.grad(total, logits)
            logits = (logits - gradient).detach().requires_grad_()
        sure.append(float(logits.detach().softmax(-1)[0]))
    assert sure[0] == pytest.approx(0.8, abs=0.02)
    assert sure[1] > 0.9
