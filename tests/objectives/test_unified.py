"""Truths of the unified objective: kinds of answers, exact shares, restricted scores, and MMaDA's recorded losses."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dmllm.diffusion.absorbing import draw_exactly
from dmllm.objectives import build_objective
from dmllm.objectives.draws import Draws
from dmllm.pipeline import load
from dmllm.types import IGNORE, PADDING, PREFIX, Batch, Vocabulary
from tests.families.recorded import GOLDEN

VOCABULARY = Vocabulary(mask=9, eos=8, pad=8, size=30, codes=(12, 28))
PICTURE = torch.arange(12, 28)


def row(*parts: tuple[list[int], bool], document: int = 0) -> tuple[list[int], list[int], list[int]]:
    ids = [number for own, _ in parts for number in own]
    labels = [number if labelled else IGNORE for own, labelled in parts for number in own]
    return ids, labels, [document] * len(ids)


def batch_of(*rows: tuple[list[int], list[int], list[int]], length: int = 24) -> Batch:
    columns = [[*own, *[fill] * (length - len(own))] for one in rows for own, fill in zip(one, (8, IGNORE, PADDING))]
    ids, labels, documents = (torch.tensor(columns[i::3]) for i in range(3))
    return Batch(
        input_ids=ids,
        labels=labels,
        image_slots=torch.full_like(ids, -1),
        documents=documents,
        positions=torch.arange(length).expand_as(ids),
        indices=torch.arange(len(ids)),
    )


DRAWN = row(([1, 2], False), (PICTURE.tolist(), True))
ASKED = row((PICTURE[:4].tolist(), False), ([3], False), ([4, 5, 6], True))
SAID = row(([1], False), ([2, 3, 4, 5], True))
BATCH = batch_of(DRAWN, ASKED, SAID)


def draws_for(batch: Batch, step: int = 0) -> Draws:
    return Draws(seed=0, step=step, num_examples=len(batch), indices=batch.indices)


def uniform(*, parts, **_):
    """A model that knows nothing; it is asked for parts alone."""
    return SimpleNamespace(logits=tuple(torch.zeros(len(rows), end - first) for rows, (first, end) in parts))


def test_each_answer_is_of_one_kind_and_hidden_where_it_is_labelled():
    learned = build_objective("unified", {}, VOCABULARY, "full")
    for step in range(20):
        noised = learned.prepare(BATCH, draws_for(BATCH, step))
        hidden = noised.batch.input_ids != BATCH.input_ids
        assert bool((hidden <= (BATCH.labels != IGNORE)).all())
        rows = {kind: (own // 24).unique().tolist() for kind, own in noised.rows.items()}
        assert rows["image"] == [0]
        assert set(rows["understanding"]) <= {1}
        assert set(rows["text"]) <= {2}
        assert torch.equal(torch.cat(list(noised.rows.values())).sort().values, hidden.flatten().nonzero().squeeze(1))
        assert bool((noised.targets["image"] < 16).all() & (noised.targets["image"] >= 0).all())


def test_a_picture_that_all_documents_see_makes_their_answers_answers_about_it():
    ids, labels, documents = row((PICTURE[:4].tolist(), False), ([4, 5], True))
    shared = batch_of((ids, labels, [PREFIX] * 4 + documents[4:]))
    learned = build_objective("unified", {"understanding": {"min_noise": 1.0, "max_noise": 1.0}}, VOCABULARY, "prefix")
    noised = learned.prepare(shared, draws_for(shared))
    assert (len(noised.rows["understanding"]), len(noised.rows["text"])) == (2, 0)


def test_of_a_pictures_codes_exactly_the_share_is_hidden_that_its_time_says():
    learned = build_objective("unified", {}, VOCABULARY, "full")
    many = batch_of(*[DRAWN] * 64)
    noised = learned.prepare(many, draws_for(many))
    counts = (noised.batch.input_ids == 9).sum(1)
    t = noised.time[:, 2]
    assert torch.equal(counts, (16 * torch.cos(math.pi / 2 * (1 - t))).round().clamp(min=1).long())
    assert float(counts.float().mean()) / 16 == pytest.approx(2 / math.pi, abs=0.03)
    free = build_objective("unified", {"exact": False}, VOCABULARY, "full")
    assert not torch.equal((free.prepare(many, draws_for(many)).batch.input_ids == 9).sum(1), counts)


def test_exact_shares_are_of_each_document():
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, PADDING]])
    maskable = torch.tensor([[True, True, True, True, True, False, False]])
    prob = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.01, 0.01, 1.0]])
    found = draw_exactly(prob, torch.tensor([[0.4, 0.1, 0.9, 0.2, 0.5, 0.0, 0.0]]), maskable, documents)
    assert found.tolist() == [[False, True, False, True, True, False, False]]


def test_codes_are_scored_among_codes_and_words_among_words():
    learned = build_objective("unified", {"text": {"weight": "none", "reduction": "masked"}}, VOCABULARY, "full")
    losses = learned.loss(uniform, learned.prepare(BATCH, draws_for(BATCH, 3)))
    assert float(losses["image"].total / losses["image"].count) == pytest.approx(math.log(16), rel=1e-5)
    texts = build_objective("unified", {"restrict": False}, VOCABULARY, "full")
    losses = texts.loss(uniform, texts.prepare(BATCH, draws_for(BATCH, 3)))
    assert float(losses["image"].total / losses["image"].count) == pytest.approx(math.log(30), rel=1e-5)


def test_a_kind_that_a_batch_lacks_adds_nothing():
    only = batch_of(DRAWN)
    learned = build_objective("unified", {}, VOCABULARY, "full")
    losses = learned.loss(uniform, learned.prepare(only, draws_for(only)))
    assert [float(losses[kind].total) for kind in ("text", "understanding")] == [0.0, 0.0]
    assert [float(losses[kind].count) for kind in ("text", "understanding")] == [0.0, 0.0]


def test_mmadas_losses_of_texts_and_of_answers_about_pictures_are_two_parts_of_one_batch():
    saved, pipeline = load_file(GOLDEN / "mmada" / "losses.safetensors"), load(str(GOLDEN / "mmada"), device="cpu")
    special = replace(pipeline.model.vocabulary, codes=(128, 192))
    options = {
        "text": {"reduction": "batch_length"},
        "understanding": {"reduction": "answer_length"},
        "coefficients": {"image": 1.0, "text": 0.1, "understanding": 1.0},
        "restrict": False,
    }
    learned = build_objective("unified", options, special, "full")
    assert learned.coefficients == {"image": 1.0, "text": 0.1, "understanding": 1.0}
    for rows, kind, name in [(slice(2, 4), "text", "lm"), (slice(4, 6), "understanding", "mmu")]:
        ids, labels = saved["input_ids"][rows], saved["labels"][rows].clone()
        scored = torch.ones_like(ids, dtype=torch.bool) if name == "lm" else saved["mmu_prompt_mask"] == 0
        batch = Batch(
            input_ids=ids,
            labels=torch.where(scored, labels, IGNORE),
            image_slots=torch.full_like(ids, -1),
            documents=torch.zeros_like(ids),
            positions=torch.arange(ids.shape[1]).expand_as(ids),
        )
        noised = learned.corrupt(batch, (ids == special.mask) & scored, saved[f"p_mask_{name}"])
        with torch.no_grad():
            found = learned.loss(pipeline.model, noised)[kind]
        assert float(found.total / found.count) == pytest.approx(float(saved[f"loss_{name}"]), abs=1e-4)


def test_models_without_codes_and_options_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match=r"config.json needs an image_vocabulary"):
        build_objective("unified", {}, replace(VOCABULARY, codes=None), "full")
    with pytest.raises(ValueError, match=r"image: 'complementary' is no option of it"):
        build_objective("unified", {"image": {"complementary": True}}, VOCABULARY, "full")
    with pytest.raises(ValueError, match=r"'t2i' is no loss of this objective"):
        build_objective("unified", {"coefficients": {"t2i": 1.0}}, VOCABULARY, "full")
