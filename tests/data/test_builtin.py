"""The built-in data sets: reproducible, disjoint, true to their pictures, and not to be guessed."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmllm.data import builtin
from dmllm.data.builtin import reading, scenes, writing

pytest.importorskip("sklearn")

COLOR = "red|green|blue|yellow|purple|orange|cyan|white"
SHAPE = "circle|square|triangle|diamond|star|cross"
PHRASE = re.compile(
    rf"(leftmost |rightmost |highest |lowest )?(?:(small|large) )?(?:({COLOR}) )?({SHAPE}|object)(?:e?s)?\b"
)
PICTURES = 2000
PICTURED = ("scenes", "digits")  # what `stories` is: test_stories.py


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(folder: Path) -> tuple[list[dict], list[dict]]:
    truths = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
    return json.loads((folder / "data.json").read_text()), truths


def turns_of(record: dict) -> list[tuple[str, str, str]]:
    turns = record["conversations"]
    return [
        (human["kind"], human["value"], model["value"]) for human, model in zip(turns[::2], turns[1::2], strict=True)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("builtin")
    options = {"scenes": {"large_print": 0.3}, "digits": {}}
    return {name: builtin.make(name, base / name, num=PICTURES, workers=2, **options[name]) for name in PICTURED}


@pytest.fixture(scope="module")
def made(folders) -> dict[str, tuple[list[dict], list[dict]]]:
    return {name: read(folder) for name, folder in folders.items()}


# An oracle that knows only the question's words and truth.jsonl


def matching(phrase: re.Match, objects: list[dict]) -> list[dict]:
    outermost, size, color, shape = phrase.groups()
    if outermost:
        axis, end = {"left": (0, 0), "righ": (0, -1), "high": (1, 0), "lowe": (1, -1)}[outermost[:4]]
        return [sorted(objects, key=lambda thing: thing["center"][axis])[end]]
    return [
        thing
        for thing in objects
        if size in (None, thing["size"]) and color in (None, thing["color"]) and shape in ("object", thing["shape"])
    ]


def oracle_scenes(kind: str, question: str, truth: dict) -> str:
    if truth["picture"] == "reading":
        return " ".join(truth["lines"])
    if truth["picture"] == "large print":
        return oracle_rows(kind, question, [[placed["character"] for placed in row] for row in truth["rows"]])
    objects, question = truth["objects"], question.lower()
    if kind == "caption":
        ordered = sorted(objects, key=lambda thing: thing["center"][0])
        return re.sub(
            ", (?=[^,]*$)", " and ", ", ".join("a {size} {color} {shape}".format(**thing) for thing in ordered)
        )
    found = [matching(phrase, objects) for phrase in PHRASE.finditer(question)]
    if kind == "count":
        return str(len(found[0]))
    if kind == "exist":
        return "yes" if found[0] else "no"
    if kind == "compare" and ("more" in question or "fewer" in question):
        first, second = map(len, found)
        return "yes" if (first > second if "more" in question else first < second) else "no"
    assert all(len(one) == 1 for one in found), f"ambiguous: {question} {objects}"
    if kind in ("color", "shape", "size"):
        return found[0][0][kind]
    if kind == "position":
        cells = [int(place // (64 / 3)) for place in found[0][0]["center"]]
        name = f"{['top', '', 'bottom'][cells[1]]} {['left', '', 'right'][cells[0]]}".strip()
        return name or "center"
    (first,), (second,) = found
    if kind == "compare":
        wide, narrow = (thing["box"][2] - thing["box"][0] for thing in (first, second))
        assert abs(wide - narrow) >= 5
        return "yes" if (wide > narrow) == ("larger" in question) else "no"
    axis = 0 if "left of" in question or "right of" in question else 1
    away = second["center"][axis] - first["center"][axis]
    assert abs(away) >= 5
    return "yes" if (away > 0) == ("left of" in question or "above" in question) else "no"


def oracle_digits(kind: str, question: str, truth: dict) -> str:
    return oracle_rows(kind, question, [[str(scan["digit"]) for scan in row] for row in truth["rows"]])


def oracle_rows(kind: str, question: str, rows: list[list[str]]) -> str:
    everything = [character for row in rows for character in row]
    if kind == "read":
        return " ".join("".join(row) for row in rows)
    if kind == "count":
        return str(len(everything))
    if kind == "sum":
        chosen = rows[0] if "top row" in question else rows[1] if "bottom row" in question else everything
        return "+".join(chosen) + f"={sum(map(int, chosen))}"
    asked = re.findall(r"\b[A-Z0-9]\b", question)[-1]
    if kind == "exist":
        return "yes" if asked in everything else "no"
    assert everything.count(asked) == 1
    row = next(row for row, characters in enumerate(rows) if asked in characters)
    column = rows[row].index(asked)
    word = re.search("left|right|above|below", question).group()
    down, across = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[word]
    assert row + down >= 0
    assert column + across >= 0
    return rows[row + down][column + across]


ORACLES = {"scenes": oracle_scenes, "digits": oracle_digits}


@pytest.mark.parametrize("name", PICTURED)
def test_every_answer_follows_from_the_truth(made, name):
    checked = Counter()
    for record, truth in zip(*made[name], strict=True):
        assert record["id"] == truth["id"]
        for kind, question, answer in turns_of(record):
            assert ORACLES[name](kind, question, truth) == answer, (question, truth)
            checked[kind] += 1
    assert min(checked.values()) > 300


# Bytes


@pytest.mark.parametrize("name", builtin.NAMES)
def test_the_same_arguments_give_the_same_bytes_whatever_the_workers(tmp_path, name):
    one = builtin.make(name, tmp_path / "one", num=110, split="val", seed=3, workers=1)
    two = builtin.make(name, tmp_path / "two", num=110, split="val", seed=3, workers=2)
    other = builtin.make(name, tmp_path / "other", num=110, split="val", seed=4, workers=1)
    assert contents(one) == contents(two)
    assert len(contents(one)) == (110 if name in PICTURED else 0) + 3
    assert contents(one)["data.json"] != contents(other)["data.json"]


def test_a_shorter_data_set_is_the_beginning_of_a_longer_one(made, tmp_path):
    short, _ = read(builtin.make("scenes", tmp_path / "short", num=5, large_print=0.3))
    assert short == made["scenes"][0][:5]


@pytest.mark.parametrize("name", PICTURED)
def test_records_are_llava_records_with_one_image_marker(folders, made, name):
    records, _ = made[name]
    for record in records:
        values = [turn["value"] for turn in record["conversations"]]
        assert values[0].startswith("<image>\n")
        assert sum(value.count("<image>") for value in values) == 1
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(values) // 2)
    assert records[1234]["image"] == "images/001/001234.png"
    with Image.open(folders[name] / records[1234]["image"]) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_other_sizes_and_options(tmp_path):
    records, truths = read(
        builtin.make("scenes", tmp_path / "large", num=40, size=128, split="test", turns=1, reading=0.0)
    )
    assert all(len(record["conversations"]) == 2 for record in records)
    assert max(thing["box"][2] for truth in truths for thing in truth["objects"]) > 100
    with Image.open(tmp_path / "large" / records[0]["image"]) as image:
        assert image.size == (128, 128)


def test_each_sort_of_picture_has_its_share(made):
    sorts = Counter(truth["picture"] for truth in made["scenes"][1])
    assert abs(sorts["reading"] / PICTURES - 0.18) < 0.03
    assert abs(sorts["large print"] / PICTURES - 0.3) < 0.04
    for record, truth in zip(*made["scenes"], strict=True):
        if truth["picture"] == "reading":
            assert [kind for kind, _, _ in turns_of(record)] == ["reading"]


def test_ten_turns_ask_on_average_two_questions_of_every_kind_no_two_alike(tmp_path):
    records, truths = read(builtin.make("digits", tmp_path / "ten", num=PICTURES, turns=10, workers=2))
    asked, answers = Counter(), Counter()
    for record, truth in zip(records, truths, strict=True):
        kinds, topics = Counter(), defaultdict(set)
        for kind, question, answer in turns_of(record):
            assert oracle_digits(kind, question, truth) == answer
            kinds[kind] += 1
            topics[kind].add(str(re.findall(r"\d|left|right|above|below|top row|bottom row", question)))
            answers[answer] += 1
        texts = [question.removeprefix("<image>\n").lower().rstrip(".?") for _, question, _ in turns_of(record)]
        assert len(set(texts)) == len(texts)
        asked += kinds
        if min(len(row) for row in truth["rows"]) == 3:  # enough digits to ask of
            assert kinds["exist"] == len(topics["exist"]), texts
        if sorted(len(row) for row in truth["rows"]) == [1, 2]:
            assert min(kinds["sum"], 2) == len(topics["sum"]), texts
    assert all(abs(number / PICTURES - 2) < 0.15 for number in asked.values()), asked
    assert 0.47 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.53


def test_a_sum_has_two_or_three_digits(made):
    for record, truth in zip(*made["digits"], strict=True):
        lengths = [len(row) for row in truth["rows"]]
        for kind, question, _ in turns_of(record):
            if kind == "sum":
                place = re.search("top|bottom", question)
                assert ({"top": lengths[0], "bottom": lengths[-1]}[place.group()] if place else sum(lengths)) in (2, 3)


# Pictures


def test_objects_do_not_overlap_and_have_an_order_from_left_to_right(made):
    for truth in made["scenes"][1]:
        objects = truth.get("objects", [])
        for index, one in enumerate(objects):
            assert min(one["box"]) >= 0
            assert max(one["box"]) <= 64
            for other in objects[index + 1 :]:
                (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one["box"], other["box"]
                assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
                assert other["center"][0] - one["center"][0] >= 5


@pytest.mark.parametrize("name", PICTURED)
def test_characters_in_rows_do_not_overlap(made, name):
    for truth in made[name][1]:
        covered = np.zeros((64, 64), dtype=int)
        for left, top, right, bottom in (placed["box"] for row in truth.get("rows", []) for placed in row):
            assert min(left, top) >= 0
            assert max(right, bottom) <= 64
            covered[top:bottom, left:right] += 1
        assert covered.max() == ("rows" in truth)


def test_characters_are_painted_in_the_cells_of_the_truth():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lines = reading.place(rng, reading.draw_texts(rng))
        ink = reading.paint(rng, lines, np.zeros((64, 64, 3), np.float32), np.full(3, 220, np.float32)).max(2)
        painted = ink.reshape(reading.ROWS, 16, reading.COLUMNS, 8).max((1, 3)) > 60
        cells = {(line.row, line.column + place) for line in lines for place in range(len(line.text))}
        assert set(zip(*np.nonzero(painted), strict=True)) == cells


def test_pixels_show_the_colours_of_the_truth(folders, made):
    inks = np.array(list(scenes.INKS.values()))
    for record, truth in list(zip(*made["scenes"], strict=True))[:200]:
        with Image.open(folders["scenes"] / record["image"]) as image:
            pixels = np.asarray(image, dtype=int)
        for thing in truth.get("objects", []):
            x, y = (int(place) for place in thing["center"])
            nearest = np.abs(inks - pixels[y, x]).sum(1).argmin()
            assert list(scenes.INKS)[nearest] == thing["color"]


# Splits


def test_splits_of_scenes_share_no_scene_and_no_text(tmp_path):
    seen = defaultdict(set)
    for split in ("train", "val", "test"):
        _, truths = read(
            builtin.make("scenes", tmp_path / split, num=250, split=split, reading=0.3, large_print=0.4, workers=1)
        )
        for truth in truths:
            looks = [
                (t["shape"], t["color"], t["size"], *(c // 4 for c in t["center"])) for t in truth.get("objects", [])
            ]
            places = [[(p["character"], *(c // 4 for c in p["box"][:2])) for p in r] for r in truth.get("rows", [])]
            seen[split].add(str(truth.get("lines") or places or sorted(looks)))
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


def test_splits_of_digits_share_no_scan(made, tmp_path):
    used = {"train": made["digits"][1]}
    for split in ("val", "test"):
        used[split] = read(builtin.make("digits", tmp_path / split, num=300, split=split, workers=1))[1]
    scans = {
        split: {scan["scan"] for truth in truths for row in truth["rows"] for scan in row}
        for split, truths in used.items()
    }
    assert len(scans["train"]) > 1300
    assert not scans["train"] & scans["val"]
    assert not scans["train"] & scans["test"]
    assert not scans["val"] & scans["test"]


# Balance

CHANCE = {
    "scenes": {"color": 1 / 8, "shape": 1 / 6, "size": 1 / 2, "count": 0.225, "exist": 1 / 2, "relation": 1 / 2}
    | {"compare": 1 / 2, "position": 1 / 9, "caption": 0.01, "neighbor": 1 / 10, "reading": 0.0}
    | {"sum": 0.02, "read": 0.04},
    "digits": {"neighbor": 1 / 10, "count": 1 / 6, "exist": 1 / 2, "sum": 0.075, "read": 0.04},
}


@pytest.mark.parametrize("name", PICTURED)
def test_answers_are_balanced(made, name):
    answers, asked = defaultdict(Counter), defaultdict(Counter)
    for record, truth in zip(*made[name], strict=True):
        for kind, _, answer in turns_of(record):
            answers[kind][answer] += 1
            asked[truth["picture"]][kind] += kind != "reading"
    for kind, counts in answers.items():
        if set(counts) in ({"yes", "no"}, {"small", "large"}):
            assert 0.47 < max(counts.values()) / counts.total() < 0.53, kind
    # letters have no sum, and a text is only read
    for counts in (asked[sort] for sort in ("objects", "digits") if sort in asked):
        numbers = (+counts).values()
        assert max(numbers) < 1.1 * min(numbers), counts


@pytest.mark.parametrize("name", PICTURED)
def test_the_wording_of_a_question_does_not_give_its_answer_away(made, name):
    baseline = builtin.majority_baseline(made[name][0])
    assert set(baseline) == set(CHANCE[name])
    for kind, accuracy in baseline.items():
        assert accuracy < CHANCE[name][kind] + 0.04, kind
    chance = builtin.chance(name)
    assert all(abs(chance[kind] - baseline[kind]) < 0.05 for kind in chance)


def test_the_baseline_finds_answers_that_a_template_gives_away():
    def record(color, answer):
        question = {"from": "human", "value": f"<image>\nIs there a {color} star?", "kind": "exist"}
        return {"conversations": [question, {"from": "gpt", "value": answer}]}

    records = [
        record(color, answer) for color, answer in (("red", "yes"), ("blue", "yes"), ("cyan", "yes"), ("red", "no"))
    ]
    assert builtin.majority_baseline(records) == {"exist": 0.75}


# Refusals


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("scene", {}, "known are: scenes, digits, stories"),
        ("scenes", {"split": "dev"}, "train, val, test"),
        ("scenes", {"num": 0}, "num=1000"),
        ("scenes", {"seed": -1}, "0, 1, 2"),
        ("scenes", {"size": 50}, "size=64"),
        ("scenes", {"turn": 3}, "its options are: turns, reading"),
        ("scenes", {"turns": 0}, "turns=8"),
        ("scenes", {"reading": 18}, "reading=0.18"),
        ("digits", {"reading": 0.1}, "its options are: turns"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_type(tmp_path, name, arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        builtin.make(name, tmp_path / "out", **({"num": 1} | arguments))
    assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_kept_and_others_are_refused(tmp_path):
    out = builtin.make("scenes", tmp_path / "out", num=3)
    before = (out / "data.json").stat().st_mtime_ns
    assert builtin.make("scenes", out, num=3) == out
    assert (out / "data.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="num=3, not 4"):
        builtin.make("scenes", out, num=4)
    (tmp_path / "mine").mkdir()
    builtin.make("scenes", tmp_path / "mine", num=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="name a new or an empty folder"):
        builtin.make("scenes", tmp_path / "full", num=1)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(pixels):
        raise OSError("no space left")

    monkeypatch.setattr(writing, "png", fail)
    with pytest.raises(OSError, match="no space left"):
        builtin.make("scenes", tmp_path / "out", num=3)
    assert not list(tmp_path.iterdir())


def test_descriptions_name_the_kinds():
    assert "caption" in builtin.describe("scenes")
    assert all("neighbor" in builtin.describe(name) for name in PICTURED)
    assert "fact" in builtin.describe("stories")
