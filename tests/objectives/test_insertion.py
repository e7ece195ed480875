"""Truths of the any-length objective, on texts of several lengths whose posteriors are exact."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dmllm.diffusion.insertion import GONE, MASKED, SHOWN, orders
from dmllm.objectives import build_objective, requirements
from dmllm.objectives.draws import Draws
from dmllm.types import IGNORE, PADDING, TEXT, Batch, SpecialTokens
from tests.exact import Strings

STRINGS = Strings(vocab=2, longest=3)
SPECIAL = SpecialTokens(mask=STRINGS.mask, eos=8, pad=9)
BOS = 7
GOLDEN = Path(__file__).parents[1] / "golden" / "flexmdm"
SCHEDULES = [
    {},
    {"schedule": "cosine"},
    {"unmask_schedule": "cosine"},
    {"schedule": "polynomial", "schedule_options": {"power": 2.0}, "unmask_schedule": "cosine"},
]


def build(**options):
    return build_objective("insertion", {"min_noise": 1e-9, **options}, SPECIAL, "full")


def rows_of(texts, prompt=(BOS,)):
    """One row a text, behind a prompt."""
    length = len(prompt) + max(map(len, texts))
    ids, labels = torch.full((len(texts), length), SPECIAL.pad), torch.full((len(texts), length), IGNORE)
    documents = torch.full((len(texts), length), PADDING)
    for row, text in enumerate(texts):
        end = len(prompt) + len(text)
        ids[row, :end] = torch.tensor([*prompt, *text])
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
        documents[row, :end] = 0
    return Batch(
        input_ids=ids,
        labels=labels,
        image_slots=torch.full_like(ids, TEXT),
        documents=documents,
        positions=torch.arange(length).expand_as(ids).clone(),
        indices=torch.arange(len(texts)),
    )


def draws_for(batch, step=0):
    return Draws(seed=0, step=step, num_examples=len(batch), indices=batch.indices)


def nodes(count=24):
    """Times and weights of an integral over [0, 1] with a logarithm at 0: t = u^3."""
    k = torch.arange(1, count, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    u, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    u = (u + 1) / 2
    return list(zip((u**3).tolist(), (vectors[0] ** 2 * 3 * u**2).tolist(), strict=True))


def expected_losses(objective, texts, probs, model):
    """What the two losses of a text are on average, over texts, times and states: a sum over all of them."""
    every = [(n, s) for n, text in enumerate(texts) for s in itertools.product((0, 1, 2), repeat=len(text))]
    batch = rows_of([texts[n] for n, _ in every])
    states = torch.zeros_like(batch.input_ids)
    for row, (_, state) in enumerate(every):
        states[row, 1 : 1 + len(state)] = torch.tensor(state)
    sums = {"masked": 0.0, "insertion": 0.0}
    for t, weight in nodes():
        chance = objective.process.probabilities(torch.tensor(t, dtype=torch.float64))
        own = torch.tensor([weight * float(probs[n]) * math.prod(float(chance[i]) for i in s) for n, s in every])
        noised = objective.corrupt(batch, states, torch.full(batch.labels.shape, t, dtype=torch.float64))
        width = noised.batch.labels.shape[1]
        noised = replace(
            noised,
            weights=noised.weights * own[noised.rows // width],
            gap_weights=noised.gap_weights * own[noised.gaps // width],
        )
        for name, loss in objective.loss(model, noised).items():
            sums[name] += float(loss.total)
    return sums


@pytest.mark.parametrize("options", SCHEDULES)
def test_with_exact_posteriors_the_two_losses_together_are_the_entropy_of_the_texts(options):
    found = expected_losses(build(tight=True, **options), STRINGS.texts, STRINGS.probs, STRINGS.score)
    assert sum(found.values()) == pytest.approx(STRINGS.entropy, abs=2e-3)


def test_the_loss_as_published_is_above_the_entropy_by_the_orders_in_which_tokens_may_come():
    found = expected_losses(build(), STRINGS.texts, STRINGS.probs, STRINGS.score)
    table = orders(3)
    above = sum(float(p) * table[len(text)] for p, text in zip(STRINGS.probs, STRINGS.texts, strict=True))
    assert sum(found.values()) == pytest.approx(STRINGS.entropy + above, abs=2e-3)


@pytest.mark.parametrize("options", SCHEDULES)
def test_under_every_schedule_each_token_is_unmasked_once_so_that_uniform_tokens_cost_log_v_each(options):
    vocab, text = 5, (0, 1, 1)

    def uniform(*, input_ids, rows, heads, **_):
        return SimpleNamespace(
            logits=torch.zeros(len(rows), vocab), heads={"insertion": torch.zeros(len(heads["insertion"]))}
        )

    found = expected_losses(build(**options), [text], [1.0], uniform)
    assert found["masked"] == pytest.approx(len(text) * math.log(vocab), abs=2e-3)


def test_draws_average_to_the_sum_over_all_states():
    texts = STRINGS.texts[:6]
    objective = build(min_noise=1e-3, schedule="polynomial", schedule_options={"power": 2.0})
    batch = rows_of(texts * 700)
    noised = objective.prepare(batch, draws_for(batch))
    said = {name: float(loss.total) / len(batch) for name, loss in objective.loss(STRINGS.score, noised).items()}
    expected = expected_losses(objective, texts, [1 / 6] * 6, STRINGS.score)
    for name, value in expected.items():
        assert said[name] == pytest.approx(value, rel=0.08), name


def test_what_is_gone_leaves_the_stream_and_each_gap_says_how_much_it_misses():
    batch = rows_of([(0, 1, 0, 1, 1)], prompt=(BOS, 6))
    states = torch.tensor([[0, 0, GONE, GONE, MASKED, GONE, SHOWN]])
    noised = build().corrupt(batch, states, torch.full((1, 7), 0.5))
    assert noised.batch.input_ids.tolist() == [[BOS, 6, SPECIAL.mask, 1]]
    assert noised.batch.positions.tolist() == [[0, 1, 2, 3]]
    assert (noised.rows.tolist(), noised.targets.tolist()) == ([2], [0])
    assert (noised.gaps.tolist(), noised.missing.tolist()) == ([1, 2, 3], [2, 1, 0])
    assert noised.time.tolist() == [[0.5] * 4]
    assert batch.input_ids.tolist() == [[BOS, 6, 0, 1, 0, 1, 1]]


def test_of_an_answer_that_is_all_gone_the_prompt_remains_and_its_last_row_misses_everything():
    batch = rows_of([(0, 1), (1, 1, 0)])
    noised = build().corrupt(batch, torch.full((2, 4), GONE), torch.ones(2, 4))
    assert noised.batch.input_ids.tolist() == [[BOS], [BOS]]
    assert noised.missing.tolist() == [2, 3]
    assert not len(noised.rows)


def two_turns():
    """A packed row: a document of two turns, one of a single turn, padding; question rows are 6."""
    ids = torch.tensor([[6, 0, 1, 6, 1, 1, 0, 6, 6, 1, 0, 9]])
    labels = torch.tensor([[-100, 0, 1, -100, 1, 1, 0, -100, -100, 1, 0, -100]])
    documents = torch.tensor([[0] * 7 + [1] * 4 + [PADDING]])
    positions = torch.tensor([[*range(7), *range(4), 0]])
    return replace(rows_of([(0,)]), input_ids=ids, labels=labels, documents=documents, positions=positions,
                   image_slots=torch.full_like(ids, TEXT))  # fmt: skip


def test_packed_documents_and_turns_keep_to_themselves():
    states = torch.tensor([[0, GONE, GONE, 0, SHOWN, GONE, MASKED, 0, 0, MASKED, GONE, 0]])
    noised = build().corrupt(two_turns(), states, torch.full((1, 12), 0.5))
    mask = SPECIAL.mask
    assert noised.batch.input_ids.tolist() == [[6, 6, 1, mask, 6, 6, mask]]
    assert noised.batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert noised.batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert noised.gaps.tolist() == [0, 1, 2, 3, 5, 6]
    assert noised.missing.tolist() == [2, 0, 1, 0, 0, 1]
    seen = noised.visibility.dense()[0, 0]
    assert bool(seen[:4, :4].all()), "a question sees what of its answer there is"
    assert not bool(seen[:4, 4:].any())


def test_what_has_no_label_is_never_masked_or_gone_and_what_is_missing_is_all_that_is():
    batch = two_turns()
    given = batch.input_ids[(batch.labels == IGNORE) & (batch.documents != PADDING)].tolist()
    for step in range(40):
        noised = build(min_noise=1e-3).prepare(batch, draws_for(batch, step))
        kept = noised.batch
        left = (kept.labels == IGNORE) & (kept.documents != PADDING)
        assert kept.input_ids[left].tolist() == given
        assert int(noised.missing.sum()) == int((batch.labels != IGNORE).sum() - (kept.labels != IGNORE).sum())
        assert len(noised.gaps) == int((kept.labels != IGNORE).sum()) + 3, (
            "one in front of each answer, one behind each"
        )


def test_an_example_is_noised_the_same_whatever_it_is_padded_to_and_batched_with():
    texts = [(0, 1, 1), (1, 0, 0), (1,)]
    both, longer = rows_of(texts), rows_of([*texts, (0,) * 9])
    objective = build(min_noise=1e-3)
    for step in range(10):
        noised = [objective.prepare(b, replace(draws_for(both, step), indices=b.indices)) for b in (both, longer)]
        for row in range(3):
            kept = [n.batch.input_ids[row][n.batch.documents[row] >= 0].tolist() for n in noised]
            assert kept[0] == kept[1]


def test_images_and_positions_on_three_axes_go_along():
    batch = rows_of([(0, 1, 0)], prompt=(5, 5, BOS))
    slots = torch.tensor([[0, 1, TEXT, TEXT, TEXT, TEXT]])
    positions = torch.stack([torch.arange(6), *[torch.tensor([0, 0, 1, 2, 3, 4])] * 3])[:, None]
    batch = replace(batch, image_slots=slots, positions=positions)
    noised = build().corrupt(batch, torch.tensor([[0, 0, 0, GONE, SHOWN, SHOWN]]), torch.full((1, 6), 0.5))
    assert noised.batch.image_slots.tolist() == [[0, 1, TEXT, TEXT, TEXT]]
    assert noised.batch.positions[0].tolist() == [[0, 1, 2, 3, 4]]
    assert noised.batch.positions[1].tolist() == [[0, 0, 1, 2, 3]]


def test_spans_leave_what_is_around_them_given():
    text = tuple(i % 2 for i in range(40))
    batch = rows_of([text] * 50)
    noised = build(spans=1.0, min_noise=1e-3).prepare(batch, draws_for(batch))
    for row in range(50):
        scored = (noised.batch.labels[row] != IGNORE).nonzero().squeeze(1)
        assert not len(scored) or int(scored[-1] - scored[0]) + 1 == len(scored), "a span is one run"
    assert 0.2 < float(noised.counts["masked"]) / (50 * 40) < 0.5, "a third on average"
    in_front = len(noised.gaps) - int((noised.batch.labels != IGNORE).sum())
    assert 45 <= in_front <= 50, "gaps in and around the spans alone, of which few are empty"
    whole = build(min_noise=1e-3).prepare(batch, draws_for(batch))
    assert float(whole.counts["masked"]) == 50 * 40


def test_an_answer_mean_divides_each_answer_by_its_length():
    batch = rows_of([(0, 1, 1, 0), (1,)])
    states = torch.tensor([[0, MASKED, MASKED, GONE, MASKED], [0, MASKED, 0, 0, 0]])
    time = torch.full((2, 5), 0.25)
    noised = build(reduction="answer_length").corrupt(batch, states, time)
    assert noised.weights.tolist() == [1.0, 1.0, 1.0, 4.0]
    assert noised.gap_weights.tolist() == [1.0] * 4 + [4.0] * 2
    assert {name: float(count) for name, count in noised.counts.items()} == {"masked": 2.0, "insertion": 2.0}


def test_what_it_asks_of_a_model():
    asked = requirements("insertion", {}, "full")
    assert asked == {"process": "insertion", "time_conditioning": True, "heads": {"insertion": {}}}
    assert not requirements("insertion", {"time_conditioning": False}, "full")["time_conditioning"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "masked"}, "tokens, batch_length, answer_length"),
        ({"spans": 2}, "between 0 and 1"),
        ({"min_noise": 0}, "1e-3 is usual"),
        ({"insertion_weight": 0}, "above 0"),
        ({"schedul": "linear"}, "schedule"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_model_whose_prompt_does_not_see_the_answer_is_refused():
    with pytest.raises(ValueError, match=r"model\.visibility=full"):
        build_objective("insertion", {}, SPECIAL, "prefix")


def test_an_answer_without_a_row_in_front_is_refused():
    batch = rows_of([(0, 1)])
    with pytest.raises(ValueError, match="bos"):
        build().prepare(replace(batch, labels=batch.input_ids), draws_for(batch))


@pytest.mark.parametrize("name", ["linear", "cosine", "unmask_cosine"])
def test_states_gaps_and_both_losses_are_those_of_the_authors_code(name):
    """Recorded from brianlck/FlexMDM 99eb7b7 (interpolant.py, bregman.py), whose time is 1 - t."""
    told = {k.split(".")[1]: v for k, v in load_file(GOLDEN / "losses.safetensors").items() if k.startswith(f"{name}.")}
    options = {"linear": {}, "cosine": {"schedule": "cosine"}, "unmask_cosine": {"unmask_schedule": "cosine"}}[name]
    pad, special = 7, SpecialTokens(mask=6, eos=8, pad=7)
    objective = build_objective("insertion", options, special, "full")
    batch = rows_of([tuple(row[row != pad].tolist()) for row in told["x1"]], prompt=(5,))
    t = told["t"][:, None]
    states = torch.where(t < told["inserted"], GONE, torch.where(t < told["unmasked"], MASKED, SHOWN))
    states = torch.nn.functional.pad(states, (1, 0))
    noised = objective.corrupt(batch, states, (1 - t).expand(states.shape))
    width = noised.batch.input_ids.shape[1]
    for ours, real, theirs in zip(noised.batch.input_ids, noised.batch.documents >= 0, told["xt"], strict=True):
        assert ours[real].tolist() == [5, *theirs[theirs != pad].tolist()]
    assert noised.missing.tolist() == told["gaps"][told["gap_mask"]].tolist()

    def model(*, rows, heads, **_):
        said, gaps = heads["insertion"], told["expected"]
        logits = told["logits"][rows // width, rows % width - 1]
        return SimpleNamespace(logits=logits, heads={"insertion": gaps[said // width, said % width].log()})

    losses = objective.loss(model, noised)
    assert float(losses["masked"].total) == pytest.approx(float(told["unmask_loss"]), rel=1e-5)
    assert float(losses["insertion"].total) == pytest.approx(float(told["insertion_loss"]), rel=1e-4)
