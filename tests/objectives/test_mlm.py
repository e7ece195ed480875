"""Truths of BERT's objective: what is selected and what becomes of it, and pairs that are whole texts of their own."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.objectives import build_objective, requirements
from dmllm.objectives.draws import Draws
from dmllm.objectives.pairs import ANOTHER, NEXT, other_answers
from dmllm.types import IGNORE, PADDING, Batch, SpecialTokens, Vocabulary

MASK, EOS, PAD, IMAGE = 3, 1, 0, 2
SPECIAL = Vocabulary(mask=MASK, eos=EOS, pad=PAD, image=IMAGE, size=40)
HEAD = "next_sentence"


def batch_of(ids, start: int = 0) -> Batch:
    ids = torch.as_tensor(ids)
    return Batch(
        input_ids=ids,
        labels=ids.clone(),
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids),
        positions=torch.arange(ids.shape[1]).expand_as(ids),
        indices=torch.arange(start, start + len(ids)),
    )


def words(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def draws_for(batch: Batch, step: int = 0) -> Draws:
    return Draws(seed=0, step=step, num_examples=len(batch), indices=batch.indices)


def objective(visibility: str = "full", special: SpecialTokens = SPECIAL, **options):
    return build_objective("mlm", options, special, visibility)


def tiny(**heads) -> MultimodalModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DmllmConfig(backbone={**shape, "initializer_range": 0.3}, mask_token_id=MASK)
    model = MultimodalModel(config)
    model.initialise()
    model.adapt(heads=heads)
    return model.eval()


def test_of_all_tokens_12_percent_are_masks_and_one_and_a_half_each_random_or_as_they_were():
    batch = batch_of(words(400, 500))
    batch.labels[:, :100] = IGNORE
    noised = objective().prepare(batch, draws_for(batch))
    before, after = batch.input_ids.flatten()[noised.rows], noised.batch.input_ids.flatten()[noised.rows]
    share = lambda which: float(which.float().mean()) * len(noised.rows) / (400 * 400)
    masks, same = after == MASK, after == before
    assert share(masks) == pytest.approx(0.12, rel=0.03)
    assert share(~masks & ~same) == pytest.approx(0.015 * 35 / 36, rel=0.07), "a random word may be the same one"
    assert share(same) == pytest.approx(0.015 * 37 / 36, rel=0.07)
    others = torch.ones(400 * 500, dtype=torch.bool).scatter(0, noised.rows, False)
    assert torch.equal(noised.batch.input_ids.flatten()[others], batch.input_ids.flatten()[others])
    assert torch.equal(noised.targets, before), "what stays is predicted too"
    assert float(noised.counts["mlm"]) == len(noised.rows)
    drawn = after[~masks & ~same].bincount(minlength=40)
    assert drawn[[MASK, PAD, IMAGE]].sum() == 0
    assert drawn[EOS] > 0
    assert float(((drawn[4:] - drawn[4:].float().mean()) ** 2 / drawn[4:].float().mean()).sum()) < 68  # 35 of freedom


@pytest.mark.parametrize("visibility", ["full", "prefix"])
@pytest.mark.parametrize("at_least_one", [False, True])
def test_with_masks_alone_it_is_masked_diffusion_at_one_time_and_weight(visibility, at_least_one):
    batch = batch_of(words(6, 12))
    batch.labels[:, :5] = IGNORE
    alone = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0, "at_least_one": at_least_one}
    learned = objective(visibility, SpecialTokens(mask=MASK, eos=EOS, pad=PAD), **alone)
    same = {"weight": "none", "reduction": "masked", "min_noise": 0.15, "max_noise": 0.15, "at_least_one": at_least_one}
    masked = build_objective("masked", same, SPECIAL, visibility)
    model = tiny()
    found, expected = (
        next(iter(one.loss(model, one.prepare(batch, draws_for(batch))).values())) for one in (learned, masked)
    )
    assert found.total.item() == expected.total.item()
    assert float(found.count) == float(expected.count) > 0


def test_a_uniform_predictor_scores_log_v_and_a_coin_log_2():
    batch, learned = batch_of(words(8, 20)), objective(next_sentence=True)
    batch.labels[:, :7] = IGNORE
    uniform = lambda *, rows, heads, **_: SimpleNamespace(
        logits=torch.zeros(len(rows), 40), heads={n: torch.zeros(len(r), 2) for n, r in heads.items()}
    )
    losses = learned.loss(uniform, learned.prepare(batch, draws_for(batch)))
    assert float(losses["mlm"].total / losses["mlm"].count) == pytest.approx(math.log(40))
    assert float(losses[HEAD].total / losses[HEAD].count) == pytest.approx(math.log(2))
    assert float(losses[HEAD].count) == 8


@torch.no_grad()
def test_padding_and_the_split_into_micro_batches_never_change_the_loss():
    model, learned, whole = tiny(), objective(), batch_of(words(3, 11))
    whole.labels[:, :3] = IGNORE

    def part(rows: slice, width: int) -> Batch:
        fill = {"input_ids": PAD, "labels": IGNORE, "image_slots": -1, "documents": PADDING, "positions": 0}
        grown = {n: torch.nn.functional.pad(getattr(whole, n)[rows], (0, width - 11), value=f) for n, f in fill.items()}
        return Batch(**grown, indices=whole.indices[rows])

    def summed(parts: list[Batch]) -> list[float]:
        noised = [learned.prepare(p, Draws(seed=0, step=0, num_examples=3, indices=p.indices)) for p in parts]
        losses = [learned.loss(model, n)["mlm"] for n in noised]
        return [float(sum(x.total for x in losses)), float(sum(x.count for x in losses))]

    assert summed([part(slice(0, 1), 14), part(slice(1, 3), 11)]) == pytest.approx(summed([whole]), rel=1e-5)


QUESTIONS = [[10, 11, 12], [13], [14, 15], [16, 17, 18, 19]]
ANSWERS = [[20, EOS], [21, 22, 23, EOS], [24, 25, EOS], [26, 27, 28, 29, 30, EOS]]


def conversations(packed: bool = False) -> Batch:
    """Four questions with answers, each a row with padding, or two in a row."""
    rows = [[0, 1], [2, 3]] if packed else [[0], [1], [2], [3]]
    streams = {"input_ids": [], "labels": [], "documents": [], "positions": []}
    for row in rows:
        parts = [(QUESTIONS[i], ANSWERS[i]) for i in row]
        streams["input_ids"].append([x for q, a in parts for x in q + a])
        streams["labels"].append([x for q, a in parts for x in [IGNORE] * len(q) + a])
        streams["documents"].append([d for d, (q, a) in enumerate(parts) for _ in q + a])
        streams["positions"].append([p for q, a in parts for p in range(len(q + a))])
    width = max(map(len, streams["labels"])) + 1
    fill = {"input_ids": PAD, "labels": IGNORE, "documents": PADDING, "positions": 0}
    tensors = {n: torch.tensor([r + [fill[n]] * (width - len(r)) for r in rs]) for n, rs in streams.items()}
    slots = torch.full_like(tensors["labels"], -1)
    return Batch(**tensors, image_slots=slots, indices=torch.arange(len(rows)))


def texts(batch: Batch) -> list[tuple[list[int], ...]]:
    """Ids, labels, documents and positions of each row without padding."""
    real = [row != PADDING for row in batch.documents]
    streams = batch.input_ids, batch.labels, batch.documents, batch.positions
    return [tuple(stream[row][keep].tolist() for stream in streams) for row, keep in enumerate(real)]


@pytest.mark.parametrize("packed", [False, True])
def test_half_of_the_answers_are_another_examples_whole_with_its_labels_behind_the_own_question(packed):
    batch, seen, given = conversations(packed), [], [0] * 4
    for step in range(400):
        swapped, firsts, classes = other_answers(batch, draws_for(batch, step), "answer")
        whole = texts(swapped)
        assert swapped.input_ids.shape[1] == max(len(row[0]) for row in whole), "no padding that no row needs"
        found = []
        for row, (ids, labels, documents, positions) in enumerate(whole):
            for document in sorted(set(documents)):
                own = [i for i, d in enumerate(documents) if d == document]
                number = 2 * row + document if packed else row
                question, answer = QUESTIONS[number], [ids[i] for i in own][len(QUESTIONS[number]) :]
                assert [ids[i] for i in own][: len(question)] == question
                assert answer in ANSWERS
                assert [labels[i] for i in own] == [IGNORE] * len(question) + answer
                assert [positions[i] for i in own] == list(range(len(own)))
                assert int(firsts[len(found)]) == row * swapped.input_ids.shape[1] + own[0]
                found.append(ANOTHER if answer != ANSWERS[number] else NEXT)
                given[ANSWERS.index(answer)] += found[-1]
        assert classes.tolist() == found
        seen += found
    assert sum(seen) / len(seen) == pytest.approx(0.5, abs=0.04)
    assert min(given) > 0.8 * max(given), "each other answer is as likely"
    assert torch.equal(batch.input_ids, conversations(packed).input_ids), "the caller's batch is not touched"


def test_pairs_are_drawn_from_an_examples_own_numbers_whatever_the_order_of_rows():
    batch = conversations()
    turned = replace(batch, **{n: getattr(batch, n).flip(0) for n in (
        "input_ids", "labels", "image_slots", "documents", "positions", "indices")})  # fmt: skip
    for step in range(20):
        one, *_ = other_answers(batch, draws_for(batch, step), "answer")
        other, *_ = other_answers(turned, draws_for(turned, step), "answer")
        assert torch.equal(one.input_ids, other.input_ids.flip(0))


def test_positions_on_three_axes_go_on_from_the_own_question():
    batch = conversations()
    behind = torch.tensor([0, 10, 20, 30])  # as after pictures of several sizes
    axes = batch.positions[None] + (behind[None, :, None] * torch.tensor([0, 1, 1, 1])[:, None, None])
    flat, *_ = other_answers(batch, draws_for(batch), "answer")
    deep, *_ = other_answers(replace(batch, positions=axes), draws_for(batch), "answer")
    assert torch.equal(deep.positions[0], flat.positions)
    real = flat.documents != PADDING
    assert torch.equal(deep.positions[1][real], (flat.positions + behind[:, None])[real])


def test_pictures_stay_with_their_question():
    batch = conversations()
    slots = torch.arange(batch.labels.numel()).view_as(batch.labels).masked_fill(batch.labels != IGNORE, -1)
    batch = replace(batch, image_slots=slots.masked_fill(batch.documents == PADDING, -1))
    for step in range(5):
        swapped, *_ = other_answers(batch, draws_for(batch, step), "answer")
        for row, question in enumerate(QUESTIONS):
            assert torch.equal(swapped.image_slots[row, : len(question)], slots[row, : len(question)])
            assert (swapped.image_slots[row, len(question) :] == -1).all()


def test_a_text_without_a_prompt_is_cut_in_two_and_so_is_an_answer_if_asked():
    batch = batch_of([[4, 5, 6, 7, 8, EOS], [10, 11, 12, 13, EOS, EOS]])
    batch.labels[1, 5] = IGNORE  # padding that is not scored goes along with the half that it stands behind
    halves = ([6 + 1, 8, EOS], [13, EOS, EOS])
    for step in range(8):
        swapped, _, classes = other_answers(batch, draws_for(batch, step), "answer")
        for row, (ids, *_) in enumerate(texts(swapped)):
            assert ids == batch.input_ids[row, :3].tolist() + halves[row ^ int(classes[row])]
    batch = conversations()
    swapped, _, classes = other_answers(batch, draws_for(batch, 1), "half")
    assert classes.sum() > 0
    for (ids, *_), question, answer in zip(texts(swapped), QUESTIONS, ANSWERS, strict=True):
        half = len(question) + (len(answer) + 1) // 2
        assert ids[:half] == [*question, *answer][:half]


def test_what_fills_an_answer_up_is_no_part_of_its_half():
    batch = batch_of([[4, 5, 6, 7, EOS, EOS, EOS, EOS, EOS], [8, 9, 10, 11, 12, 13, 14, EOS, EOS]])
    halves = ([7, EOS, EOS, EOS, EOS, EOS], [12, 13, 14, EOS, EOS])
    seen = set()
    for step in range(40):
        swapped, _, classes = other_answers(batch, draws_for(batch, step), "half")
        for row, (ids, *_) in enumerate(texts(swapped)):
            assert ids == [[4, 5, 6], [8, 9, 10, 11]][row] + halves[row ^ int(classes[row])]
        seen.add(tuple(classes.tolist()))
    assert len(seen) == 4


def test_equal_answers_are_no_other_ones_and_a_lone_example_is_refused():
    batch = batch_of([[4, 5, 20], [6, 7, 20], [8, 9, 20]])
    batch.labels[:, :2] = IGNORE
    for step in range(5):
        assert other_answers(batch, draws_for(batch, step), "answer")[2].tolist() == [NEXT] * 3
    one = batch_of([[4, 5, 20]])
    with pytest.raises(ValueError, match="holds a single example; set micro_batch_size=8"):
        other_answers(one, Draws(seed=0, step=0, num_examples=4, indices=one.indices), "answer")
    assert other_answers(one, draws_for(one), "answer")[2].tolist() == [NEXT]
    nothing = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    assert other_answers(nothing, draws_for(nothing), "answer")[1].numel() == 0


def test_the_head_learns_which_answer_belongs_to_which_question():
    """The answer says again what the question said: from log 2 to below a third of it."""
    model, learned = tiny(**{HEAD: {}}).train(), objective(next_sentence=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(120):
        key = 4 + words(16, 1, seed=step) % 4
        batch = batch_of(torch.cat([key, key, key + 10, key + 10, key + 10], 1))
        batch.labels[:, :2] = IGNORE
        found = learned.loss(model, learned.prepare(batch, draws_for(batch, step)))
        means = {name: loss.total / loss.count for name, loss in found.items()}
        torch.stack([*means.values()]).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(means[HEAD].item())
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert sum(losses[-20:]) / 20 < math.log(2) / 3


def test_what_does_not_fit_is_refused_and_a_model_gets_the_head_it_needs():
    full = {"process": "absorbing", "visibility": "full"}
    assert requirements("mlm", {}, "prefix") == {**full, "visibility": "prefix"}
    assert requirements("mlm", {"next_sentence": True}, "full") == {**full, "heads": {HEAD: {}}}
    assert requirements("mlm", {}, "causal") == full
    with pytest.raises(ValueError, match="next_sentence needs a first row that sees the answer"):
        requirements("mlm", {"next_sentence": True}, "prefix")
    with pytest.raises(ValueError, match=r"learns under visibility full or prefix, and this model's is block:4"):
        requirements("mlm", {}, "block:4")
    with pytest.raises(ValueError, match="give a Vocabulary, or random_replace_prob=0"):
        objective(special=SpecialTokens(mask=MASK, eos=EOS, pad=PAD))
    for options, message in (
        ({"mlm_probability": 0.0}, "mlm_probability=0.0 must lie above 0"),
        ({"mask_replace_prob": 0.95}, "at most 1 together"),
        ({"second_part": "third"}, "second_part='third' is not one of answer, half"),
    ):
        with pytest.raises(ValueError, match=message):
            build_objective("mlm", options, SPECIAL, "full")
