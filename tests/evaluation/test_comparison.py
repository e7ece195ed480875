"""Paradigms side by side: what runs is what was said, once; means are over seeds; the page says what was measured."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dmllm.cli import main
from dmllm.config import load_config
from dmllm.data import builtin
from dmllm.data.builtin import stories
from dmllm.evaluation.comparison import job as jobs
from dmllm.evaluation.comparison.bound import nats
from dmllm.evaluation.comparison.config import merge, read_comparison
from dmllm.evaluation.comparison.drawing import Line, lines
from dmllm.evaluation.comparison.driver import compare, jobs_of
from dmllm.evaluation.comparison.report import BEGIN, END, SUMMARY, markdown, write_into, write_report
from dmllm.evaluation.comparison.summary import over_seeds, summarise
from dmllm.evaluation.comparison.texts import choose, draw_freely, fill, read_holes
from dmllm.objectives import OBJECTIVES
from dmllm.training.config import TrainConfig

SUITE = Path(__file__).parents[2] / "eval" / "suites" / "paradigms.yaml"
SMALL = {
    "seeds": [0, 1],
    "processes": 1,
    "tokenizer": {"vocab_size": 400},
    "train": {
        "model": {
            "backbone": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "processor": {"answer_lengths": [4, 160]},
        },
        "steps": 3,
        "batch_size": 4,
        "log_every": 1,
        "validation": {"num_examples": 4, "every": 1},
    },
    "paradigms": [
        {"name": "left to right", "objective": "autoregressive", "bound": {}},
        {
            "name": "masks",
            "objective": "masked",
            "bound": {},
            "curve": [{"num_to_transfer": 8}, {"num_to_transfer": 80}],
        },
        {"name": "after", "objective": "masked", "start": "left to right", "options": {"anneal_steps": 0.5}},
    ],
    "studies": [
        {
            "name": "text",
            "title": "A few.",
            "data": [{"builtin": "stories", "num": 20}],
            "held_out": {"builtin": "stories", "num": 6, "options": {"kinds": ["story"]}},
            "test": {"builtin": "stories", "num": 40},
            "holes": ["continuation", "recall"],
            "questions": 2,
            "ranked": 1,
            "rank_samples": 2,
            "free": 2,
            "length": 20,
            "bound": 4,
            "bound_draws": 2,
            "curves": ["continuation", "free"],
            "timed": 1,
            "suite": [{"name": "asked", "builtin": "stories", "num": 4, "options": {"kinds": ["who"]}}],
        }
    ],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    config = read_comparison(file)
    return config, out, compare(config, out)


# What is said


def test_what_is_above_goes_over_what_is_below_and_named_things_by_their_names():
    below = {"a": 1, "b": {"c": 2, "d": 3}, "e": [{"name": "x", "n": 1}, {"name": "y", "n": 2}], "f": [1, 2]}
    above = {"b": {"c": 4}, "e": [{"name": "y", "n": 3, "m": 4}, {"name": "z"}], "f": [3]}
    assert merge(below, above) == {
        "a": 1,
        "b": {"c": 4, "d": 3},
        "e": [{"name": "x", "n": 1}, {"name": "y", "n": 3, "m": 4}, {"name": "z"}],
        "f": [3],
    }
    assert below["b"] == {"c": 2, "d": 3}


def test_the_shipped_comparison_has_every_objective_on_one_backbone_and_as_many_examples(tmp_path):
    for short in (False, True):
        config = read_comparison(SUITE, short=short)
        assert {p.objective for p in config.paradigms} == {*OBJECTIVES} - {"unified"}  # it learns pictures too
        for study in config.studies:
            recipes = [job.recipe() for job in jobs_of(config, tmp_path) if job.study == study]
            for recipe in recipes:
                path = tmp_path / "recipe.yaml"
                path.write_text(yaml.safe_dump(recipe))
                assert load_config(TrainConfig, path).objective.name in OBJECTIVES
            fresh = [recipe["model"]["backbone"] for recipe in recipes if "backbone" in recipe["model"]]
            assert all(backbone == fresh[0] for backbone in fresh)
            same = ("steps", "batch_size", "data", "optimiser", "schedule")
            assert len({json.dumps([recipe.get(key) for key in same]) for recipe in recipes}) == 1
    assert len(config.seeds) == 1
    assert len(read_comparison(SUITE).seeds) == 3


def test_what_make_compare_asks_for_is_there():
    asked = re.search(r"^ONLY = --studies (.*) --only (.*)$", (SUITE.parents[2] / "Makefile").read_text(), re.M)
    names = re.findall(r'"[^"]+"|\S+', asked[2])
    config = read_comparison(SUITE, only=[name.strip('"') for name in names], studies=asked[1].split())
    assert len(config.paradigms) == len(names)


def test_paradigms_and_studies_may_be_chosen_with_those_they_start_from(file):
    config = read_comparison(file, only=["after"])
    assert [p.name for p in config.paradigms] == ["left to right", "after"]
    assert [p.name for p in config.of(config.studies[0])] == ["left to right", "after"]
    assert read_comparison(file, ["--seeds=[7]"]).seeds == [7]
    with pytest.raises(ValueError, match="no paradigm is called 'mask'"):
        read_comparison(file, only=["mask"])
    with pytest.raises(ValueError, match="no study is called 'txt'"):
        read_comparison(file, studies=["txt"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"paradigms": [{"name": "a", "objective": "masked"}] * 2}, "distinct names"),
        ({"paradigms": [{"name": "a", "objective": "masked", "start": "b"}]}, "not another paradigm"),
        ({"seeds": []}, "at least one seed"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, change, says):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **change}))
    with pytest.raises(ValueError, match=says):
        read_comparison(path)


# What is done


def test_every_paradigm_is_trained_and_measured_for_every_seed(done):
    _, _, results = done
    assert [(r["paradigm"], r["seed"]) for r in results] == [
        *((p, s) for s in (0, 1) for p in ("left to right", "masks")),
        ("after", 0),
        ("after", 1),
    ]
    for found in results:
        assert found["training"]["steps"] == 3
        assert [step for step, _ in found["training"]["validation"]] == [1, 2, 3]
        assert found["holes"]["continuation"]["count"] == 2
        assert found["holes"]["continuation"]["how"] == (
            "left alone" if found["paradigm"] == "left to right" else "both sides"
        )
        assert found["suite"]["asked"]["who"]["count"] == 4
        assert ("bound" in found) == ("ranked" in found) == (found["paradigm"] != "after")
        assert len(found["curves"]["free"]) == (2 if found["paradigm"] == "masks" else 1)
    several, many = results[1]["curves"]["continuation"]
    assert many["forwards"] < several["forwards"]
    assert results[0]["seed"] != results[2]["seed"]
    assert results[0]["training"]["loss"] != results[2]["training"]["loss"]


def test_one_that_starts_from_another_starts_from_its_weights(done):
    _, out, _ = done
    recipe = yaml.safe_load((out / "text" / "after-1" / "train.yaml").read_text())
    assert recipe["model"]["checkpoint"] == str(out / "text" / "left-to-right-1" / "run" / "model")
    assert "backbone" not in recipe["model"]


def test_what_is_finished_is_not_done_again_and_what_is_asked_otherwise_is(done, monkeypatch):
    config, out, results = done
    monkeypatch.setattr(jobs, "train", lambda *_: pytest.fail("trained again"))
    assert compare(config, out) == results
    other = jobs_of(config, out)[0]
    assert replace(other, study=replace(other.study, questions=1)).results() is None
    assert other.results() == results[0]


# What a number means


class Oracle:
    """Answers every question about stories rightly, as a pipeline would: from both sides, or from the left alone."""

    def __init__(self, texts, sided=True):
        self.texts, self.sided = texts, sided

    class processor:
        class tokens:
            @staticmethod
            def encode(text):
                return (text.split(),)

    def infill(self, given, messages, generator, **decode):
        if not self.sided:
            raise ValueError("sees one side")
        found = []
        for text in given:
            before, behind = re.split(r"\[MASK:\d+\]", text)
            whole = next(t for t in self.texts if t.startswith(before) and t.endswith(behind))
            found.append(type("", (), {"text": whole, "num_forwards": 3}))
        return found

    def rank(self, prompt, texts, **options):
        return [type("", (), {"index": next(i for i, text in enumerate(texts) if stories.holds(text))})]

    def chat(self, prompts, generator, **decode):
        assert decode["temperature"] == 1.0
        return [type("", (), {"text": text, "num_forwards": 5}) for text in self.texts[: len(prompts)]]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return builtin.make("stories", tmp_path_factory.mktemp("told") / "stories", num=80, split="test", workers=1)


@pytest.mark.parametrize("kind", ["continuation", "infilling", "reversal", "recall", "reversal of facts"])
def test_an_oracle_is_always_right(told, kind):
    holes = read_holes(told, kind, 5)
    texts = [hole.before + hole.missing + hole.behind for hole in holes]
    oracle = Oracle(texts)
    answered = fill(oracle, holes, {}, 2)
    assert (answered.score, answered.forwards, answered.how) == (1.0, 3.0, "both sides")
    assert choose(oracle, holes, 4).score == 1.0
    assert draw_freely(oracle, "story", 2, 44, {}, 2)[0].score == 1.0
    wrong = [hole.before + hole.wrong[0] + hole.behind for hole in holes]
    assert fill(Oracle(wrong), holes, {}, 2).score == 0.0


def test_a_kind_of_hole_that_is_not_there_is_refused(told):
    with pytest.raises(ValueError, match="continuation, infilling"):
        read_holes(told, "middle", 1)


def test_a_bound_of_a_model_that_knows_nothing_is_the_log_of_its_vocabulary(done):
    """log V nats a token, whatever hides the text: exactly for the next token, over many draws for masks."""
    config, out, _ = done
    for name, tolerance in (("left to right", 1e-4), ("masks", 0.15)):
        job = next(job for job in jobs_of(config, out) if job.paradigm.name == name)
        pipeline = jobs.load(str(job.folder / "run" / "model"), device="cpu")
        with torch.no_grad():
            pipeline.model.backbone.lm_head.weight.zero_()
        data = str(job.made(job.study.held_out, "val") / "data.json")
        found = nats(pipeline, job.paradigm.objective, {}, data, 6, 60 if name == "masks" else 1, 3)
        size = pipeline.model.config.backbone["vocab_size"]
        assert abs(found["token"] / math.log(size) - 1) < tolerance, name
        assert found["text"] == pytest.approx(found["token"] * found["tokens"])


def test_means_over_seeds_have_students_interval():
    assert over_seeds([]) is None
    assert over_seeds([None, None]) is None
    assert over_seeds([0.5]) == {"mean": 0.5, "low": None, "high": None, "seeds": 1}
    found = over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] - 2.0 == pytest.approx(4.303 / math.sqrt(3))
    assert over_seeds([0.99, 1.0], share=True)["high"] == 1.0


# What is shown


def test_the_report_is_one_file_and_the_page_holds_its_tables(done, tmp_path):
    config, out, results = done
    report = write_report(results, config, out)
    text = report.read_text()
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="', text)
    assert text.count("<svg") == 3
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    for _ in range(2):
        write_into(page, out / SUMMARY)
    said = page.read_text()
    assert said.startswith("before\n")
    assert said.endswith("\nbehind\n")
    assert "\nold\n" not in said
    summary = json.loads((out / SUMMARY).read_text())
    assert markdown(summary, "page") in said
    assert all((tmp_path / name).is_file() for name in re.findall(r"\]\((.*?\.svg)\)", said))
    for table in re.findall(r"(?:^\|.*\|\n)+", said, re.M):
        assert len({row.count("|") for row in table.splitlines()}) == 1
    assert "| left to right | autoregressive |" in said
    (tmp_path / "other.md").write_text("nothing")
    with pytest.raises(ValueError, match="results: begin"):
        write_into(tmp_path / "other.md", out / SUMMARY)


def test_figures_of_the_page_are_those_of_the_results(done):
    _, _, results = done
    summary = summarise(results)["text"]["masks"]
    own = [r for r in results if r["paradigm"] == "masks"]
    assert summary["bound"]["text"]["mean"] == pytest.approx(sum(r["bound"]["text"] for r in own) / 2)
    assert summary["bound"]["least"] == stories.entropy()
    assert summary["seeds"] == [0, 1]
    for path, step in zip(summary["validation"], (1, 2, 3), strict=True):
        assert path["step"] == step
        assert path["mean"] == pytest.approx(sum(r["training"]["validation"][step - 1][1] for r in own) / 2)


def test_a_picture_of_lines_is_escaped_and_stands_alone():
    drawn = lines(
        [Line(label="<b>", points=[(1, 0.5, 0.4, 0.6), (44, 1.0, None, None)]), Line(label="none", points=[])],
        across="calls",
        up="%",
        log=True,
        least=0.1,
    )
    assert drawn.startswith("<svg xmlns=")
    assert drawn.endswith("</svg>")
    assert "&lt;b&gt;" in drawn
    assert "<b>" not in drawn
    assert drawn.count("<circle") == 2
    assert lines([], across="", up="") == ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_short_comparison_runs_to_its_end(tmp_path):
    """What `make compare ARGS=--short` does, for every paradigm on text."""
    assert main(["compare", str(SUITE), "--short", "--studies", "text", "repetition", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / SUMMARY).read_text())["studies"]
    assert len(summary["text"]) == len(read_comparison(SUITE).paradigms)
    assert (tmp_path / "report.html").is_file()
