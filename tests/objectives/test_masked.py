"""Truths of the masked objective, against table models whose conditionals are exact."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from dmllm.diffusion.schedules import SCHEDULES, elbo_weight
from dmllm.models.backbones.transformer import Attention, Transformer, TransformerConfig, attention_mask
from dmllm.models.multimodal import gather_rows
from dmllm.nn.rope import rotary_tables
from dmllm.objectives import build_objective
from dmllm.objectives.draws import Draws
from dmllm.objectives.loss import normalise, padding_as_one
from dmllm.objectives.views import repeat_batch
from dmllm.types import IGNORE, PADDING, PREFIX, Batch, SpecialTokens
from tests.exact import Joint

SPECIAL = SpecialTokens(mask=3, eos=2, pad=2)
SCHEDULE_NAMES = [("linear", {}), ("cosine", {}), ("polynomial", {"power": 2.0}), ("polynomial", {"power": 1.5})]


def batch_of(ids: torch.Tensor, *, start: int = 0, documents: torch.Tensor | None = None) -> Batch:
    return Batch(
        input_ids=ids,
        labels=ids.clone(),
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids) if documents is None else documents,
        positions=torch.arange(ids.shape[1]).expand_as(ids),
        indices=torch.arange(start, start + len(ids)),
    )


def draws_for(batch: Batch, *, step: int = 0, total: int | None = None) -> Draws:
    return Draws(seed=0, step=step, num_examples=total or len(batch), indices=batch.indices)


def mean_loss(objective, model, batch, step=0):
    noised = objective.prepare(batch, draws_for(batch, step=step))
    loss = objective.loss(model, noised)["masked"]
    return float(loss.total / loss.count)


@pytest.mark.parametrize(("schedule", "options"), SCHEDULE_NAMES)
def test_with_exact_conditionals_the_bound_is_the_entropy_of_the_data(schedule, options):
    joint = Joint(3, 3, mask=SPECIAL.mask)
    objective = build_objective("masked", {"schedule": schedule, "schedule_options": options}, SPECIAL, "full")
    assert mean_loss(objective, joint.score, batch_of(joint.draw(40_000))) == pytest.approx(joint.entropy / 3, rel=0.02)


@pytest.mark.parametrize(("schedule", "options"), SCHEDULE_NAMES)
def test_a_uniform_predictor_scores_log_v_under_every_schedule(schedule, options):
    objective = build_objective("masked", {"schedule": schedule, "schedule_options": options}, SPECIAL, "full")
    uniform = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 7))
    batch = batch_of(torch.zeros(4000, 16, dtype=torch.int64))
    assert mean_loss(objective, uniform, batch) == pytest.approx(math.log(7), rel=0.02)


@pytest.mark.parametrize(("schedule", "options"), SCHEDULE_NAMES)
def test_schedules_are_consistent(schedule, options):
    s = SCHEDULES.load(schedule)(**options)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(s.alpha(t).sum(), t)[0]
    assert torch.allclose(slope, s.alpha_prime(t))
    assert torch.allclose(s.time(1 - s.alpha(t)), t)
    ends = s.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12)
    assert torch.all(elbo_weight(s, t) > 0)


def test_the_linear_weight_is_one_over_t():
    t = torch.tensor([0.1, 0.5, 1.0])
    assert torch.allclose(elbo_weight(SCHEDULES.load("linear")(), t), 1 / t)


@pytest.mark.parametrize(("visibility", "dim"), [("full", 0), ("prefix", 1)])
def test_complementary_views_hide_every_token_exactly_once(visibility, dim):
    objective = build_objective("masked", {"complementary": True, "weight": "none"}, SPECIAL, visibility)
    batch = batch_of(torch.randint(0, 2, (5, 12)))
    noised = objective.prepare(batch, draws_for(batch))
    first, second = (noised.batch.input_ids == SPECIAL.mask).int().chunk(2, dim)
    assert torch.equal(first + second, torch.ones(5, 12, dtype=torch.int32))
    assert len(noised.rows) == 60


def test_appended_views_score_what_a_doubled_batch_scores():
    """Behind a prefix the second view costs its canvas alone; loss and count are those of two whole copies."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    backbone = Transformer(config)

    def model(*, input_ids, positions, visibility, rows, **_):
        hidden = backbone(backbone.embed(input_ids), positions, visibility).hidden
        return SimpleNamespace(logits=backbone.unembed(gather_rows(hidden, rows)))

    documents = torch.tensor([[PREFIX, 0, 0, 0, 1, 1, 1], [PREFIX, 0, 0, 1, 1, PADDING, PADDING]])
    batch = batch_of(torch.randint(0, 2, (2, 7)), documents=documents)
    batch.labels[torch.tensor([[1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 0, 1, 1]]).bool()] = IGNORE
    for reduction in ("tokens", "answer_length", "masked", "batch_length"):
        options = {"complementary": True, "reduction": reduction}
        objective = build_objective("masked", options, SPECIAL, "prefix")
        appended = objective.prepare(batch, draws_for(batch))
        twice = lambda batch, look, scorable: repeat_batch(batch, look, 2)
        with patch("dmllm.objectives.masked.append_canvas", twice):
            doubled = objective.prepare(batch, draws_for(batch))
        assert appended.batch.input_ids.shape == (2, 11)
        assert doubled.batch.input_ids.shape == (4, 7)
        one, two = (objective.loss(model, n)["masked"] for n in (appended, doubled))
        assert (one.total / one.count).item() == pytest.approx((two.total / two.count).item(), rel=1e-5)


def test_at_least_one_token_of_every_answer_is_hidden():
    objective = build_objective("masked", {"at_least_one": True}, SPECIAL, "prefix")
    documents = torch.tensor([[0, 0, 1, 1, 2, 2]] * 200)
    batch = batch_of(torch.zeros(200, 6, dtype=torch.int64), documents=documents)
    noised = objective.prepare(batch, draws_for(batch))
    hidden = (noised.batch.input_ids == SPECIAL.mask).view(200, 3, 2)
    assert hidden.any(-1).all()


def test_prompt_and_padding_are_never_noised_nor_scored():
    objective = build_objective("masked", {"min_noise": 0.999}, SPECIAL, "full")
    batch = batch_of(torch.zeros(3, 6, dtype=torch.int64), documents=torch.tensor([[0, 0, 0, 0, PADDING, PADDING]] * 3))
    batch.labels[:, :2] = IGNORE
    batch.labels[:, 4:] = IGNORE
    noised = objective.prepare(batch, draws_for(batch))
    assert (noised.batch.input_ids == SPECIAL.mask).int().tolist() == [[0, 0, 1, 1, 0, 0]] * 3
    assert (batch.input_ids == 0).all(), "the caller's batch is not touched"


def test_times_are_stratified_over_the_step():
    """Of n examples, exactly one time falls into each interval [i/n, (i+1)/n) (up to the step's shared offset)."""
    draws = Draws(seed=3, step=5, num_examples=64, indices=torch.arange(640, 704))
    t = draws.stratified()[:, 0].sort().values
    assert torch.allclose(t.diff(), torch.full((63,), 1 / 64), atol=1e-5)


@pytest.mark.parametrize("reduction", ["tokens", "batch_length", "answer_length", "masked"])
def test_the_split_into_micro_batches_never_changes_the_loss(reduction):
    """Different padding, different split, the same sum and the same count."""
    objective = build_objective("masked", {"reduction": reduction}, SPECIAL, "full")
    torch.manual_seed(0)
    table = torch.randn(9, 4)
    model = lambda *, input_ids, positions, rows, **_: SimpleNamespace(logits=table[(positions.flatten()[rows])])
    ids = torch.randint(0, 2, (6, 9))
    lengths = [9, 5, 4, 5, 3, 2]

    def padded(keep: range, width: int) -> Batch:
        documents = torch.full((len(keep), width), PADDING)
        for row, example in enumerate(keep):
            documents[row, : lengths[example]] = 0
        batch = batch_of(ids[keep.start : keep.stop, :width], start=keep.start, documents=documents)
        batch.labels[documents == PADDING] = IGNORE
        return batch

    def summed(parts: list[Batch]) -> tuple[float, float]:
        noised = [objective.prepare(part, draws_for(part, total=6)) for part in parts]
        losses = [objective.loss(model, n)["masked"] for n in noised]
        assert [float(x.count) for x in losses] == [float(n.counts["masked"]) for n in noised]
        return float(sum(x.total for x in losses)), float(sum(x.count for x in losses))

    whole = summed([padded(range(6), 9)])
    split = summed([padded(range(1), 9), padded(range(1, 4), 5), padded(range(4, 6), 3)])
    assert split == pytest.approx(whole, rel=1e-5)


def test_reductions_divide_by_what_they_are_named_after():
    """Two answers of 2 and 6 tokens, everything hidden, weight 1, every token costs log 4."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    batch = batch_of(torch.zeros(1, 10, dtype=torch.int64), documents=documents)
    batch.labels[0, [0, 3]] = IGNORE
    model = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 4))
    expected = {"tokens": (8, 8), "batch_length": (8, 10), "answer_length": (2, 2), "masked": (8, 8)}
    for reduction, (total, count) in expected.items():
        options = {"reduction": reduction, "weight": "none", "min_noise": 0.999999}
        objective = build_objective("masked", options, SPECIAL, "full")
        loss = objective.loss(model, objective.prepare(batch, draws_for(batch)))["masked"]
        assert float(loss.total) == pytest.approx(total * math.log(4), rel=1e-5)
        assert float(loss.count) == count


@pytest.mark.parametrize(("schedule", "options"), SCHEDULE_NAMES)
def test_in_a_clipped_range_every_schedule_weighs_a_constant_cost_alike(schedule, options):
    clipped = {"schedule": schedule, "schedule_options": options, "min_noise": 0.3, "max_noise": 0.8}
    objective = build_objective("masked", clipped, SPECIAL, "full")
    uniform = lambda *, rows, **_: SimpleNamespace(logits=torch.zeros(len(rows), 7))
    batch = batch_of(torch.zeros(4000, 16, dtype=torch.int64))
    noised = objective.prepare(batch, draws_for(batch))
    noise = 1 - objective.schedule.alpha(noised.time)
    assert 0.3 - 1e-4 < float(noise.min()) < 0.31
    assert 0.79 < float(noise.max()) < 0.8 + 1e-4
    assert mean_loss(objective, uniform, batch) == pytest.approx(math.log(7), rel=0.02)


def test_padding_is_hidden_or_by_name_seen_as_any_row_or_with_a_weight_of_1_over_e():
    torch.manual_seed(0)
    documents = torch.tensor([[0, 0, 0, PADDING, PADDING]])
    batch = batch_of(torch.zeros(1, 5, dtype=torch.int64), documents=documents)
    batch.labels[:, 3:] = IGNORE
    attention = Attention(TransformerConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1), 0)
    for projection in (attention.q_proj, attention.k_proj):
        torch.nn.init.zeros_(projection.weight)  # so that weights depend on the mask alone
    for projection in (attention.v_proj, attention.o_proj):
        torch.nn.init.eye_(projection.weight)
    turn = rotary_tables(torch.arange(5)[None], 8, 1e4, torch.float32)
    faint = 3 + 2 / math.e
    expected = {
        "hidden": [1 / 3] * 3 + [0] * 2,
        "seen": [1 / 5] * 5,
        "faint": [1 / faint] * 3 + [1 / math.e / faint] * 2,
    }
    for padding, weights in expected.items():
        objective = build_objective("masked", {"padding": padding}, SPECIAL, "full")
        look = objective.prepare(batch, draws_for(batch)).visibility
        mask = attention_mask("dense", look, None, torch.device("cpu"))
        mixed = attention(torch.eye(8)[None, :5], turn, mask, None)
        assert mixed[0, 0, :5].tolist() == pytest.approx(weights)
        if padding == "faint":
            assert mixed[0, 4, :5].tolist() == pytest.approx([1 / 5] * 5)
    packed, seen = replace(batch, documents=documents + torch.arange(5)), {"padding": "seen"}
    with pytest.raises(ValueError, match="where each row is one conversation"):
        build_objective("masked", seen, SPECIAL, "full").prepare(packed, draws_for(batch))
    with pytest.raises(ValueError, match="padding='faint' needs"):
        build_objective("masked", {"padding": "faint"}, SPECIAL, "prefix")
    with pytest.raises(ValueError, match="padding='faint' is for the objective masked"):
        build_objective("block", {"padding": "faint"}, SPECIAL, "block:4")
    with pytest.raises(ValueError, match="padding='soft' is not one of hidden, seen, faint"):
        build_objective("masked", {"padding": "soft"}, SPECIAL, "full")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean schedule"):
        build_objective("masked", {"shedule": "linear"}, SPECIAL, "full")
    with pytest.raises(ValueError, match="not a known objective"):
        build_objective("maskd", {}, SPECIAL, "full")


def test_padding_as_one_gives_an_answer_the_same_share_in_a_short_and_a_long_canvas():
    """The answer 7 8 <end>, alone, with one further end token, and with five: its tokens weigh the same."""
    documents = torch.zeros(1, 8, dtype=torch.int64)
    for padding in (1, 3):
        labels = torch.tensor([[-100, -100, 7, 8, 2, *[2] * padding, *[-100] * (3 - padding)]])
        hidden = labels != -100
        share = padding_as_one(labels, documents, 2)
        assert share.tolist()[0][:5] == [0, 0, 1, 1, 1]
        assert share[0, 5 : 5 + padding].sum().item() == pytest.approx(1)
        weights, count = normalise("answer_length", torch.ones(1, 8), share, hidden, documents)
        assert weights[0, 2:5].tolist() == pytest.approx([1 / 4] * 3)
        assert count == 1


def test_padding_as_one_keeps_end_tokens_of_other_documents_apart():
    labels = torch.tensor([[5, 2, 2, 2, 6, 2]])
    assert padding_as_one(labels, torch.tensor([[0, 0, 1, 1, 2, 2]]), 2).tolist() == [[1, 1, 1, 1, 1, 1]]
    assert padding_as_one(labels, torch.tensor([[0, 0, 0, 0, 1, 1]]), 2).tolist() == [[1, 1, 0.5, 0.5, 1, 1]]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"complementary": True, "reduction": "answer_length"}, {"weight": "cart"}])
@pytest.mark.parametrize("visibility", ["full", "prefix"])
def test_packed_conversations_score_what_they_score_alone(visibility, options):
    """Two of 7 and 5 tokens in one row with padding: the same hidden tokens cost the same."""
    torch.manual_seed(0)
    backbone = Transformer(TransformerConfig(vocab_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    backbone.initialise()

    def model(*, input_ids, positions, visibility, rows, **_):
        hidden = backbone(backbone.embed(input_ids), positions, visibility).hidden
        return SimpleNamespace(logits=backbone.unembed(gather_rows(hidden, rows)))

    ids, hidden, time = torch.randint(0, 2, (1, 14)), torch.rand(1, 14) < 0.6, torch.rand(1, 14) * 0.8 + 0.1
    documents = torch.tensor([[0] * 7 + [1] * 5 + [PADDING] * 2])
    together = replace(batch_of(ids, documents=documents), positions=torch.tensor([[*range(7), *range(5), 0, 0]]))
    together.labels[:, [0, 1, 7, 12, 13]] = IGNORE
    hidden &= together.labels != IGNORE
    learned = build_objective("masked", options, SPECIAL, visibility)
    whole = learned.loss(model, learned.corrupt(together, hidden, time))["masked"]
    parts = []
    for span in (slice(0, 7), slice(7, 12)):
        alone = replace(batch_of(ids[:, span]), labels=together.labels[:, span])
        parts.append(learned.loss(model, learned.corrupt(alone, hidden[:, span], time[:, span]))["masked"])
    assert float(whole.total) == pytest.approx(float(sum(part.total for part in parts)), rel=1e-5)
    assert float(whole.count) == float(sum(part.count for part in parts))
