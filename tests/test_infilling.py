"""Texts with holes: what is fixed stays, holes are filled together, rows and seeds are independent."""

from __future__ import annotations

import pytest
import torch

import dmllm
from dmllm.data.holes import parse
from dmllm.infilling import MAX_CHOICES, Infilled
from dmllm.pipeline import Pipeline
from tests.test_pipeline import make, picture

TEXTS = [
    "A [MASK:1..3] is left of the [MASK:2].",
    "[MASK:4]",
    "a[MASK]b [MASK:2..3]",
    "A [MASK:1..3] is left of the [MASK:2].",
]
MESSAGES = ["what?", None, [{"role": "user", "content": "and now?"}], None]
PICTURES = [picture(0), None, [picture(1), picture(2)], picture(0)]
SETTINGS = [
    {},
    {"steps": 2, "remasking": "margin"},
    {"temperature": 1.0, "remasking": "random"},
    {"threshold": 0.05, "block_length": 4, "cfg_scale": 0.5},
    {"temperature": 0.7, "top_p": 0.9, "block_length": 4, "steps": 4},
    {"schedule": "time", "remasking": "origin", "remdm": "rescale", "eta": 0.8, "temperature": 1.0},
    {"entropy_bound": 0.5, "remasking": "entropy"},
    {"threshold": 0.1, "revoke_threshold": 0.5},
]


@pytest.fixture(scope="module", params=["full", "prefix"])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return make(request.param)


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o)) or "greedy")
def test_what_is_fixed_stays_and_a_row_of_a_batch_is_filled_as_alone(pipeline: Pipeline, options: dict) -> None:
    options = {**options, "generator": 3, "num_samples": 4}
    together = pipeline.infill(TEXTS, MESSAGES, PICTURES, **options)
    for text, found in zip(TEXTS, together, strict=True):
        fixed, holes = parse(text)
        assert found.text == "".join(part for pair in zip(fixed, [*found.filled, ""], strict=True) for part in pair)
        for ids, hole in zip(found.hole_ids, holes, strict=True):
            assert hole.least <= len(ids) <= hole.most
            assert pipeline.special.mask not in ids
        assert found.text == pipeline.processor.decode(found.ids)
        assert len(found.log_probs) == (0 if "4" in text else 3 if text[0] == "A" else 2)
    for text, messages, pictures, found in zip(TEXTS, MESSAGES, PICTURES, together, strict=True):
        alone = pipeline.infill(text, messages, pictures, **options)
        known = alone.log_probs.values(), found.log_probs.values()
        assert list(known[0]) == pytest.approx(list(known[1]), abs=1e-3)
        assert Infilled(**{**vars(alone), "log_probs": found.log_probs}) == found
        assert max(found.log_probs, key=found.log_probs.__getitem__, default=None) in (
            None,
            tuple(map(len, found.hole_ids)),
        )


def test_steps_are_calls_and_a_cache_changes_nothing(pipeline: Pipeline) -> None:
    asked = "a [MASK:6] b [MASK:6] c", "what?", picture(0)
    assert pipeline.infill(*asked).num_forwards == 12
    assert pipeline.infill(*asked, steps=3).num_forwards == 3
    assert pipeline.infill(*asked, steps=1).num_forwards == 1
    assert pipeline.infill(*asked, use_cache=False) == pipeline.infill(*asked)
    pipeline.generation["eos_token_id"] = list(range(250))
    assert pipeline.infill(*asked).num_forwards == 12, "an end of sequence is not waited for"
    del pipeline.generation["eos_token_id"]


def test_a_suffix_stands_behind_an_answer_in_place_of_its_end(pipeline: Pipeline) -> None:
    seen, embed = [], pipeline.model.embed

    def watching(ids, *rest):
        seen.append(ids[0, -2:].tolist())
        return embed(ids, *rest)

    pipeline.model.embed = watching
    for options, end in (({}, pipeline.special.eos), ({"suffix_ids": [7]}, 7)):
        found = pipeline.infill("a [MASK] b", "what?", **options)
        assert seen[-1] == [found.ids[-1], end]
    del pipeline.model.embed


def test_seeds_decide_and_generators_are_used_up(pipeline: Pipeline) -> None:
    options = {"temperature": 2.0, "num_samples": 2}
    text = "a [MASK:5..6] b"
    first = pipeline.infill(text, "what?", generator=1, **options)
    assert first == pipeline.infill(text, "what?", generator=1, **options)
    assert first != pipeline.infill(text, "what?", generator=2, **options)
    used = torch.Generator().manual_seed(1)
    assert pipeline.infill(text, "what?", generator=used, **options) == first
    assert pipeline.infill(text, "what?", generator=used, **options) != first
    pair = pipeline.infill([text, text], ["what?", "what?"], generator=1, **options)
    assert pair[0] == first != pair[1]


def test_a_hole_is_what_the_loop_finds_on_a_canvas_of_the_rest(pipeline: Pipeline) -> None:
    """One hole of one token: the most probable text there, given what stands on both sides and the end."""
    found = pipeline.infill("ab[MASK]d", "what?", picture(0))
    example, mask = pipeline.processor.prompt("what?", [picture(0)]), pipeline.special.mask
    encode = pipeline.processor.tokenizer.encode
    ids = [*encode("ab"), mask, *encode("d"), pipeline.special.eos]
    row = torch.tensor([[*example.input_ids.tolist(), *ids]])
    canvas = torch.arange(row.shape[1])[None] >= len(example)
    logits = pipeline.logits(row, images=[picture(0)], canvas=canvas)[0, len(example) + 2]
    texts = pipeline.processor.tokens.kinds[0]
    assert found.hole_ids == [[int(logits[: len(texts)].masked_fill(~texts, -torch.inf).argmax())]]
    picture_alone = pipeline.infill("ab[MASK]d", images=picture(0))
    said = pipeline.infill("ab[MASK]d", [{"role": "user", "content": [{"type": "image"}]}], picture(0))
    assert picture_alone == said


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p.infill("no hole"), "There is no hole"),
        (lambda p: p.infill("[MASK:1..9] [MASK:1..9]"), f"81 choices of lengths, more than the {MAX_CHOICES}"),
        (lambda p: p.infill("[MASK]", max_new_tokens=4), "max_new_tokens=4"),
        (lambda p: p.infill("[MASK]", choices=["a"]), "leave choices out"),
        (lambda p: p.infill(["[MASK]"], ["a", "b"]), "2 conversations for 1 texts|images"),
        (lambda p: p.infill("[MASK]", ["a", "b"]), "neither a text nor a list of messages"),
        (lambda p: p.infill(3), "is a string"),
        (lambda p: p.infill("[MASK]", stepps=3), "Unknown decode option"),
    ],
)
def test_what_is_not_understood_is_refused(pipeline: Pipeline, call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(pipeline)


@pytest.mark.parametrize("kind", ["block:4", "causal"])
def test_models_that_do_not_see_what_is_behind_a_hole_refuse(kind: str) -> None:
    with pytest.raises(ValueError, match=f"with visibility='{kind}' the text behind it is not seen"):
        make(kind).infill("a [MASK] b")


def test_the_shipped_model_fills_a_description_of_a_picture() -> None:
    pipeline = dmllm.load("dmllm-tiny", device="cpu")
    whole = "a small white triangle, a large red triangle, a small green triangle and a large cyan triangle"
    text = "a [MASK:1..5] triangle, a large [MASK:1..3], a small green triangle and a large [MASK] triangle"
    found = pipeline.infill(text, "describe the picture.", "examples/scene.png", generator=0)
    assert found.text == whole
    assert found.filled == ["small white", "red triangle", "cyan"]
    assert len(found.log_probs) == 15
