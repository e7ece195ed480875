"""Truths of the permutation objective: exact conditionals, and a small transformer that is fed token by token."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dmllm.diffusion.orders import ranks
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.nn.visibility import layout
from dmllm.objectives import build_objective, requirements
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


def tiny(visibility: str = "permutation", seed: int = 0) -> MultimodalModel:
    torch.manual_seed(seed)
    shape = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DmllmConfig(backbone={**shape, "initializer_range": 0.3}, mask_token_id=MASK, visibility=visibility)
    model = MultimodalModel(config)
    model.initialise()
    return model.eval()


def objective(**options):
    return build_objective("permutation", options, SPECIAL, "permutation")


@torch.no_grad()
def mean(learned, model, noised) -> float:
    (loss,) = learned.loss(model, noised).values()
    return float(loss.total / loss.count)


def drawn(batch: Batch) -> torch.Tensor:
    """The orders that `prepare` draws."""
    return ranks(draws_for(batch).uniform(batch.labels.shape[1]), batch.documents, batch.labels != IGNORE)


@torch.no_grad()
def one_by_one(model, batch: Batch, rank: torch.Tensor) -> torch.Tensor:
    """What the objective means, [B, L]: -log p of each token by a call of its own, fed what it sees."""
    found = torch.zeros(rank.shape)
    for row, places in enumerate(rank):
        for column in (places >= 0).nonzero().flatten().tolist():
            seen = ((places < places[column]) & (batch.documents[row] == batch.documents[row, column])).nonzero()
            fed = torch.cat([seen.flatten(), torch.tensor([column])])
            ids = torch.cat([batch.input_ids[row, seen.flatten()], torch.tensor([MASK])])[None]
            rule = layout(
                "prefix", documents=torch.zeros_like(ids), canvas=torch.tensor([[False] * len(seen) + [True]])
            )
            rule.rank[0, :-1] = places[seen.flatten()]
            rule.rank[0, -1] = places[column]
            logits = model(ids, positions=batch.positions[row, fed][None], visibility=rule).logits[0, -1]
            found[row, column] = -logits.log_softmax(-1)[batch.input_ids[row, column]]
    return found


@pytest.mark.parametrize("prompt", [0, 4])
def test_one_pass_over_two_streams_scores_what_the_tokens_score_one_by_one(prompt):
    model, learned, batch = tiny(), objective(), random_batch(3, 9, prompt)
    batch.labels[2, 7:] = IGNORE
    batch.documents[2, 7:] = PADDING
    rank = drawn(batch)
    noised = learned.prepare(batch, draws_for(batch))
    expected = one_by_one(model, batch, rank).sum() / (batch.labels != IGNORE).sum()
    assert mean(learned, model, noised) == pytest.approx(float(expected), rel=1e-5)


def test_every_order_of_an_answer_is_as_likely():
    batch = batch_of(torch.zeros(6000, 3, dtype=torch.int64))
    codes = (drawn(batch) * torch.tensor([9, 3, 1])).sum(1)
    counts = torch.stack([(codes == code).sum() for code in (5, 7, 11, 15, 19, 21)])
    assert counts.sum() == 6000
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 20.5  # chi-square, 5 degrees of freedom, 99.9 %


def test_in_the_order_of_the_text_it_is_the_block_objective_with_blocks_of_one_token():
    """The identity permutation is next-token prediction: for exact conditionals, and for any network."""
    joint = Joint(3, 4, mask=MASK)
    for model, batch in ((tiny(), random_batch(3, 9)), (joint.score, batch_of(joint.draw(50)))):
        same = tiny("block:1") if isinstance(model, torch.nn.Module) else model
        next_token = build_objective("block", {"min_noise": 1.0}, SPECIAL, "block:1")
        expected = mean(next_token, same, next_token.prepare(batch, draws_for(batch)))
        learned = objective(order="identity")
        assert mean(learned, model, learned.prepare(batch, draws_for(batch))) == pytest.approx(expected, rel=1e-6)
    chain = -joint.probs[(joint.texts[:, None] == batch.input_ids).all(-1).int().argmax(0)].log().mean() / 4
    assert expected == pytest.approx(float(chain), rel=1e-5), "whatever the order, it is log p itself"


class AnyTable:
    """Some p(token at i | what is seen), of no joint: the same for the same tokens seen, whatever their order."""

    def __call__(self, *, input_ids, positions, visibility, rows, **_):
        size = input_ids.shape[1]
        seen = visibility.dense()[:, 0].flatten(0, 1)[rows] & (input_ids[rows // size] != MASK)
        logits = []
        for row, shown in zip(rows.tolist(), seen, strict=True):
            known = sorted(zip(positions[row // size, shown].tolist(), input_ids[row // size, shown].tolist()))
            key = hash((tuple(known), int(positions.flatten()[row]))) % 2**31
            logits.append(torch.randn(12, generator=torch.Generator().manual_seed(key)))
        return SimpleNamespace(logits=torch.stack(logits))


def test_the_average_over_all_orders_is_the_bound_of_masked_diffusion():
    """Of any conditionals: the sum over how many are hidden of the mean over which (Ou et al., arXiv:2406.03736)."""
    model, length = AnyTable(), 4
    text = torch.tensor([[3, 1, 0, 1]])
    orders = torch.tensor(list(itertools.permutations(range(length))))
    batch = batch_of(text.expand(len(orders), -1))
    average = mean(objective(), model, objective().arrange(batch, orders)) * length
    masked = build_objective("masked", {"weight": "none"}, SPECIAL, "full")
    bound = 0.0
    for size in range(1, length + 1):
        views = torch.tensor([v for v in itertools.product([False, True], repeat=length) if sum(v) == size])
        batch = batch_of(text.expand(len(views), -1))
        noised = masked.corrupt(batch, views, torch.ones(views.shape))
        bound += float(masked.loss(model, noised)["masked"].total) / len(views) / size
    assert average == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"order": "identity"}, {"zero_masking": True}])
def test_with_exact_conditionals_the_loss_is_the_entropy_of_the_data_in_every_order(options):
    joint, learned = Joint(3, 4, mask=MASK), objective(**options)
    batch = batch_of(joint.texts)
    noised = learned.prepare(batch, draws_for(batch))
    losses = torch.nn.functional.cross_entropy(
        joint.score(**vars_of(noised)).logits.float(), noised.targets, reduction="none"
    ).view(-1, 4)
    assert torch.allclose(losses.sum(1).double(), -joint.probs.log(), atol=1e-4), "text by text"
    assert float((losses.sum(1) * joint.probs).sum()) == pytest.approx(joint.entropy, rel=1e-5)


def vars_of(noised) -> dict:
    batch = noised.batch
    return {"input_ids": batch.input_ids, "positions": batch.positions, "visibility": noised.visibility,
            "rows": noised.rows}  # fmt: skip


def test_a_uniform_predictor_scores_log_v():
    uniform = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 12))
    for options in ({}, {"order": "identity"}, {"last_fraction": 0.25}, {"reduction": "answer_length"}):
        batch, learned = random_batch(5, 9, prompt=2), objective(**options)
        assert mean(learned, uniform, learned.prepare(batch, draws_for(batch))) == pytest.approx(math.log(12))


def test_only_the_end_of_the_order_is_predicted_and_laid_out_a_second_time():
    batch, learned = random_batch(2, 20, prompt=8), objective(last_fraction=1 / 6)
    batch.labels[1, 11:] = IGNORE  # an answer of three tokens, of which one is predicted
    rank = drawn(batch)
    noised = learned.prepare(batch, draws_for(batch))
    assert noised.batch.input_ids.shape == (2, 22)
    assert noised.targets.tolist() == [
        int(batch.labels[r, c]) for r, c in (rank >= torch.tensor([[10], [2]])).nonzero()
    ]
    assert torch.equal(noised.batch.input_ids[:, :20], batch.input_ids)
    assert float(noised.counts["permutation"]) == 3
    whole, part = (one_by_one(tiny(), batch, rank)[rank >= first].sum() for first in (0, torch.tensor([[10], [2]])))
    assert whole > part
    assert mean(learned, tiny(), noised) == pytest.approx(float(part) / 3, rel=1e-5)


@torch.no_grad()
def test_packed_conversations_score_what_they_score_alone():
    """Behind one another, behind one picture's rows, and padded."""
    model, learned = tiny(), objective(reduction="answer_length")
    ids = torch.randint(0, 10, (1, 18), generator=torch.Generator().manual_seed(5))
    documents = [[PREFIX] * 5 + [0] * 6 + [1] * 5 + [PADDING] * 2]
    batch = batch_of(ids, documents=documents, positions=[[*range(11), *range(5, 10), 0, 0]])
    for column in (*range(5), 5, 6, 11, 16, 17):
        batch.labels[0, column] = IGNORE
    rank = drawn(batch)
    whole = learned.loss(model, learned.arrange(batch, rank))["permutation"]
    total = 0.0
    for number, span in enumerate((slice(5, 11), slice(11, 16))):
        cut = lambda x, span=span: torch.cat([x[:, :5], x[:, span]], 1)
        one = batch_of(cut(ids), documents=cut(batch.documents).clamp(max=0), positions=cut(batch.positions))
        one = replace(one, labels=cut(batch.labels))
        assert int(cut(batch.documents).max()) == number
        total += float(learned.loss(model, learned.arrange(one, cut(rank)))["permutation"].total)
    assert float(whole.total) == pytest.approx(total, rel=1e-5)
    assert float(whole.count) == 2


@torch.no_grad()
def test_padding_and_the_split_into_micro_batches_never_change_the_loss():
    model, learned, batch = tiny(), objective(), random_batch(3, 11, prompt=3)

    def part(rows: slice, width: int) -> Batch:
        cut = {n: getattr(batch, n)[rows] for n in ("input_ids", "labels", "image_slots", "documents", "positions")}
        grown = {n: torch.nn.functional.pad(x, (0, width - 11), value=f) for (n, x), f in zip(
            cut.items(), (10, IGNORE, -1, PADDING, 0), strict=True)}  # fmt: skip
        return Batch(**grown, indices=batch.indices[rows])

    def summed(parts: list[Batch]) -> list[float]:
        noised = [learned.prepare(p, Draws(seed=0, step=0, num_examples=3, indices=p.indices)) for p in parts]
        losses = [learned.loss(model, n)["permutation"] for n in noised]
        return [float(sum(x.total for x in losses)), float(sum(x.count for x in losses))]

    whole, split = summed([batch]), summed([part(slice(0, 1), 14), part(slice(1, 3), 11)])
    assert split == pytest.approx(whole, rel=1e-5)


def test_the_rule_is_that_of_two_stream_attention():
    """Content sees what comes no later in the order, a query what comes before: XLNet, section 2.3."""
    batch = random_batch(1, 4, prompt=1)
    rule = objective().arrange(batch, torch.tensor([[-1, 2, 0, 1]])).visibility
    content = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    query = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0]]).bool()
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    expected = torch.cat([torch.cat([content, nothing], 1), torch.cat([query, torch.eye(3, dtype=torch.bool)], 1)])
    assert torch.equal(rule.dense()[0, 0], expected)


def test_what_does_not_fit_is_refused_and_a_model_is_told_how_it_will_be_read():
    assert type(build_objective(None, {}, SPECIAL, "permutation")).__name__ == "Permutation"
    assert requirements("permutation", {}, "full") == {"visibility": "permutation", "shift": False}
    for visibility in ("block:4", "causal"):
        with pytest.raises(ValueError, match=r"set model.visibility=permutation"):
            requirements("permutation", {}, visibility)
    with pytest.raises(ValueError, match=r"learns under visibility permutation, not full"):
        build_objective("permutation", {}, SPECIAL, "full")
    with pytest.raises(ValueError, match="order='reverse' is not one of random, identity"):
        objective(order="reverse")
    with pytest.raises(ValueError, match="last_fraction=0 must lie above 0"):
        objective(last_fraction=0)
    with pytest.raises(ValueError, match="reduction='mean' is not one of"):
        objective(reduction="mean")
