"""Truths of next-token prediction: what is scored, what it equals, and that it is the loss of transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.objectives import build_objective, requirements
from dmllm.types import IGNORE, PADDING, PREFIX, Batch, Record, SpecialTokens
from tests.exact import Joint
from tests.objectives.test_block import MASK, batch_of, draws_for, random_batch
from tests.objectives.test_block import tiny as on_blocks
from tests.test_pipeline import make, picture

SPECIAL = SpecialTokens(mask=MASK, eos=10, pad=10)


def tiny(mtp: int = 1) -> MultimodalModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MultimodalModel(DmllmConfig(backbone={**shape, "initializer_range": 0.3}, mask_token_id=MASK))
    model.initialise()
    model.adapt(**requirements("autoregressive", {"mtp": mtp}, "full"))
    for head in model.heads.parameters():
        torch.nn.init.normal_(head, std=0.3)
    return model.eval()


def objective(**options):
    return build_objective("autoregressive", options, SPECIAL, "causal")


@torch.no_grad()
def losses(learned, model, batch: Batch) -> dict[str, float]:
    """Each loss divided by its count."""
    found = learned.loss(model, learned.prepare(batch, draws_for(batch)))
    return {name: float(loss.total / loss.count) for name, loss in found.items()}


def test_a_model_is_made_one_that_sees_what_is_before_and_predicts_what_follows() -> None:
    model = tiny(mtp=3)
    assert (model.config.visibility, model.config.shift, model.config.heads) == ("causal", True, {"mtp": {"n": 3}})
    with pytest.raises(ValueError, match="autoregressive learns under visibility causal, and this model's is full"):
        build_objective("autoregressive", {}, SPECIAL, "full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mtp": 0}, "mtp=0 must be a whole number of tokens, at least 1"),
        ({"mtp_weight": -1.0}, "mtp_weight=-1.0 must be 0"),
        ({"reduction": "mean"}, "reduction='mean' is not one of tokens"),
        ({"mtq": 2}, "mtq"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**options)


@torch.no_grad()
def test_every_labelled_token_is_predicted_from_those_before_it_by_the_row_before() -> None:
    model, batch = tiny(), random_batch(3, 9, prompt=3)
    hidden = model(batch.input_ids, canvas=torch.zeros_like(batch.input_ids, dtype=torch.bool)).hidden
    expected = F.cross_entropy(model.backbone.unembed(hidden)[:, 2:-1].flatten(0, 1), batch.input_ids[:, 3:].flatten())
    assert losses(objective(), model, batch)["next_token"] == pytest.approx(float(expected), rel=1e-5)


def test_a_documents_first_token_is_predicted_by_nothing_and_not_scored() -> None:
    batch = batch_of([[1, 2, 3, 4, 5, 6]], [[0, 0, 0, 1, 1, PADDING]], [[0, 1, 2, 0, 1, 0]])
    batch.labels[0, 5] = IGNORE
    aimed = objective().prepare(batch, draws_for(batch))
    assert aimed.rows.tolist() == [1, 2, 4]
    assert aimed.targets.tolist() == [2, 3, 5]
    assert float(aimed.counts["next_token"]) == 3


def test_uniform_predictions_cost_log_v_whatever_is_predicted() -> None:
    def uniform(*, rows, heads, **_):
        return SimpleNamespace(logits=torch.zeros(len(rows), 12), heads={"mtp": torch.zeros(len(heads["mtp"]), 3, 12)})

    found = losses(objective(mtp=4), uniform, random_batch(4, 9, prompt=2))
    assert list(found) == ["next_token", "ahead_1", "ahead_2", "ahead_3"]
    assert all(value == pytest.approx(math.log(12), abs=1e-6) for value in found.values())


def test_with_exact_conditionals_the_loss_of_all_texts_is_the_entropy() -> None:
    """A text behind a token that begins it: the loss is a likelihood, not a bound."""
    joint = Joint(3, 3)
    ids = F.pad(joint.texts, (1, 0), value=joint.mask)
    batch = batch_of(ids)
    aimed = objective().prepare(batch, draws_for(batch))
    row, place = aimed.rows // 4, aimed.rows % 4 - 1
    known = torch.arange(3) < place[:, None]
    logits = joint.conditionals(joint.texts[row], known)[torch.arange(len(row)), place].log()
    costs = F.cross_entropy(logits, aimed.targets, reduction="none") * joint.probs[row]
    assert float(costs.sum()) == pytest.approx(joint.entropy, abs=1e-9)


def test_blocks_of_one_token_that_are_always_hidden_are_the_same_loss() -> None:
    """Block diffusion with t = 1 and weight 1: the row before a hidden token is the one that predicts it."""
    model, batch = on_blocks("block:1", shift=True), random_batch(3, 9, prompt=2)
    learned = build_objective("block", {"min_noise": 1.0}, SPECIAL, "block:1")
    with torch.no_grad():
        found = learned.loss(model, learned.prepare(batch, draws_for(batch)))["masked"]
    model.config.visibility = "causal"
    assert losses(objective(), model, batch)["next_token"] == pytest.approx(float(found.total / found.count), rel=1e-5)


@torch.no_grad()
def test_documents_of_a_packed_row_do_not_know_of_each_other() -> None:
    model, learned = tiny(mtp=3), objective(mtp=3)
    first, second = random_batch(1, 5), batch_of([[7, 1, 0, 2]])
    packed = batch_of(torch.cat([first.input_ids, second.input_ids], 1), [[0] * 5 + [1] * 4], [[*range(5), *range(4)]])
    parts = [learned.loss(model, learned.prepare(own, draws_for(own))) for own in (first, second)]
    for name, loss in learned.loss(model, learned.prepare(packed, draws_for(packed))).items():
        assert float(loss.total) == pytest.approx(sum(float(part[name].total) for part in parts), rel=1e-5)
        assert float(loss.count) == sum(float(part[name].count) for part in parts)


def test_a_prefix_that_documents_share_predicts_the_first_token_of_each() -> None:
    ids, documents = [[9, 8, 1, 2, 3, 4]], [[PREFIX, PREFIX, 0, 0, 1, 1]]
    batch = batch_of(ids, documents, [[0, 1, 2, 3, 2, 3]])
    batch.labels[0, :2] = IGNORE
    alone = [batch_of([[9, 8, *own]]) for own in ([1, 2], [3, 4])]
    for own in alone:
        own.labels[0, :2] = IGNORE
    model, learned = tiny(), objective()
    found = losses(learned, model, batch)["next_token"]
    assert found == pytest.approx(sum(losses(learned, model, own)["next_token"] for own in alone) / 2, rel=1e-5)


def test_heads_change_nothing_for_the_next_token_and_one_token_needs_none() -> None:
    model, batch = tiny(mtp=4), random_batch(3, 9, prompt=2)
    single, several = losses(objective(), model, batch), losses(objective(mtp=4), model, batch)
    assert single == {"next_token": several["next_token"]}
    assert requirements("autoregressive", {"mtp": 1}, "full")["heads"] == {}
    assert objective(mtp=3, mtp_weight=0.5).coefficients == {"ahead_1": 0.5, "ahead_2": 0.5}
    assert objective().coefficients == {}


def test_a_head_predicts_as_far_as_its_answer_goes_and_from_the_row_of_the_next_token() -> None:
    """Two answers, in one of them a hole that is not learned; a head's targets lie in the same run of labels."""
    batch = batch_of([[1, 2, 3, 4, 5, 6, 7, 8]], [[0] * 4 + [1] * 4], [[*range(4), *range(4)]])
    batch.labels[0, 5] = IGNORE
    learned, model = objective(mtp=3), tiny(mtp=3)
    aimed = learned.prepare(batch, draws_for(batch))
    assert aimed.rows.tolist() == [1, 2, 3, 6, 7]
    assert aimed.near.tolist() == [1, 2, 6]
    assert (aimed.further * aimed.further_weights).tolist() == [[3, 4], [4, 0], [8, 0]]
    assert {name: float(count) for name, count in aimed.counts.items()} == {"next_token": 5, "ahead_1": 3, "ahead_2": 1}
    with torch.no_grad():
        said = model(batch.input_ids, documents=batch.documents, positions=batch.positions, heads={"mtp": aimed.near})
        alone = model.heads["mtp"](said.hidden[0, [0, 1, 5]], model.backbone)
    by_hand = F.cross_entropy(said.heads["mtp"][:, 0], torch.tensor([3, 4, 8]))
    assert losses(learned, model, batch)["ahead_1"] == pytest.approx(float(by_hand), rel=1e-5)
    torch.testing.assert_close(said.heads["mtp"], alone)


def test_a_fresh_head_says_what_the_model_says_of_the_next_token() -> None:
    model = tiny()
    model.adapt(heads={"mtp": {"n": 3}})
    output = model(torch.arange(5)[None], heads={"mtp": torch.arange(5)})
    torch.testing.assert_close(output.heads["mtp"], output.logits[0, :, None].expand(-1, 2, -1))


def test_answers_too_short_for_a_head_cost_nothing() -> None:
    model, batch = tiny(mtp=4), random_batch(2, 3, prompt=1)
    learned = objective(mtp=4)
    found = learned.loss(model, learned.prepare(batch, draws_for(batch)))
    assert [loss.count.item() for loss in found.values()] == [4, 2, 0, 0]
    total = sum(loss.total for loss in found.values())
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert found["ahead_3"].total.item() == 0


@pytest.mark.parametrize("reduction", ["tokens", "masked", "batch_length", "answer_length"])
def test_every_reduction_divides_by_what_its_name_says(reduction: str) -> None:
    batch = random_batch(2, 6, prompt=2)
    batch.labels[1, 2:4] = IGNORE
    learned = objective(reduction=reduction)
    found = learned.prepare(batch, draws_for(batch))
    count = {"tokens": 6, "masked": 6, "batch_length": 12, "answer_length": 2}[reduction]
    assert float(found.counts["next_token"]) == count
    assert found.weights.tolist() == ([0.25] * 4 + [0.5] * 2 if reduction == "answer_length" else [1.0] * 6)


def test_end_tokens_that_pad_an_answer_can_weigh_as_one() -> None:
    batch = batch_of([[1, 2, 10, 10, 10]])
    aimed = objective(padding_as_one=True).prepare(batch, draws_for(batch))
    assert aimed.weights.tolist() == [1, 1, 0.5, 0.5]
    assert float(aimed.counts["next_token"]) == 3


@torch.no_grad()
def test_an_answer_about_a_picture_is_learned_from_the_picture() -> None:
    """The loss is what scoring the answer says, with the picture that belongs to it."""
    pipe = make("causal")
    pipe.model.config.shift = True
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    told = [*question, {"role": "assistant", "content": [{"type": "text", "text": "a dot"}]}]
    records = [Record(messages=with_picture(told, n), source="pictures", location="here") for n in (0, 1)]
    examples = [pipe.processor.example(record, generator=torch.Generator()) for record in records]
    found = []
    learned = build_objective("autoregressive", {"mtp": 2}, pipe.special, "causal")
    pipe.model.adapt(**requirements("autoregressive", {"mtp": 2}, "causal"))
    for number, example in enumerate(examples):
        batch = pipe._collate([example])
        loss = learned.loss(pipe.model, learned.prepare(batch, draws_for(batch)))["next_token"]
        prompt = pipe.processor.prompt(question, [picture(number)]).input_ids
        answer = batch.input_ids[0][batch.labels[0] != IGNORE]
        scored = pipe.score(prompt[None], [answer.tolist()], images=[picture(number)])
        assert float(loss.total) == pytest.approx(-float(scored), rel=1e-5)
        found.append(float(loss.total))
    both = pipe._collate(examples)
    together = learned.loss(pipe.model, learned.prepare(both, draws_for(both)))["next_token"]
    assert float(together.total) == pytest.approx(sum(found), rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def with_picture(messages: list, number: int) -> list:
    first, *rest = messages
    return [{**first, "content": [{"type": "image", "image": picture(number)}, *first["content"][1:]]}, *rest]
