"""Evaluation: the same answers however they are batched or interrupted, and nothing lost or mixed up."""

from __future__ import annotations

import json

import pytest

from dmllm.config import load_config
from dmllm.evaluation.config import SuiteConfig, TaskConfig
from dmllm.evaluation.results import Results, summary_lines
from dmllm.evaluation.runner import evaluate
from tests.evaluation.fake import FakePipeline, write_llava
from tests.test_pipeline import make as tiny_pipeline

TURNS = [
    [("how many?", "3", "count"), ("what is it?", "a red dot", "caption"), ("color?", "red", "color")],
    [("how many now?", "2", "count"), ("what is this?", "a blue dot", "caption"), ("which color?", "blue", "color")],
]
TRUTHS = {question: answer for turns in TURNS for question, answer, _ in turns}
TIMES = ("seconds", "answers_per_second", "date")


@pytest.fixture
def data(tmp_path):
    return write_llava(tmp_path / "data", TURNS)


def suite(data, **settings) -> SuiteConfig:
    task = TaskConfig(name="dots", data=str(data), decode_by_kind={"caption": {"max_new_tokens": 32}})
    return SuiteConfig(**{"tasks": [task], "batch_size": 2, **settings})


def lines(folder):
    """Predictions without what the clock says."""
    return [{k: v for k, v in p.items() if k not in TIMES} for p in Results.read(folder).predictions()]


def test_answers_are_written_in_the_order_of_the_data_and_asked_by_equal_settings(tmp_path, data):
    pipeline = FakePipeline(TRUTHS)
    results = evaluate(pipeline, suite(data), tmp_path / "out", model_name="fake")
    assert [p["id"] for p in results.predictions()] == [f"dots/{r}/{t}" for r in range(2) for t in range(3)]
    assert [len(texts) for texts, _ in pipeline.batches] == [2, 2, 2]
    for texts, decode in pipeline.batches:
        assert {text in ("what is it?", "what is this?") for text in texts} == {decode == {"max_new_tokens": 32}}
    first = results.predictions()[0]
    assert first["truth"] == ["3"]
    assert first["answer"] == "3"
    assert first["score"] == 1
    assert first["record"] == f"{data}: record 0"
    assert first["num_forwards"] == 1


def test_scores_are_kept_for_each_kind_and_together(tmp_path, data):
    wrong = {**TRUTHS, "color?": "blue", "which color?": "red", "how many?": "4"}
    results = evaluate(FakePipeline(wrong), suite(data), tmp_path / "out", model_name="fake")
    together = results.scores("dots")
    assert (together["value"], together["count"]) == (0.5, 6)
    assert results.scores("dots", "color")["value"] == 0
    assert results.scores("dots", "count")["value"] == 0.5
    assert results.scores("dots", "caption")["value"] == 1
    low, high = together["interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert Results.read(tmp_path / "out").summary == results.summary
    assert summary_lines([tmp_path / "out"])[1].split() == ["dots", "50.0%", "6"]


def test_every_result_says_where_it_comes_from(tmp_path, data):
    results = evaluate(
        FakePipeline(TRUTHS), suite(data, decode={"steps": 8}), tmp_path / "out", model_name="some/model"
    )
    told = results.summary
    assert told["model"]["name"] == "some/model"
    assert told["model"]["parameters"] == 6
    assert len(told["model"]["sha256"]) == len(told["tasks"]["dots"]["data_sha256"]) == 64
    assert told["tasks"]["dots"]["decode"]["caption"]["max_new_tokens"] == 32
    assert told["tasks"]["dots"]["decode"]["color"]["steps"] == 8
    assert {"torch", "transformers", "python"} <= set(told["packages"])
    assert told["forwards_per_answer"] == pytest.approx(sum(map(len, TRUTHS.values())) / 6, abs=1e-3)
    assert load_config(SuiteConfig, tmp_path / "out" / "suite.yaml") == suite(data, decode={"steps": 8})


def test_the_batch_size_changes_no_answer(tmp_path, data):
    for size in (1, 4):
        evaluate(FakePipeline(), suite(data, batch_size=size), tmp_path / str(size), model_name="fake")
    assert lines(tmp_path / "1") == lines(tmp_path / "4")
    assert len({p["answer"] for p in lines(tmp_path / "1")}) == 6


def test_other_seeds_draw_other_answers(tmp_path, data):
    for seed in (0, 1):
        evaluate(FakePipeline(), suite(data, seed=seed), tmp_path / str(seed), model_name="fake")
    assert lines(tmp_path / "0") != lines(tmp_path / "1")


def test_a_run_stopped_in_the_middle_of_a_line_goes_on_to_the_same_results(tmp_path, data):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluate(FakePipeline(), suite(data), whole, model_name="fake")
    with pytest.raises(KeyboardInterrupt):
        evaluate(FakePipeline(stop_after=2), suite(data), cut, model_name="fake")
    path = cut / "predictions.jsonl"
    written = path.read_text().splitlines(keepends=True)
    assert 0 < len(written) < 6
    path.write_text("".join(written) + '{"id": "dots/1/')
    resumed = FakePipeline()
    evaluate(resumed, suite(data, batch_size=3), cut, model_name="fake")
    assert lines(cut) == lines(whole)
    assert sum(len(texts) for texts, _ in resumed.batches) == 6 - len(written)


def test_a_finished_folder_is_not_asked_again(tmp_path, data):
    evaluate(FakePipeline(TRUTHS), suite(data), tmp_path / "out", model_name="fake")
    again = FakePipeline(TRUTHS)
    results = evaluate(again, suite(data), tmp_path / "out", model_name="fake")
    assert again.batches == []
    assert results.scores("dots")["value"] == 1


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path, data):
    out = tmp_path / "out"
    evaluate(FakePipeline(TRUTHS), suite(data), out, model_name="fake")
    with pytest.raises(ValueError, match=r"suite\.seed was 0, now 1"):
        evaluate(FakePipeline(TRUTHS), suite(data, seed=1), out, model_name="fake")
    with pytest.raises(ValueError, match=r"decode\.steps was None, now 4"):
        evaluate(FakePipeline(TRUTHS), suite(data, decode={"steps": 4}), out, model_name="fake")
    other = FakePipeline(TRUTHS)
    other.model.weight.data += 1
    with pytest.raises(ValueError, match=r"model\.sha256 was"):
        evaluate(other, suite(data), out, model_name="fake")
    data.write_text(data.read_text().replace("red dot", "red spot"))
    with pytest.raises(ValueError, match=r"questions\.dots was"):
        evaluate(FakePipeline(TRUTHS), suite(data), out, model_name="fake")


def test_predictions_of_other_questions_are_refused(tmp_path, data):
    out = tmp_path / "out"
    evaluate(FakePipeline(TRUTHS), suite(data), out, model_name="fake")
    path = out / "predictions.jsonl"
    path.write_text(path.read_text().replace("dots/0/1", "dots/9/1"))
    with pytest.raises(ValueError, match="line 2 answers 'dots/9/1', but 'dots/0/1' is expected"):
        evaluate(FakePipeline(TRUTHS), suite(data), out, model_name="fake")


def test_an_unreadable_picture_is_named_or_counted(tmp_path, data):
    (data.parent / "0.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"record 0: .*0\.png"):
        evaluate(FakePipeline(TRUTHS), suite(data), tmp_path / "out", model_name="fake")
    results = evaluate(FakePipeline(TRUTHS), suite(data, on_error="skip"), tmp_path / "out", model_name="fake")
    assert results.summary["tasks"]["dots"]["skipped"] == 3
    assert results.scores("dots")["count"] == 3
    assert "record 0" in results.predictions()[0]["error"]


def test_one_refused_request_does_not_take_its_batch_along(tmp_path, data):
    pipeline = FakePipeline(TRUTHS, refuse="color?")
    with pytest.raises(ValueError, match="record 0: the prompt is too long"):
        evaluate(pipeline, suite(data, batch_size=6), tmp_path / "out", model_name="fake")
    results = evaluate(pipeline, suite(data, batch_size=6, on_error="skip"), tmp_path / "out", model_name="fake")
    assert results.summary["tasks"]["dots"]["skipped"] == 2
    assert results.scores("dots")["value"] == 1


def test_a_task_of_which_nothing_is_left_has_no_score(tmp_path, data):
    with pytest.raises(ValueError, match="all 6 records were skipped"):
        evaluate(FakePipeline(refuse=""), suite(data, on_error="skip"), tmp_path / "out", model_name="fake")


def test_wrong_decode_settings_are_refused_before_anything_is_asked(tmp_path, data):
    pipeline = FakePipeline(TRUTHS)
    with pytest.raises(ValueError, match=r"'dots', decode: .*did you mean steps"):
        evaluate(pipeline, suite(data, decode={"step": 4}, on_error="skip"), tmp_path / "out", model_name="fake")
    assert pipeline.batches == []
    assert not (tmp_path / "out" / "settings.json").exists()


def test_strange_characters_survive_the_way_to_the_file_and_back(tmp_path, data):
    odd = {question: f"{answer}\u2028\ud800\n\u00fc" for question, answer in TRUTHS.items()}
    results = evaluate(FakePipeline(odd), suite(data), tmp_path / "out", model_name="fake")
    assert [p["answer"] for p in results.predictions()] == list(odd.values())


def test_metrics_of_several_kinds_stand_together_with_the_share_exactly_right(tmp_path):
    data = write_llava(tmp_path / "data", [[("read", "AB12", "reading"), ("color?", "red", "color")]])
    task = TaskConfig(name="t", data=str(data), metric={"reading": "char_accuracy", "default": "exact_match"})
    pipeline = FakePipeline({"read": "AB1", "color?": "red"})
    results = evaluate(pipeline, SuiteConfig(tasks=[task]), tmp_path / "out", model_name="fake")
    assert results.scores("t", "reading")["value"] == 0.75
    assert results.scores("t")["value"] == 0.875
    assert results.scores("t")["details"] == {"exactly right": 0.5}


def test_a_real_pipeline_answers_a_builtin_suite(tmp_path, monkeypatch):
    monkeypatch.setattr("dmllm.evaluation.tasks.chance", lambda name: {})  # measured on thousands of pictures
    task = TaskConfig(name="scenes", builtin="scenes", num=1, metric="char_accuracy")
    asked = SuiteConfig(tasks=[task], decode={"max_new_tokens": 4, "temperature": 1.0})
    results = evaluate(tiny_pipeline("prefix"), asked, tmp_path / "out", model_name="tiny")
    predictions = results.predictions()
    assert len(predictions) == results.summary["answers"] > 0
    assert all(1 <= p["num_forwards"] <= 4 and p["finish_reason"] in ("stop", "length") for p in predictions)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results.summary
