"""Metrics against values worked out by hand from the published definitions."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dmllm.evaluation.metrics import METRICS, Metric
from dmllm.evaluation.metrics.caption import caption_scores, tokenise
from dmllm.evaluation.metrics.interval import interval, wilson
from dmllm.evaluation.metrics.text import anls, char_accuracy, edit_distance, exact_match, relaxed_accuracy
from dmllm.evaluation.metrics.vqa import CONTRACTIONS, normalise_vqa, vqa_accuracy
from dmllm.evaluation.metrics.yes_no import parse_yes_no, pope


def test_every_metric_in_the_table_scores_one_answer_or_a_corpus():
    for name in METRICS:
        metric = METRICS.load(name)
        assert isinstance(metric, Metric)
        assert metric.name == name
        assert metric.each or metric.corpus


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("Red.", "red", 1),
        ("  two\n dogs ", "Two dogs", 1),
        ("red", "dark red", 0),
        ("3.5", "3.5", 1),
        ("", ".", 1),
        ("a red", "red", 0),
    ],
)
def test_exact_match_forgives_case_white_space_and_one_final_full_stop(answer, truth, score):
    assert exact_match(answer, [truth]) == score


def test_exact_match_takes_any_of_the_truths():
    assert exact_match("grey", ["gray", "grey"]) == 1


def test_the_edit_distance_is_that_of_the_textbook():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("flaw", "lawn") == 2


def test_the_edit_distance_is_a_metric():
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc", k=draw.randint(0, 6))) for _ in range(12)]
    for a, b, c in itertools.product(texts, repeat=3):
        assert edit_distance(a, b) == edit_distance(b, a)
        assert (edit_distance(a, b) == 0) == (a == b)
        assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_character_accuracy_counts_case_and_divides_by_the_longer_string():
    assert char_accuracy("AB12", ["AB12"]) == 1
    assert char_accuracy("AB1", ["AB12"]) == pytest.approx(3 / 4)
    assert char_accuracy("ab12", ["AB12"]) == pytest.approx(1 / 2)
    assert char_accuracy("AB12AB12", ["AB12"]) == pytest.approx(1 / 2)
    assert char_accuracy("AB\n12", ["AB 12"]) == 1
    assert char_accuracy("", [""]) == 1
    assert char_accuracy("", ["AB12"]) == 0


def test_anls_is_the_similarity_and_zero_from_half_the_characters_wrong():
    assert anls("Paris", ["paris"]) == 1
    assert anls("pariz", ["paris"]) == pytest.approx(4 / 5)
    assert anls("pa", ["pari"]) == 0  # a distance of exactly 0.5
    assert anls("pazz", ["paris"]) == 0
    assert anls("2019", ["in 2019", "2018"]) == pytest.approx(3 / 4)  # the nearest truth counts


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-104", "-100", 1),
        ("52%", "0.5", 1),
        ("52", "0.5", 0),
        ("0", "0.0", 1),
        ("0.01", "0", 0),
        ("nan", "nan", 1),
        ("Blue", "blue", 1),
        ("about 100", "100", 0),
    ],
)
def test_relaxed_accuracy_forgives_five_percent_of_a_number_and_case_otherwise(answer, truth, score):
    assert relaxed_accuracy(answer, [truth]) == score


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Red  Car.", "red car"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("yes, it is!", "yes it is"),
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("U.S.", "us"),
        ("what's\nthat?", "what's that"),
        ("a/an", ""),
    ],
)
def test_vqa_normalisation_follows_the_published_tool(text, normalised):
    assert normalise_vqa(text) == normalised


def test_each_contraction_lacks_just_one_apostrophe_but_for_the_tools_own_slip():
    for wrong, right in CONTRACTIONS.items():
        assert len(wrong) == len(right) - 1 or (wrong, right) == ("somebody'd", "somebodyd")


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_averages_over_leaving_each_person_out(agreeing, score):
    # With 2 of 10 agreeing: those 2 see 1 other (1/3), the other 8 see 2 (2/3): (2/3 + 16/3) / 10 = 0.6.
    assert vqa_accuracy("Red.", ["red"] * agreeing + ["blue"] * (10 - agreeing)) == pytest.approx(score)


def test_vqa_accuracy_with_one_truth_asks_for_it_and_refuses_two():
    assert vqa_accuracy("the cat", ["cat"]) == 1
    with pytest.raises(ValueError, match="exact_match"):
        vqa_accuracy("cat", ["cat", "dog"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("No, there is none", "no"),
        ("There is not a dog", "no"),
        ("There isn't one", "no"),
        ("It doesn\u2019t", "no"),
        ("Yes. No.", "yes"),
        ("I know", "unclear"),
        ("", "unclear"),
        ("A dog", "unclear"),
    ],
)
def test_yes_and_no_are_read_from_the_first_sentence(answer, said):
    assert parse_yes_no(answer) == said


def test_pope_counts_yes_as_positive():
    # tp 2 (one of them unclear), fp 1, fn 1, tn 1
    answers = ["yes", "A dog.", "Yes, there is", "no", "not at all"]
    corpus = pope(answers, [["yes"], ["yes"], ["no"], ["yes"], ["No"]])
    assert corpus.scores == [1, 1, 0, 0, 1]
    assert corpus.details["precision"] == pytest.approx(2 / 3)
    assert corpus.details["recall"] == pytest.approx(2 / 3)
    assert corpus.details["f1"] == pytest.approx(2 / 3)
    assert corpus.details["yes_ratio"] == pytest.approx(3 / 5)
    assert corpus.details["unclear_ratio"] == pytest.approx(1 / 5)


def test_pope_leaves_undefined_figures_empty_and_refuses_other_truths():
    details = pope(["no"], [["no"]]).details
    assert details["precision"] is details["recall"] is details["f1"] is None
    with pytest.raises(ValueError, match="yes or no"):
        pope(["yes"], [["a dog"]])


def test_caption_scores_are_those_worked_out_by_hand_and_name_their_tokeniser():
    pytest.importorskip("pycocoevalcap")
    same = ["a red circle above a star", "two small dogs that run fast"]
    perfect = caption_scores(same, [[text] for text in same], tokeniser="regex")
    # Equal captions without a common word but "a": every cosine is 1, so CIDEr is 10.
    assert perfect.scores == pytest.approx([10, 10])
    assert perfect.details["bleu_4"] == pytest.approx(1)
    assert perfect.details["rouge_l"] == pytest.approx(1)
    assert perfect.details["tokeniser"] == "regex"
    # One caption of 3 words, 2 in the reference of 4: BLEU-1 is 2/3 with brevity penalty exp(1 - 4/3); the longest
    # common subsequence is 2, so P = 2/3, R = 1/2, and ROUGE-L with beta = 1.2 is 2.44 PR / (R + 1.44 P).
    other = caption_scores(["a red square"], [["a red circle there"]], tokeniser="regex").details
    assert other["bleu_1"] == pytest.approx(2 / 3 * math.exp(-1 / 3))
    assert other["rouge_l"] == pytest.approx(2.44 * (1 / 3) / (0.5 + 1.44 * 2 / 3))


def test_the_regex_tokeniser_keeps_words_and_digits():
    assert tokenise("A man's hat, size-7!") == "a man's hat size 7"


def test_wilsons_interval_is_that_of_the_textbook():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_questions_that_share_a_picture_widen_the_interval():
    scores = [float(i % 2) for i in range(40) for _ in range(5)]
    alone = interval(scores)
    shared = interval(scores, [i for i in range(40) for _ in range(5)])
    assert alone[2] == "wilson"
    assert shared[2] == "bootstrap"
    assert shared[1] - shared[0] > 1.5 * (alone[1] - alone[0])


def test_an_interval_is_the_same_every_time_and_has_width():
    scores = [random.Random(0).random() for _ in range(50)]
    assert interval(scores) == interval(scores)
    low, high, method = interval([1.0] * 20, list(range(10)) * 2)
    assert (low, high) == wilson(10, 10)
    assert method == "wilson"
    low, high, _ = interval([0.0, 1.0] * 10, ["one picture"] * 20)
    assert low < 0.5 < high
    with pytest.raises(ValueError, match="at least one"):
        interval([])
