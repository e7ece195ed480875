"""`stories`: what is missing follows from what is there, and nothing of test is in train."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from dmllm.data import builtin
from dmllm.data.builtin import stories


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base, found = tmp_path_factory.mktemp("stories"), {}
    for split in ("train", "val", "test"):
        folder = builtin.make("stories", base / split, num=1500, split=split, workers=1)
        truths = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
        found[split] = (json.loads((folder / "data.json").read_text()), truths)
        assert not (folder / "images").exists()
    return found


def test_every_text_holds_and_is_what_the_record_says(made):
    for records, truths in made.values():
        for record, truth in zip(records, truths, strict=True):
            asked, said = record["conversations"]
            assert record["id"] == truth["id"]
            assert "image" not in record
            assert asked["kind"] == truth["kind"]
            if truth["kind"] in ("story", "fact"):
                assert said["value"] == truth["text"]
                assert stories.holds(said["value"])
            else:
                subject = asked["value"].removesuffix("?").split()
                name, town = (subject[2], said["value"]) if truth["kind"] == "where" else (said["value"], subject[-1])
                assert stories.HOMES[name] == town


def test_a_hole_has_one_filling_that_holds_but_for_the_wording_of_the_row(made):
    """Every word of a hole by every other word of its kind: only what stood there holds."""
    kinds = [stories.NAMES, stories.PLACES, stories.THINGS, tuple(map(str, range(1, 11)))]
    for truth in made["test"][1][:60]:
        for name, hole in truth.get("holes", {}).items():
            words = re.findall(r"\w+|[^\w\s]|\s", hole["missing"])
            assert hole["before"] + hole["missing"] + hole["behind"] == truth["text"]
            for place, word in enumerate(words):
                for other in next((kind for kind in kinds if word in kind), ()):
                    filling = "".join([*words[:place], other, *words[place + 1 :]])
                    assert stories.holds(hole["before"] + filling + hole["behind"]) == (other == word), (name, filling)


def test_wrong_fillings_are_as_long_and_do_not_hold(made):
    for truth in made["test"][1]:
        for hole in truth.get("holes", {}).values():
            assert len({hole["missing"], *hole["wrong"]}) == 1 + stories.WRONG
            for wrong in hole["wrong"]:
                assert len(wrong.split()) == len(hole["missing"].split())
                assert not stories.holds(hole["before"] + wrong + hole["behind"])


def test_the_beginning_of_a_story_may_be_worded_in_four_ways(made):
    truth = next(truth for truth in made["test"][1] if truth["kind"] == "story")
    hole, found = truth["holes"]["reversal"], set()
    a, b, c = re.search(r"the row is (\w+), (\w+), (\w+)\.", hole["behind"]).groups()
    end = hole["missing"].partition(". ")[2].partition(". ")[2]
    for first in (f"{a} is left of {b}", f"{b} is right of {a}"):
        for second in (f"{b} is left of {c}", f"{c} is right of {b}"):
            filling = f"today {first}. {second}. {end}"
            assert stories.holds(hole["before"] + filling + hole["behind"])
            found.add(filling)
    assert hole["missing"] in found
    assert not stories.holds(hole["behind"])


def test_splits_share_no_story_no_fact_and_no_question(made):
    texts = {split: {turn["conversations"][1]["value"] for turn in records} for split, (records, _) in made.items()}
    long = {split: {text for text in own if text.startswith("today")} for split, own in texts.items()}
    asked = {
        split: {r["conversations"][0]["value"] for r in records if r["conversations"][0]["kind"] in ("who", "where")}
        for split, (records, _) in made.items()
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not long[one] & long[other]
        assert not asked[one] & asked[other]
    # ... but everyone's town is told in train
    told = {truth["text"].split()[1] for truth in made["train"][1] if truth["kind"] == "fact"}
    assert told == set(stories.NAMES)


def test_a_story_is_as_probable_as_every_other():
    """Every field is drawn evenly, and `num_stories` counts their combinations."""
    rng = np.random.default_rng(0)
    assert stories.entropy() == math.log(stories.num_stories())
    assert stories.num_stories() == 24 * 23 * 22 * 3 * 4 * 12 * 12 * 25
    drawn = [stories.draw_story(rng) for _ in range(4000)]
    for field, size in (("hero", 24), ("place", 12), ("thing", 12), ("brings", 5), ("finds", 5), ("wording", 4)):
        counts = Counter(getattr(story, field) for story in drawn)
        assert len(counts) == size
        expected = len(drawn) / size
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < size + 6 * math.sqrt(2 * size), field
    assert Counter(story.row.index(story.hero) for story in drawn).keys() == {0, 1, 2}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "today",
        "today anna lives in salem and paints 3 red pears.",
        "today anna is left of ben. cleo is right of ben. ben goes to the farm with 3 pears and finds 4 more. "
        "at the farm ben has 8 pears. the row is anna, ben, cleo.",
        "today anna is left of ben. cleo is left of ben. ben goes to the farm with 3 pears and finds 4 more. "
        "at the farm ben has 7 pears. the row is anna, ben, cleo.",
        "today anna is left of ben. cleo is right of ben. ben goes to the farm with 3 pears and finds 4 more. "
        "at the lake ben has 7 pears. the row is anna, ben, cleo.",
        "today anna is left of ben. ben is right of anna. ben goes to the farm with 3 pears and finds 4 more. "
        "at the farm ben has 7 pears. the row is anna, ben, anna.",
    ],
)
def test_what_does_not_hold_is_refused(text):
    assert not stories.holds(text)


def test_kinds_may_be_chosen_and_unknown_ones_are_refused(tmp_path):
    folder = builtin.make("stories", tmp_path / "facts", num=30, kinds=("fact",), workers=1)
    assert {json.loads(line)["kind"] for line in (folder / "truth.jsonl").read_text().splitlines()} == {"fact"}
    with pytest.raises(ValueError, match="story, fact, where, who"):
        builtin.make("stories", tmp_path / "poems", num=1, kinds=("poem",))


def test_nothing_is_said_of_guessing_where_there_is_nothing_to_look_at():
    assert builtin.chance("stories") == {}
