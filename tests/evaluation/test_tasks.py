"""What is asked: each pair of a conversation alone, each row of questions and answers, and nothing that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmllm.config import load_config
from dmllm.evaluation.config import SuiteConfig, TaskConfig
from dmllm.evaluation.tasks import BadRecord, Question, read_task, templated
from tests.evaluation.fake import words, write_llava

SUITES = sorted((Path(__file__).parents[2] / "eval" / "suites").glob("*.yaml"))
SUITES = [path for path in SUITES if path.stem != "paradigms"]  # a comparison: tests/evaluation/test_comparison.py


def read(tmp_path, on_error="raise", **settings):
    return read_task(TaskConfig(name="t", **settings), decode={"steps": 4}, folder=tmp_path, on_error=on_error)


def questions(tmp_path, **settings) -> list[Question]:
    return read(tmp_path, **settings).items


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_every_shipped_suite_loads(path):
    assert load_config(SuiteConfig, path).tasks


def test_each_pair_of_a_conversation_is_asked_alone_with_its_picture(tmp_path):
    data = write_llava(tmp_path, [[("how many?", "3", "count"), ("which color?", "red", "color")]])
    first, second = questions(tmp_path, data=str(data))
    assert (first.id, first.kind, first.text, first.truths) == ("t/0/0", "count", "how many?", ("3",))
    assert (second.id, second.kind, second.text, second.truths) == ("t/0/1", "color", "which color?", ("red",))
    for question in (first, second):
        assert [part["type"] for part in question.messages[0]["content"]] == ["image", "text"]
        assert question.images == [str(tmp_path / "0.png")]
    assert first.location == f"{data}: record 0"


def test_rows_of_questions_and_answers_are_read_in_every_form(tmp_path):
    rows = [
        {"question": "a?", "answer": "x", "image": "i.png", "kind": "easy"},
        {"question": "b?", "answers": ["x", "y"]},
        {"question": "c?", "answers": [{"answer": "x", "answer_id": 1}, {"answer": "z"}]},
        {"question": "how many?", "answer": 3},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = questions(tmp_path, data=str(path), image_folder=str(tmp_path))
    assert [q.truths for q in found] == [("x",), ("x", "y"), ("x", "z"), ("3",)]
    assert [q.kind for q in found] == ["easy", "all", "all", "all"]
    assert [q.images for q in found] == [[f"{tmp_path}/i.png"], [], [], []]
    assert [words(q.messages) for q in found] == ["a?", "b?", "c?", "how many?"]


def test_the_prompt_template_stands_around_the_question_and_leaves_pictures_in_place():
    image = {"type": "image", "image": "x.png"}
    content = [image, {"type": "text", "text": "what {is} it?"}]
    asked = templated("Q: {question}\nShort answer:", content)
    assert asked == [image, {"type": "text", "text": "Q: what {is} it?\nShort answer:"}]
    assert content[1]["text"] == "what {is} it?"
    between = [{"type": "text", "text": "is this"}, image, {"type": "text", "text": "red?"}]
    assert [p.get("text") for p in templated("[{question}]", between)] == ["[is this", None, "red?]"]


def test_decode_settings_go_from_suite_to_task_to_kind(tmp_path):
    data = write_llava(tmp_path, [[("q", "a", "caption"), ("r", "b", "color")]])
    settings = {"decode": {"max_new_tokens": 8}, "decode_by_kind": {"caption": {"max_new_tokens": 64}}}
    caption, color = questions(tmp_path, data=str(data), **settings)
    assert caption.decode == {"steps": 4, "max_new_tokens": 64}
    assert color.decode == {"steps": 4, "max_new_tokens": 8}


def test_kinds_and_limit_choose_what_is_asked(tmp_path):
    data = write_llava(tmp_path, [[("q", "1", "count"), ("r", "red", "color")]] * 3)
    assert [q.id for q in questions(tmp_path, data=str(data), kinds=["color"])] == ["t/0/1", "t/1/1", "t/2/1"]
    assert [q.id for q in questions(tmp_path, data=str(data), limit=3)] == ["t/0/0", "t/0/1", "t/1/0"]
    with pytest.raises(ValueError, match="no question is of kind"):
        questions(tmp_path, data=str(data), kinds=["shape"])


def test_a_metric_for_each_kind_must_cover_all_kinds(tmp_path):
    data = write_llava(tmp_path, [[("q", "A1", "reading"), ("r", "red", "color")]])
    both = questions(tmp_path, data=str(data), metric={"reading": "char_accuracy", "default": "exact_match"})
    assert [q.metric for q in both] == ["char_accuracy", "exact_match"]
    with pytest.raises(ValueError, match="kind 'color'"):
        questions(tmp_path, data=str(data), metric={"reading": "char_accuracy"})


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "a?"}, "answers"),
        ({"question": "a?", "answers": []}, "answers"),
        ({"question": ["a?"], "answer": "x"}, "question is"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "without a question"),
        ({"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "x"}]}, "marker"),
    ],
)
def test_a_bad_record_is_named_or_counted(tmp_path, row, complaint):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "q", "answer": "a"}, row]))
    with pytest.raises(ValueError, match=rf"rows.json: record 1: .*{complaint}"):
        read(tmp_path, data=str(path))
    good, bad = read(tmp_path, on_error="skip", data=str(path)).items
    assert isinstance(good, Question)
    assert isinstance(bad, BadRecord)
    assert bad.id == "t/1"


def test_a_truth_that_the_metric_cannot_score_is_a_bad_record(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "is there a dog?", "answer": "perhaps"}]))
    with pytest.raises(ValueError, match="record 0: POPE needs one truth, yes or no"):
        read(tmp_path, data=str(path), metric="pope")


def test_a_builtin_data_set_is_made_on_disk_and_brings_its_chance(tmp_path):
    task = read(tmp_path, builtin="scenes", num=2, metric={"reading": "char_accuracy", "default": "exact_match"})
    assert Path(task.data) == tmp_path / "scenes-test-2-0" / "data.json"
    assert len(task.sha256) == 64
    kinds = {q.kind for q in task.items}
    assert set(task.chance) == kinds - {"reading"}
    again = read(tmp_path, builtin="scenes", num=2)
    assert (again.sha256, [q.text for q in again.items]) == (task.sha256, [q.text for q in task.items])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "t"}, "either data"),
        ({"name": "t", "data": "x", "builtin": "scenes"}, "either data"),
        ({"name": "t", "data": "x", "prompt": "hello"}, "question"),
        ({"name": "t", "data": "x", "metric": "exact"}, "exact_match"),
        ({"name": "t", "data": "x", "limit": 0}, "limit=0"),
    ],
)
def test_wrong_settings_say_what_to_type(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        TaskConfig(**settings)


def test_tasks_of_a_suite_have_distinct_names():
    task = TaskConfig(name="t", data="x")
    with pytest.raises(ValueError, match="distinct"):
        SuiteConfig(tasks=[task, task])
