"""Answers that must match, by the shipped model and by one of random weights: choices, expressions, JSON schemas."""

from __future__ import annotations

import copy
import json
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmllm
from dmllm.pipeline import Pipeline
from dmllm.samplers.config import REMASKING

jsonschema = pytest.importorskip("jsonschema")
NAMES = st.sampled_from(["color", "n", "is it", "shape", "größe"])
VALUES = st.one_of(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "null"},
            {"type": "string", "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"enum": ["red", "blue", 3, True]},
            {"const": "x"},
        ]
    )
)
SCHEMAS = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, min_size=1, max_size=3).map(
            lambda fields: {"type": "object", "properties": fields, "required": list(fields)}
        ),
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}),
        st.tuples(inner, inner).map(lambda pair: {"anyOf": list(pair)}),
    ),
    max_leaves=4,
)
OPTIONS = st.fixed_dictionaries(
    {
        "remasking": st.sampled_from(list(REMASKING)),
        "block_length": st.sampled_from([None, 8, 13]),
        "temperature": st.sampled_from([0.0, 1.0]),
        "threshold": st.sampled_from([None, 0.1, 0.9]),
    }
)


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return dmllm.load("dmllm-tiny")


@pytest.fixture(scope="module")
def random_weights(tiny: Pipeline) -> Pipeline:
    model, draws = copy.deepcopy(tiny.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=draws))
    return Pipeline(model, tiny.processor, tiny.generation)


QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("which", ["tiny", "random_weights"])
def test_every_answer_to_a_schema_is_a_document_of_it(which: str, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(which)

    @QUICK
    @given(SCHEMAS, OPTIONS, st.integers(0, 3))
    def check(schema: dict[str, Any], options: dict[str, Any], more: int) -> None:
        least = pipeline.constraints.compile(schema).least(200)
        reply = pipeline.chat("a", constraint=schema, generator=0, max_new_tokens=least + more, **options)
        jsonschema.validate(json.loads(reply.text), schema)

    check()


@pytest.mark.parametrize("which", ["tiny", "random_weights"])
def test_rows_of_one_batch_follow_their_own_constraints(which: str, request: pytest.FixtureRequest) -> None:
    pipeline, date, schema = request.getfixturevalue(which), r"\d{4}-[01]\d", {"type": "integer"}
    asked, said = ["when?", "what?", "many?", "is it?"], [date, None, schema, ["yes", "no", "perhaps"]]
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"generator": 3, "max_new_tokens": 16, "temperature": temperature}
        replies = pipeline.chat(asked, constraint=said, **options)
        assert re.fullmatch(date, replies[0].text)
        assert int(replies[2].text) is not None
        assert replies[3].text in said[3]
        for question, constraint, reply in zip(asked, said, replies, strict=True):
            alone = pipeline.chat(question, **options, **({} if constraint is None else {"constraint": [constraint]}))
            assert (alone.text, alone.ids) == (reply.text, reply.ids)


def test_choices_are_answered_and_the_most_probable_one_is(tiny: Pipeline) -> None:
    picture = "dmllm/assets/examples/scene.png"
    free = tiny.chat("how many objects are there?", picture)
    assert tiny.chat("how many objects are there?", picture, choices=["1", "2", "3", "4", "5"]).text == free.text
    for options in ({}, {"threshold": None, "steps": 32}, {"block_length": 4}):
        reply = tiny.chat("is it?", picture, choices=["yes", "no"], **options)
        assert reply.text in ("yes", "no")
        assert reply.finish_reason == "stop"
    each = tiny.chat(["a", "b", "c"], choices=[["x"], None, ["y", "zz"]])
    assert each[0].text == "x"
    assert each[2].text in ("y", "zz")


def test_generate_and_stream_follow_constraints_and_a_draft_is_completed(tiny: Pipeline) -> None:
    ids = tiny.processor.prompt("a").input_ids[None]
    answer = tiny.generate(ids, constraint="[xyz]{2}", max_new_tokens=8).sequences[0, ids.shape[1] :]
    assert re.fullmatch("[xyz]{2}", tiny.processor.decode(answer))
    *_, last = tiny.stream("a", constraint="[xyz]{2}", max_new_tokens=8)
    assert re.fullmatch("[xyz]{2}", tiny.text(last))
    letter = tiny.processor.tokenizer.convert_tokens_to_ids("x")
    draft = [[tiny.special.mask, letter]]
    answer = tiny.generate(ids, draft=draft, constraint="[yz]x+[0-9]", max_new_tokens=8).sequences[0, ids.shape[1] :]
    assert int(answer[1]) == letter
    assert re.fullmatch("[yz]x+[0-9]", tiny.processor.decode(answer))


def test_an_automaton_is_compiled_once_and_reports_its_size_and_time(tiny: Pipeline) -> None:
    first = tiny.constraints.compile("[a-z]{0,9}")
    assert tiny.constraints.compile("[a-z]{0,9}") is first
    assert set(first.report) == {"states", "classes", "edges", "pairs", "megabytes", "seconds"}
    for number in range(70):
        tiny.constraints.compile(choices=[str(number)])
    assert tiny.constraints.compile("[a-z]{0,9}") is not first  # the least recent ones are given up


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"constraint": "[0-9]{9}", "max_new_tokens": 4}, "the shortest text that matches has 9 tokens"),
        ({"constraint": "("}, "is not a regular expression"),
        ({"constraint": 7}, "constraint=7 must be a regular expression (a text), a JSON schema (a dict)"),
        ({"constraint": ["a", "b"]}, "constraint: 2 for 1 requests; give one for all"),
        ({"constraint": {"type": "what"}}, "the JSON schema is not understood"),
        ({"choices": "yes"}, "choices='yes' must be a list of texts"),
        ({"choices": ["a"], "constraint": "a"}, "and go without constraint="),
        ({"choices": []}, "must be a list of texts, at least one"),
        ({"choices": ["a"], "stop_sequences": [[5]]}, "a constraint says where the text ends"),
        ({"choices": ["a"], "eos_token_id": []}, "no end token may fill the rest; set eos_token_id"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_decoding(tiny: Pipeline, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        tiny.chat("a", **options)


def test_choices_and_expressions_work_without_the_extra_and_a_schema_says_what_to_install(tiny, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    monkeypatch.setitem(sys.modules, "outlines_core.json_schema", None)
    assert tiny.chat("a", choices=["q"]).text == "q"
    assert tiny.chat("a", constraint="w+").text.strip("w") == ""
    with pytest.raises(ImportError, match=re.escape("pip install 'dmllm[constraints]'")):
        tiny.chat("a", constraint={"type": "object", "properties": {"unseen": {"type": "null"}}})


def test_a_checkpoint_without_a_tokenizer_takes_no_constraint(tiny: Pipeline) -> None:
    bare = Pipeline(tiny.model)
    with pytest.raises(ValueError, match="this checkpoint has no tokenizer"):
        bare.generate([[5, 6]], choices=["a"])
