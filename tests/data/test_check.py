"""Everything wrong with a data configuration is listed, with its file and record; the rest is counted."""

import json

import pytest
from PIL import Image

from dmllm.data.check import check
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource


def config(*paths, **options):
    return DataConfig(datasets=tuple(DataSource(json_path=str(path), **options) for path in paths))


@pytest.fixture
def faulty(tmp_path):
    """A file with one good record, one of text, and one of each fault."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    turns = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a red one", "kind": "colour"},
    ]
    rows = [
        {"image": "a.png", "conversations": turns},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"image": ["gone.png", "cut.png"], "conversations": [{"from": "human", "value": "<image><image>"}, turns[1]]},
        {"image": ["a.png", "a.png"], "conversations": turns},
        {"image": "a.png", "conversations": turns[:1]},
        {"image": "a.png", "conversations": [turns[0], {"from": "gpt", "value": "<|mask|>"}]},
    ]
    path = tmp_path / "faulty.json"
    path.write_text(json.dumps(rows))
    return path


def test_every_problem_is_listed_with_its_record(faulty):
    report = check(config(faulty))
    said = "\n".join(report.problems)
    for place, what in (
        ("record 2", "gone.png: there is no such file"),
        ("record 2", "cut.png: not a readable image"),
        ("record 3", "1 <image> markers for 2 images"),
        ("record 4", "no assistant turn"),
    ):
        assert any(f"faulty.json: {place}: " in p and what in p for p in report.problems), (place, what, said)
    assert len(report.problems) == 4
    (part,) = report.datasets
    assert (part.records, part.used, part.bad, part.text_only) == (6, 6, 3, 1)
    assert part.kinds == {"colour": 2}
    assert "no problems" not in report.lines()


def test_with_a_processor_rows_are_measured_and_tried(faulty, make_processor):
    report = check(config(faulty), make_processor(max_length=16))
    assert any("record 5: the text contains '<|mask|>'" in problem for problem in report.problems)
    (part,) = report.datasets
    assert part.cut == 1
    assert len(part.lengths["tokens of an example"]) == 2
    assert any("longer than max_length" in line for line in report.lines())


def test_sound_data_has_no_problems_and_a_picture_of_samples(llava_file, tmp_path):
    one, two = llava_file(5), llava_file(4, name="other.json")
    report = check(config(one, two, sampling_strategy="first:2"), samples=3, out=tmp_path / "out")
    assert report.problems == []
    assert "no problems" in report.lines()
    assert [part.used for part in report.datasets] == [2, 2]
    assert report.picture == tmp_path / "out" / "samples.png"
    with Image.open(report.picture) as picture:
        assert picture.width == 3 * 420
    named = check(config(one), samples=1, out=tmp_path / "x.png").picture
    assert named == tmp_path / "x.png"
    assert check(config(one)).picture is None
