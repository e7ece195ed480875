"""A model that inserts tokens, asked through the pipeline: lengths come out, what is given stays, rows do not mix."""

from __future__ import annotations

import pytest
import torch

import dmllm.samplers.ahead
import dmllm.samplers.denoise
import dmllm.samplers.insertion
import dmllm.samplers.stream
from dmllm.data.holes import parse
from dmllm.pipeline import Pipeline
from tests.samplers.test_ahead import Late
from tests.test_pipeline import make, picture

TEXTS = ["A [MASK:*] is left of [MASK:*].", "a[MASK:2]b[MASK:*]", "[MASK:*]", "so [MASK:*] it is"]
MESSAGES = ["what?", None, [{"role": "user", "content": "and now?"}], None]
PICTURES = [picture(0), None, [picture(1), picture(2)], picture(0)]
SETTINGS = [
    {},
    {"steps": 3, "remasking": "margin"},
    {"temperature": 1.0, "remasking": "origin"},
    {"temperature": 0.7, "top_p": 0.9, "threshold": 0.05},
    {"cfg_scale": 0.5, "remasking": "entropy"},
]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """A random model whose gaps miss now more, now less."""
    made = make("full")
    torch.manual_seed(0)
    made.model.adapt(process="insertion", time_conditioning=True, heads={"insertion": {}})
    head = made.model.heads["insertion"]
    torch.nn.init.normal_(head.up_proj.weight, std=1.0)
    torch.nn.init.normal_(head.down_proj.weight, std=0.1)
    torch.nn.init.constant_(head.down_proj.bias, -1.5)
    torch.nn.init.normal_(made.model.backbone.time_embedding.down_proj.weight, std=1.0)
    return made


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o)) or "greedy")
def test_answers_have_lengths_of_their_own_and_are_those_that_each_request_gets_alone(pipeline, options):
    options = {**options, "max_new_tokens": 12, "generator": 3}
    asked = ["what?", "and this, what is it?", "so", "picture"]
    pictures = [None, picture(1), None, picture(0)]
    together = pipeline.chat(asked, pictures, **options)
    assert len({len(reply.ids) for reply in together}) > 1
    for question, image, reply in zip(asked, pictures, together, strict=True):
        assert pipeline.chat(question, image, **options) == reply
        assert pipeline.special.mask not in reply.ids
        assert len(reply.ids) <= 12


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o)) or "greedy")
def test_what_is_fixed_stays_and_holes_take_what_they_need(pipeline, options):
    options = {**options, "max_new_tokens": 10, "generator": 3}
    together = pipeline.infill(TEXTS, MESSAGES, PICTURES, **options)
    for text, found in zip(TEXTS, together, strict=True):
        fixed, holes = parse(text)
        assert found.text == "".join(part for pair in zip(fixed, [*found.filled, ""], strict=True) for part in pair)
        for ids, hole in zip(found.hole_ids, holes, strict=True):
            assert hole.grows or len(ids) == hole.least
            assert pipeline.special.mask not in ids
    lengths = [len(ids) for found in together for ids in found.hole_ids]
    assert len(set(lengths)) > 2, lengths
    for text, messages, pictures, found in zip(TEXTS, MESSAGES, PICTURES, together, strict=True):
        assert pipeline.infill(text, messages, pictures, **options) == found


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o)) or "greedy")
def test_shapes_that_do_not_depend_on_data_change_nothing(pipeline, options, monkeypatch):
    """As on a GPU, where every place is asked for and the host is told late."""
    options = {**options, "max_new_tokens": 10, "generator": 3}
    asked = ["what?", "and this, what is it?", "so"], [None, picture(1), None]
    plain = pipeline.chat(*asked, **options), pipeline.infill(TEXTS, MESSAGES, PICTURES, **options)
    for module in (dmllm.samplers.stream, dmllm.samplers.denoise, dmllm.samplers.insertion):
        monkeypatch.setattr(module, "is_static", lambda device: True)
    monkeypatch.setattr(dmllm.samplers.ahead, "Flag", Late)
    assert (pipeline.chat(*asked, **options), pipeline.infill(TEXTS, MESSAGES, PICTURES, **options)) == plain


def test_an_answer_has_a_likelihood(pipeline):
    options = {"num_samples": 64, "generator": 0}
    likely, twice = (pipeline.score([[5, 6, 7]], [[9, 10, 11]], **options, batch_size=size) for size in (64, 5))
    assert float(likely) == pytest.approx(float(twice), abs=1e-3)
    assert float(likely) < 0


def test_steps_are_calls(pipeline):
    assert pipeline.infill("a [MASK:*] b", "what?", steps=5).num_forwards == 5
    assert pipeline.infill("a [MASK:*] b", "what?", max_new_tokens=7).num_forwards == 7
    assert pipeline.chat("what?", steps=5).num_forwards == 5


def test_a_stream_shows_the_text_as_it_grows(pipeline):
    steps = list(pipeline.stream("what?", max_new_tokens=12, steps=6, eos_token_id=[]))
    assert len(steps) == 6
    known = [int(step.committed.sum()) for step in steps]
    assert known == sorted(known)
    assert pipeline.replies(steps[-1])[0].ids == pipeline.chat("what?", max_new_tokens=12, steps=6, eos_token_id=[]).ids


def test_a_draft_is_grown_between_its_masks_and_behind_its_end(pipeline):
    mask, prompt = pipeline.special.mask, [[5, 6, 7]]
    options = {"max_new_tokens": 14, "generator": 0, "temperature": 1.0, "eos_token_id": []}
    found = pipeline.generate(prompt, draft=[[10, mask, 11]], **options)
    answer = found.sequences[0, 3:].tolist()
    assert answer[0] == 10
    assert 11 in answer[2:]
    assert pipeline.generate(prompt, draft=[[10, 11]], **options).sequences[0, 3:5].tolist() == [10, 11]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a [MASK:1..3]", r"say \[MASK:\*\]"), ("a[MASK:*][MASK:2]b", "are one"), ("a [MASK:**]", "is no hole")],
)
def test_holes_that_mean_nothing_are_refused(pipeline, text, message):
    with pytest.raises(ValueError, match=message):
        pipeline.infill(text, "what?")


def test_a_text_by_itself_cannot_begin_with_a_growing_hole(pipeline):
    with pytest.raises(ValueError, match="bos"):
        pipeline.infill("[MASK:*] b")
    assert pipeline.infill("a [MASK:*]", max_new_tokens=4).text.startswith("a ")


def test_a_model_that_fills_masks_has_no_holes_of_any_length():
    with pytest.raises(ValueError, match="objective insertion"):
        make("full").infill("a [MASK:*] b", "what?")


@pytest.mark.parametrize("options", [{"block_length": 4}, {"choices": ["a", "b"]}, {"suffix_ids": [3]}, {"steps": 1}])
def test_settings_of_other_models_are_refused(pipeline, options):
    with pytest.raises(ValueError, match=r"inserts tokens|at least 2"):
        pipeline.chat("what?", max_new_tokens=8, **options)
