"""Training losses recorded from the authors' code, out of the objective and the reduction that each one names.

What was hidden, and at which time, is as recorded; weights, reduction, visibility and the loss are the objective's.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dmllm.nn.visibility import Visibility
from dmllm.objectives import build_objective
from dmllm.pipeline import load
from dmllm.types import IGNORE, PADDING, TEXT, Batch
from tests.families import recorded_pictures
from tests.families.recorded import GOLDEN, Recorded, mean


def text_batch(ids: Tensor, labels: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> Batch:
    return Batch(
        input_ids=ids,
        labels=labels,
        image_slots=torch.full_like(ids, TEXT),
        documents=torch.zeros_like(ids) if documents is None else documents,
        positions=torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions,
    )


def picture_batch(recorded: Any, pipe: Any, ids: Tensor, images: list[list[str]], labels: Tensor) -> Batch:
    """Ids and pictures as the stream that the model is fed, with the recorded labels of that stream."""
    paths = [[str(recorded.folder / f"image_{name}.png") for name in own] for own in images]
    _, asked = pipe._asked(ids, None, paths)
    batch = pipe._collate([row.example for row in asked])
    assert batch.input_ids.shape == labels.shape
    return replace(batch, labels=labels)


# Dream: weights by what is shown nearby


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_dreams_weights_and_loss_are_those_of_the_masked_objective_with_cart(p) -> None:
    recorded = Recorded("dream")
    pipe, case = recorded.load(), f"cart_p{p}"
    ids, hidden = recorded.inputs["train"], recorded.inputs["train_masked"]
    learned = build_objective("masked", {"weight": "cart", "cart_p": p, "reduction": "masked"}, pipe.special, "full")
    noised = learned.corrupt(text_batch(ids, ids), hidden, recorded.inputs["train_t"][:, None].expand(ids.shape))
    assert torch.equal(noised.batch.input_ids, recorded.expected[f"{case}.noisy"])
    torch.testing.assert_close(noised.weights, recorded.expected[f"{case}.cart_weight"][hidden], atol=1e-6, rtol=0)
    expected = float(recorded.expected[f"{case}.loss_token_norm"])
    assert mean(learned, pipe.model, noised) == pytest.approx(expected, abs=1e-4)


# SDAR: two copies


def test_sdars_two_copies_and_loss_are_those_of_the_block_objective() -> None:
    recorded = Recorded("sdar")
    pipe, expected = recorded.load(), {n[8:]: x for n, x in recorded.expected.items() if n.startswith("loss_bd.")}
    positions, labels = recorded.inputs["train_pos"], recorded.inputs["labels"]
    documents = (positions == 0).cumsum(1) - 1
    batch = text_batch(recorded.inputs["train"], labels, documents, positions)
    learned = build_objective("block", {"times": "document"}, pipe.special, pipe.model.config.visibility)
    hidden = expected["masked"]
    time = torch.ones(hidden.shape).masked_scatter(hidden, expected["p_mask"])
    noised = learned.corrupt(batch, hidden, time)
    assert mean(learned, pipe.model, noised) == pytest.approx(float(expected["loss"]), abs=1e-4)
    seen, length = noised.visibility.dense()[:, 0], labels.shape[1]
    for row, starts in enumerate(([0, 16], [0, 9, 16])):  # theirs: each conversation noised, then as it is
        theirs = {}
        for start, end in itertools.pairwise(starts):
            theirs |= {(True, place): 2 * start + place - start for place in range(start, end)}
            theirs |= {(False, place): start + end + place - start for place in range(start, end)}
        copied = noised.batch.documents[row, length:] * 9 + noised.batch.positions[row, length:]
        real = noised.batch.documents[row, length:] != PADDING
        keys = [(False, place) for place in range(length)] + [(True, place) for place in copied[real].tolist()]
        rows = torch.tensor([theirs[key] for key in keys])
        kept = torch.cat([torch.arange(length), length + real.nonzero().flatten()])
        assert torch.equal(seen[row][kept][:, kept], expected["attn_mask"][row][rows][:, rows])
        assert torch.equal(noised.batch.input_ids[row, kept], expected["concat_ids"][row, rows])


# LLaDA-V: 1/p over an answer's length


@pytest.fixture(scope="module")
def llada_v():
    return recorded_pictures.Recorded("llada_v", threads=1), load_file(GOLDEN / "llada_v" / "losses.safetensors")


@pytest.mark.parametrize("name", ["one_image", "two_turn_conv_mask", "text_batch_pad"])
def test_llada_vs_conversation_losses_are_divided_by_answer_length(llada_v, name) -> None:
    recorded, saved = llada_v
    case = {key.removeprefix(f"{name}/"): x for key, x in saved.items() if key.startswith(f"{name}/")}
    labels, hidden = case["labels_merged"], case["masked"].bool()
    if name == "text_batch_pad":
        pipe = recorded.pipe()
        padding = torch.where(case["attention_mask"].bool(), 0, PADDING)
        batch = text_batch(case["input_ids"], labels, padding)
    else:
        pipe = recorded.pipe(image_aspect_ratio="pad")
        batch = picture_batch(recorded, pipe, case["input_ids"], [["a"]], labels)
    learned = build_objective("masked", {"reduction": "answer_length"}, pipe.special, "full")
    time = ((1 - 1e-3) * case["t"] + 1e-3)[:, None].expand(labels.shape)
    noised = learned.corrupt(batch, hidden, time)
    if name == "two_turn_conv_mask":  # each turn sees the turns before it
        turn = case["conversation_ids"]
        noised = replace(noised, visibility=Visibility(turn, torch.zeros_like(hidden), torch.zeros_like(turn)))
    assert mean(learned, pipe.model, noised) == pytest.approx(float(case["loss"]), abs=1e-4)


# LaViDa: complementary views, the plain mean over what they hide


@pytest.fixture(scope="module")
def lavida():
    return recorded_pictures.Recorded("lavida", threads=1), load_file(GOLDEN / "lavida" / "losses.safetensors")


@pytest.mark.parametrize(
    ("name", "ratio", "images"),
    [("one", "anyres", [["a"]]), ("fim", "pad", [["a"]]), ("batch_eospad", "anyres", [["a"], ["c"]])],
)
def test_lavidas_loss_is_the_mean_over_complementary_views_that_see_padding(lavida, name, ratio, images) -> None:
    recorded, saved = lavida
    pipe = recorded.pipe(image_aspect_ratio=ratio)
    first, second = saved[f"{name}/labels_2x"].chunk(2)
    labels = torch.where(first == IGNORE, second, first)
    batch = picture_batch(recorded, pipe, saved[f"{name}/input_ids"], images, labels)
    padding, length = batch.documents == PADDING, labels.shape[1]
    batch = replace(batch, positions=torch.arange(length).expand_as(labels))  # padding is counted on
    options = {
        "complementary": True,
        "at_least_one": True,
        "weight": "none",
        "reduction": "masked",
        "padding": "seen",
    }
    learned = build_objective("masked", options, pipe.special, "full")
    hidden = saved[f"{name}/final_masked_indices_2x"].bool()
    noised = learned.corrupt(batch, hidden.chunk(2)[0], saved[f"{name}/p_mask"].expand(labels.shape))
    assert torch.equal(noised.rows, hidden.flatten().nonzero().flatten())

    def model(*, input_ids, image_slots, visibility, rows, **pictures):  # their padding is a row of zeros
        features = pipe.model.encode_images(pictures["pixel_values"], pictures["image_resizes"])
        stream = pipe.model.embed(input_ids, image_slots, features)
        stream = stream.masked_fill(torch.cat([padding, padding])[..., None], 0)
        return pipe.model(inputs_embeds=stream, visibility=visibility, rows=rows, positions=pictures["positions"])

    assert mean(learned, model, noised) == pytest.approx(float(saved[f"{name}/loss"]), abs=1e-4)


# MMaDA: three losses of one batch


CAPTION = 13  # rows in front of a picture


@pytest.fixture(scope="module")
def mmada():
    recorded = load_file(GOLDEN / "mmada" / "losses.safetensors")
    return load(str(GOLDEN / "mmada"), device="cpu"), recorded


def mmada_loss(pipe: Any, saved: dict[str, Tensor], rows: slice, scored: Tensor, p: Tensor, **options: Any) -> float:
    ids, labels = saved["input_ids"][rows], torch.where(scored, saved["labels"][rows], IGNORE)
    learned = build_objective("masked", options, pipe.special, "full")
    hidden = (ids == pipe.special.mask) & scored
    return mean(learned, pipe.model, learned.corrupt(text_batch(ids, labels), hidden, p))


def test_mmadas_text_loss_is_divided_by_all_rows_or_by_given_answer_lengths(mmada) -> None:
    pipe, saved = mmada
    rows, p = slice(2, 4), saved["p_mask_lm"]
    scored = torch.ones(p.shape, dtype=torch.bool)
    found = mmada_loss(pipe, saved, rows, scored, p, reduction="batch_length")
    assert found == pytest.approx(float(saved["loss_lm"]), abs=1e-4)
    hidden = saved["input_ids"][rows] == pipe.special.mask
    answer = hidden | ((~hidden).cumsum(1) + hidden.sum(1, keepdim=True) <= 20)  # 20 rows, what is hidden among them
    assert answer.sum(1).tolist() == [20, 20]
    found = mmada_loss(pipe, saved, rows, answer, p, reduction="answer_length")
    assert found == pytest.approx(float(saved["loss_lm_with_answer_lengths_20"]), abs=1e-4)


def test_mmadas_loss_of_answers_about_pictures_is_divided_by_answer_length(mmada) -> None:
    pipe, saved = mmada
    answer = saved["mmu_prompt_mask"] == 0
    assert torch.equal(answer.sum(1), saved["answer_lengths"][:, 0])
    found = mmada_loss(pipe, saved, slice(4, 6), answer, saved["p_mask_mmu"], reduction="answer_length")
    assert found == pytest.approx(float(saved["loss_mmu"]), abs=1e-4)


@pytest.mark.parametrize(("padding", "same"), [("faint", True), ("hidden", False), ("seen", False)])
def test_mmadas_loss_of_pictures_is_that_of_faint_padding(mmada, padding, same) -> None:
    """The mean over what is hidden and, as labelled there, the two tokens around the codes, which are shown."""
    pipe, saved = mmada
    ids, labels = saved["input_ids"][:2], saved["labels"][:2].clone()
    labels[:, :CAPTION] = IGNORE
    documents = torch.where(saved["t2i_masks"].bool(), 0, PADDING)
    options = {"weight": "none", "reduction": "masked", "padding": padding}
    learned = build_objective("masked", options, pipe.special, "full")
    noised = learned.corrupt(text_batch(ids, labels, documents), labels != IGNORE, torch.ones(ids.shape))
    noised = replace(noised, batch=replace(noised.batch, input_ids=ids))
    difference = abs(mean(learned, pipe.model, noised) - float(saved["loss_t2i"]))
    assert (difference < 1e-4) == same
