"""Answers of another length than their text's: padded or cut at random, so that no canvas is a surprise."""

from __future__ import annotations

from collections import Counter

import torch

from dmllm.types import IGNORE

EOS = 1
LONG = "a red square, a blue circle, a green star"  # more than 16 tokens


def answers(processor, one, number=600):
    examples = [processor.example(one, generator=torch.Generator().manual_seed(seed)) for seed in range(number)]
    return [example.labels[example.labels != IGNORE].tolist() for example in examples]


def test_an_answer_gets_as_many_further_ends_as_it_has_tokens_at_most_evenly(make_processor, record):
    one = record(("user", "q"), ("assistant", "red"))
    plain = answers(make_processor(), one, 1)[0]
    found = answers(make_processor(further_ends=0.5), one)
    further = Counter(len(answer) - len(plain) for answer in found)
    assert all(answer == plain + [EOS] * (len(answer) - len(plain)) for answer in found)
    assert sorted(further) == list(range(len(plain) + 1))
    for number, times in further.items():
        share = 0.5 if number == 0 else 0.5 / len(plain)
        assert abs(times / len(found) - share) < 4 * (share * (1 - share) / len(found)) ** 0.5


def test_of_a_long_answer_a_beginning_without_an_end_is_learned_and_a_short_one_stays_whole(make_processor, record):
    processor = make_processor(cut_answers=0.5)
    short = record(("user", "q"), ("assistant", "red"))
    assert len({tuple(answer) for answer in answers(processor, short, 100)}) == 1
    one = record(("user", "q"), ("assistant", LONG))
    plain = answers(make_processor(), one, 1)[0]
    found = answers(processor, one)
    assert all(answer == plain[: len(answer)] for answer in found)
    cut = [answer for answer in found if len(answer) < len(plain)]
    assert not any(EOS in answer for answer in cut)
    assert abs(len(cut) / len(found) - 0.5) < 4 * (0.25 / len(found)) ** 0.5
    assert {len(answer) for answer in cut} <= set(range(1, len(plain)))
    assert abs(sum(map(len, cut)) / len(cut) - len(plain) / 2) < 2


def test_one_of_both_happens_and_further_ends_may_be_left_unscored(make_processor, record):
    one = record(("user", "q"), ("assistant", LONG))
    plain = answers(make_processor(), one, 1)[0]
    sizes = [len(answer) for answer in answers(make_processor(further_ends=0.5, cut_answers=0.5), one, 200)]
    assert len(plain) not in sizes
    assert min(sizes) < len(plain) < max(sizes)
    example = make_processor(further_ends=1.0, score_padding=False).example(one, generator=torch.Generator())
    assert int((example.labels == EOS).sum()) == 1
    assert int((example.input_ids == EOS).sum()) > 1
