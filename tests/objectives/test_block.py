"""Truths of the block objective: exact conditionals, and a small transformer that runs blocks one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.nn.visibility import Visibility
from dmllm.objectives import build_objective
from dmllm.objectives.draws import Draws
from dmllm.types import IGNORE, PADDING, PREFIX, Batch, SpecialTokens
from tests.exact import Joint

MASK = 11
SPECIAL = SpecialTokens(mask=MASK, eos=10, pad=10)


def batch_of(ids, documents=None, positions=None) -> Batch:
    ids = torch.as_tensor(ids)
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else torch.as_tensor(positions)
    return Batch(
        input_ids=ids,
        labels=ids.clone(),
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids) if documents is None else torch.as_tensor(documents),
        positions=positions,
        indices=torch.arange(len(ids)),
    )


def random_batch(rows: int, length: int, prompt: int = 0) -> Batch:
    batch = batch_of(torch.randint(0, 10, (rows, length), generator=torch.Generator().manual_seed(0)))
    batch.labels[:, :prompt] = IGNORE
    return batch


def draws_for(batch: Batch, step: int = 0) -> Draws:
    return Draws(seed=0, step=step, num_examples=len(batch), indices=batch.indices)


def tiny(visibility: str, *, shift: bool = False) -> MultimodalModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DmllmConfig(
        backbone={**shape, "initializer_range": 0.3}, mask_token_id=MASK, visibility=visibility, shift=shift
    )
    model = MultimodalModel(config)
    model.initialise()
    return model.eval()


def objective(visibility: str, name: str = "block", **options):
    return build_objective(name, options, SPECIAL, visibility)


@torch.no_grad()
def mean(learned, model, noised) -> float:
    loss = learned.loss(model, noised)["masked"]
    return float(loss.total / loss.count)


@torch.no_grad()
def block_by_block(model, batch: Batch, hidden: torch.Tensor, time: torch.Tensor, length: int) -> float:
    """What the objective means: each block alone behind what is given before it, as decoding feeds it."""
    total, count = 0.0, 0
    for ids, labels, out, t, real in zip(
        batch.input_ids, batch.labels, hidden, time, batch.documents != PADDING, strict=True
    ):
        count += int((labels != IGNORE).sum())
        for start in range(0, int(real.sum()), length):
            end = min(start + length, int(real.sum()))
            fed = torch.cat([ids[:start], ids[start:end].masked_fill(out[start:end], MASK)])[None]
            scores = model(fed).logits[0, start:].log_softmax(-1)
            for place in range(start, end):
                if out[place]:
                    total -= float(scores[place - start, labels[place]] / t[place])
    return total / count


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("length", "prompt"), [(4, 0), (4, 6), (3, 5), (16, 6)])
def test_one_pass_over_two_copies_scores_what_the_blocks_score_one_by_one(length, prompt, shift):
    """Also where the prompt ends within a block, and where the logits of a token are those of the row before it."""
    model, learned = tiny(f"block:{length}", shift=shift), objective(f"block:{length}")
    batch = random_batch(3, 14, prompt)
    batch.labels[2, 9:] = IGNORE
    batch.documents[2, 9:] = PADDING
    noised = learned.prepare(batch, draws_for(batch))
    hidden, time = drawn(learned, batch)
    assert mean(learned, model, noised) == pytest.approx(block_by_block(model, batch, hidden, time, length), rel=1e-5)


def drawn(learned, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What `prepare` hides, and the times of all rows."""
    time = learned.times(batch, draws_for(batch))
    return (draws_for(batch).uniform(batch.labels.shape[1]) < time) & (batch.labels != IGNORE), time


@pytest.mark.parametrize("shift", [False, True])
def test_with_one_block_it_is_the_masked_objective(shift):
    batch = random_batch(4, 12, prompt=5)
    one = objective("block:12")
    losses = [
        mean(learned, tiny(visibility, shift=shift), learned.prepare(batch, draws_for(batch)))
        for learned, visibility in ((one, "block:12"), (objective("full", "masked"), "full"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_with_blocks_of_one_hidden_token_it_is_next_token_prediction():
    """Every token is hidden and scored by what is before it alone: the chain rule, with a [MASK] at its place."""
    model, learned = tiny("block:1"), objective("block:1", min_noise=1.0)
    batch = random_batch(3, 9, prompt=2)
    noised = learned.prepare(batch, draws_for(batch))
    assert (noised.weights == 1).all()
    with torch.no_grad():
        scores = []
        for end in range(2, 9):
            fed = torch.cat([batch.input_ids[:, :end], torch.full((3, 1), MASK)], 1)
            scores.append(model(fed).logits[:, end].log_softmax(-1).gather(-1, batch.input_ids[:, end : end + 1]))
    assert mean(learned, model, noised) == pytest.approx(-float(torch.cat(scores, 1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        *((length, {}) for length in (1, 2, 4)),
        (1, {"min_noise": 1.0}),
        (2, {"times": "document"}),
        (2, {"complementary": True}),
    ],
)
def test_with_exact_conditionals_the_bound_is_the_entropy_of_the_data_for_every_block_length(length, options):
    joint = Joint(3, 4, mask=MASK)
    batch = batch_of(joint.draw(20_000))
    learned = objective(f"block:{length}", **options)
    found = mean(learned, joint.score, learned.prepare(batch, draws_for(batch)))
    assert found == pytest.approx(joint.entropy / 4, rel=0.02)


def test_a_uniform_predictor_scores_log_v_in_a_clipped_range_too():
    batch = batch_of(torch.zeros(4000, 8, dtype=torch.int64))
    uniform = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 12))
    learned = objective("block:4", min_noise=0.3, max_noise=0.8)
    noised = learned.prepare(batch, draws_for(batch))
    assert mean(learned, uniform, noised) == pytest.approx(float(torch.log(torch.tensor(12.0))), rel=0.02)
    times = noised.time[:, 8:]  # of the canvas copies
    assert 0.3 <= float(times.min()) < 0.31
    assert 0.79 < float(times.max()) <= 0.8


def packed() -> tuple[Batch, list[Batch]]:
    """Two conversations of 9 and 6 rows in one row with padding, and each alone."""
    ids = torch.randint(0, 10, (15,), generator=torch.Generator().manual_seed(3))
    alone = [batch_of(ids[None, :9]), batch_of(ids[None, 9:])]
    for batch, prompt in zip(alone, (3, 2), strict=True):
        batch.labels[:, :prompt] = IGNORE
    pad = torch.full((1, 2), 10)
    together = batch_of(
        torch.cat([ids[None], pad], 1),
        documents=[[0] * 9 + [1] * 6 + [PADDING] * 2],
        positions=[[*range(9), *range(6), 0, 0]],
    )
    together = replace(together, labels=torch.cat([*(b.labels for b in alone), torch.full_like(pad, IGNORE)], 1))
    return together, alone


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_packed_conversations_score_what_they_score_alone(shift, complementary):
    model = tiny("block:4", shift=shift)
    learned = objective("block:4", reduction="answer_length", complementary=complementary)
    together, alone = packed()
    hidden, time = drawn(learned, together)
    with torch.no_grad():
        whole = learned.loss(model, learned.corrupt(together, hidden, time))["masked"]
        parts = [
            learned.loss(model, learned.corrupt(batch, hidden[:, span], time[:, span]))["masked"]
            for batch, span in zip(alone, (slice(0, 9), slice(9, 15)), strict=True)
        ]
    assert float(whole.total) == pytest.approx(float(sum(part.total for part in parts)), rel=1e-5)
    assert float(whole.count) == float(sum(part.count for part in parts)) == (4 if complementary else 2)


@torch.no_grad()
def test_questions_behind_one_picture_score_what_they_score_alone():
    """Rows of the prefix are given once, a whole number of blocks long; another length is refused."""
    model, learned = tiny("block:4"), objective("block:4", reduction="answer_length")
    ids = torch.randint(0, 10, (1, 18), generator=torch.Generator().manual_seed(5))
    batch = batch_of(ids, documents=[[PREFIX] * 8 + [0] * 6 + [1] * 4], positions=[[*range(14), *range(8, 12)]])
    batch.labels[:, :9] = IGNORE
    batch.labels[:, 14] = IGNORE
    hidden, time = drawn(learned, batch)
    whole = learned.loss(model, learned.corrupt(batch, hidden, time))["masked"]
    total = 0.0
    for span in (slice(8, 14), slice(14, 18)):
        cut = lambda x, span=span: torch.cat([x[:, :8], x[:, span]], 1)
        one = replace(batch_of(cut(ids)), labels=cut(batch.labels))
        total += float(learned.loss(model, learned.corrupt(one, cut(hidden), cut(time)))["masked"].total)
    assert float(whole.total) == pytest.approx(total, rel=1e-5)
    with pytest.raises(ValueError, match="has 8 rows, which is not a whole number of blocks of 3"):
        objective("block:3").prepare(batch, draws_for(batch))


def test_complementary_views_hide_every_token_once_and_are_two_single_ones():
    model, batch = tiny("block:4"), random_batch(3, 12, prompt=5)
    both = objective("block:4", complementary=True)
    hidden, time = drawn(both, batch)
    noised = both.corrupt(batch, hidden, time)
    first, second = noised.batch.input_ids[:, 12:].eq(MASK).chunk(2, 1)
    assert not (first & second).any()
    assert (first | second).sum() == (batch.labels != IGNORE).sum() == len(noised.rows)
    single, other = objective("block:4"), both._complement(time)
    views = [(hidden, time), ((batch.labels != IGNORE) & ~hidden, other)]
    parts = [mean(single, model, single.corrupt(batch, *view)) for view in views]
    assert mean(both, model, noised) == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_only_blocks_that_are_scored_are_copied_and_what_is_given_is_never_noised():
    learned = objective("block:4", min_noise=1.0)
    batch = random_batch(2, 16, prompt=10)
    batch.labels[1, 12:] = IGNORE
    noised = learned.prepare(batch, draws_for(batch))
    assert noised.batch.input_ids.shape == (2, 16 + 8)
    assert torch.equal(noised.batch.input_ids[:, :16], batch.input_ids)
    copy = noised.batch.input_ids[:, 16:]
    assert torch.equal(copy[:, :2], batch.input_ids[:, 8:10]), "the prompt's part of the first scored block is shown"
    assert (copy[:, 2:4] == MASK).all()
    assert (copy[0, 4:] == MASK).all()
    assert (noised.batch.documents[1, 20:] == PADDING).all()
    assert torch.equal(noised.batch.positions[0, 16:], torch.arange(8, 16))


def test_the_rule_is_the_mask_of_the_papers():
    """Block-diagonal, offset block-causal and block-causal: BD3-LM, section 3.2."""
    learned, batch = objective("block:2"), random_batch(1, 6)
    rule = learned.prepare(batch, draws_for(batch)).visibility
    block = torch.arange(6) // 2
    clean = block[:, None] >= block
    expected = torch.cat([
        torch.cat([clean, torch.zeros(6, 6, dtype=torch.bool)], 1),
        torch.cat([block[:, None] > block, block[:, None] == block], 1),
    ])  # fmt: skip
    assert isinstance(rule, Visibility)
    assert torch.equal(rule.dense()[0, 0], expected)


@torch.no_grad()
def test_padding_and_the_split_into_micro_batches_never_change_the_loss():
    model, learned = tiny("block:4"), objective("block:4")
    batch = random_batch(3, 11, prompt=3)

    def part(rows: slice, width: int) -> Batch:
        cut = {n: getattr(batch, n)[rows] for n in ("input_ids", "labels", "image_slots", "documents", "positions")}
        grown = {n: torch.nn.functional.pad(x, (0, width - 11), value=f) for (n, x), f in zip(
            cut.items(), (10, IGNORE, -1, PADDING, 0), strict=True)}  # fmt: skip
        return Batch(**grown, indices=batch.indices[rows])

    def summed(parts: list[Batch]) -> list[float]:
        noised = [learned.prepare(p, Draws(seed=0, step=0, num_examples=3, indices=p.indices)) for p in parts]
        losses = [learned.loss(model, n)["masked"] for n in noised]
        return [float(sum(x.total for x in losses)), float(sum(x.count for x in losses))]

    whole, split = summed([batch]), summed([part(slice(0, 1), 14), part(slice(1, 3), 11)])
    assert split == pytest.approx(whole, rel=1e-5)


def test_each_block_draws_its_own_time_or_shares_its_documents():
    batch = random_batch(1, 16)
    for times, different in (("block", 4), ("document", 1)):
        noised = objective("block:4", times=times).prepare(batch, draws_for(batch))
        assert len(noised.time[0, 16:].unique()) == different
        assert (noised.time[0, :16] == 0).all(), "what is given is clean"


@pytest.mark.parametrize(("rows", "blocks"), [(8, 16), (64, 32), (1, 64)])
def test_times_are_spread_evenly_over_rows_and_blocks_together(rows, blocks):
    """Of n times never six more or fewer lie below any t than n t; of 2048 independent ones about 38 do."""
    for step in range(5):
        noised = objective("block:2").prepare(random_batch(rows, 2 * blocks), draws_for(random_batch(rows, 2), step))
        t = noised.time[:, 2 * blocks :: 2].flatten().double().sort().values
        below = torch.arange(len(t))
        assert float((below - len(t) * t).abs().max()) < 6


def test_a_narrow_range_of_noise_is_for_the_variance():
    """Of a token's weight, E[1/t] - 1 (BD3-LM, section 5): 5.9 down to 1e-3, 0.96 in (0.3, 0.8), none where all is
    hidden, which for blocks of one token is the bound too."""
    batch = batch_of(torch.zeros(20_000, 4, dtype=torch.int64))
    for low, high in ((1e-3, 1.0), (0.3, 0.8), (1.0, 1.0)):
        weights = objective("block:1", min_noise=low, max_noise=high).prepare(batch, draws_for(batch)).weights.double()
        expected = math.log(high / low) / (high - low) - 1 if low < high else 0.0
        assert float(weights.sum()) / 80_000 == pytest.approx(1, abs=0.05)
        assert float(weights.square().sum()) / 80_000 - 1 == pytest.approx(expected, rel=0.2, abs=1e-6)


def test_an_objective_that_does_not_fit_the_models_visibility_is_refused_and_none_is_chosen():
    assert type(build_objective(None, {}, SPECIAL, "block:4")).__name__ == "Block"
    assert type(build_objective(None, {}, SPECIAL, "prefix")).__name__ == "Masked"
    with pytest.raises(ValueError, match=r"set model.visibility=block:32, or objective.name=masked"):
        objective("full")
    for visibility in ("block:4", "causal"):
        with pytest.raises(ValueError, match=r"set model.visibility=full, or for blocks objective.name=block"):
            objective(visibility, "masked")
    with pytest.raises(ValueError, match="times='row' is not one of block, document"):
        objective("block:4", times="row")
    with pytest.raises(ValueError, match="cart' is for the objective masked"):
        objective("block:4", weight="cart")
    with pytest.raises(ValueError, match=r"min_noise=0.9 and max_noise=0.8 must lie in this order"):
        objective("block:4", min_noise=0.9, max_noise=0.8)
