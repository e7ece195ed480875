"""The report: everything in one file, nothing from outside, nothing from a model or a data set taken as markup."""

from __future__ import annotations

import json
import re

import pytest

from dmllm.evaluation.charts import MOST_POINTS, averaged, loss_curve, smoothed, ticks
from dmllm.evaluation.config import SuiteConfig, TaskConfig
from dmllm.evaluation.report import write_report
from dmllm.evaluation.runner import evaluate
from tests.evaluation.fake import FakePipeline, write_llava

EVIL = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two evaluations of the same questions: one wrong in all but one, one right in all but one."""
    folder = tmp_path_factory.mktemp("report")
    data = write_llava(folder / "data", [[("how many?", "3", "count"), (f"what {EVIL}?", "a red dot", "caption")]])
    suite = SuiteConfig(tasks=[TaskConfig(name="dots & more", data=str(data), chance={"count": 0.25, "caption": 0.0})])
    answers = {"before": {"how many?": "3"}, "after": {"how many?": EVIL, f"what {EVIL}?": "a red dot"}}
    for label, known in answers.items():
        evaluate(FakePipeline(known), suite, folder / label, model_name="a/model")
    metrics = folder / "metrics.jsonl"
    logged = [{"step": s, "loss": 5 / s, **({"validation_loss": 6 / s} if s % 5 == 0 else {})} for s in range(1, 20)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in logged))
    return folder


@pytest.fixture(scope="module")
def page(results):
    both = [(label, results / label) for label in ("before", "after")]
    path = write_report(results, both, loss_curve=results / "metrics.jsonl", pipeline=FakePipeline())
    assert path == results / "report.html"
    return path.read_text(encoding="utf-8")


def test_it_needs_nothing_from_outside_and_runs_nothing(page):
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?://", page)
    assert "default-src 'none'" in page


def test_what_comes_from_data_and_model_is_escaped(page):
    assert EVIL not in page
    assert page.count("&lt;script&gt;") >= 2
    assert "dots &amp; more" in page


def test_scores_stand_beside_chance_before_and_after(page):
    table = re.search(r"<table.*?</table>", page, re.S)[0]
    assert re.findall(r'<th class="number">(\w+)</th>', table) == ["before", "after", "chance", "questions"]
    numbers = re.findall(r'<td class="number"[^>]*>([\d.]+)<small>%</small>', table)
    assert numbers == ["50.0", "50.0", "12.5", "0.0", "100.0", "0.0", "100.0", "0.0", "25.0"]


def test_pictures_questions_answers_and_truths_are_shown(page):
    assert page.count("<figure") == 2
    assert page.count('<figure class="card right"') == page.count('<figure class="card wrong"') == 1
    assert "truth: 3" in page
    assert "before: guess" in page
    assert "data:image/png;base64" in page
    assert "data:image/gif;base64" in page
    assert 'class="curve"' in page


def test_it_says_how_to_get_the_numbers_again(page, results):
    assert f"dmllm eval {results / 'after' / 'suite.yaml'} --model a/model" in page
    assert "max_new_tokens=8" in page


def test_one_result_alone_makes_a_report_without_curve_and_animation(results, tmp_path):
    page = write_report(tmp_path / "one.html", [("only", results / "after")]).read_text(encoding="utf-8")
    assert "An answer appears" not in page
    assert '<svg class="curve"' not in page


def test_results_of_other_questions_do_not_stand_side_by_side(results, tmp_path):
    data = write_llava(tmp_path / "data", [[("how many?", "2", "count")]])
    suite = SuiteConfig(tasks=[TaskConfig(name="dots & more", data=str(data))])
    evaluate(FakePipeline(), suite, tmp_path / "other", model_name="a/model")
    with pytest.raises(ValueError, match="other questions in 'other'"):
        write_report(tmp_path, [("other", tmp_path / "other"), ("after", results / "after")])


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No finished evaluation"):
        write_report(tmp_path, [("x", tmp_path)])


def test_a_picture_that_has_gone_leaves_a_gap_not_an_error(tmp_path):
    data = write_llava(tmp_path / "data", [[("how many?", "2", "count")]])
    suite = SuiteConfig(tasks=[TaskConfig(name="t", data=str(data))])
    evaluate(FakePipeline(), suite, tmp_path / "out", model_name="m")
    (tmp_path / "data" / "0.png").unlink()
    assert "picture not found" in write_report(tmp_path, [("x", tmp_path / "out")], pipeline=FakePipeline()).read_text()


def test_ticks_are_round_and_span_the_values():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    for low, high in [(0.31, 2.9), (-3, 7), (1e-5, 3e-5), (5, 5), (0, 0), (100, 4e6)]:
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert len(found) <= 9


def test_averaging_keeps_the_mean_and_smoothing_keeps_a_line():
    points = [(float(i), float(i % 7)) for i in range(4 * MOST_POINTS)]
    fewer = averaged(points)
    assert len(fewer) == MOST_POINTS
    assert sum(p[1] for p in fewer) / len(fewer) == pytest.approx(sum(p[1] for p in points) / len(points))
    line = [(float(i), 2.0 * i) for i in range(100)]
    assert [value for _, value in smoothed(line)] == pytest.approx([value for _, value in line])
    assert loss_curve([], []) is None
    assert "NaN" not in str(loss_curve([(1, 2.0), (2, float("nan")), (3, 1.0)], []))
