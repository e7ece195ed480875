"""Truths of canvases in parts: with exact conditionals one token a call draws the data, whatever parts and order."""

from dataclasses import replace

import pytest
import torch
from torch import Generator

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.samplers.maskgit import halton
from dmllm.samplers.modalities import Part, process
from tests.exact import Joint, assert_drawn_from, generators, total_variation

FIRST = 5  # the id of the toy's first word in the vocabulary of the whole canvas
MASK = 0
JOINT = Joint(3, 4, seed=3)
ORDERS = {
    "halton": ({"remasking": "sequential"}, torch.tensor(halton(2, 2))),
    "random": ({"remasking": "random"}, None),
    "entropy": ({"remasking": "entropy"}, None),
}


def within(canvas, asked):
    """The toy's conditionals at the places asked for, which lie behind one given token; other ids are no words."""
    inner = replace(canvas, ids=canvas.ids[:, 1:] - FIRST, committed=canvas.committed[:, 1:])
    assert all(words == (FIRST, FIRST + 3) for _, words in asked)
    return tuple(JOINT.predict(inner, rows - 1)[..., :3] for rows, _ in asked)


def drawn(parts, rows=4000, draws=None):
    ids = torch.full((rows, 5), MASK)
    ids[:, 0] = 1
    canvas = Canvas.of(ids, ids != MASK, MASK)
    draws = generators(*range(rows)) if draws is None else draws
    *_, last = denoise(within, canvas, parts[0].config, draws, process=process(parts))
    assert bool((last.ids[:, 0] == 1).all())
    return last.ids[:, 1:] - FIRST, int(last.num_forwards.max())


def part(*slots, order=None, **options):
    settings = {"max_new_tokens": len(slots), "temperature": 1.0, "eos_token_id": [], **options}
    return Part(slots=torch.tensor(slots), words=(FIRST, FIRST + 3), config=DecodeConfig(**settings), order=order)


@pytest.mark.parametrize("name", ORDERS)
def test_one_code_a_call_draws_the_data(name):
    options, order = ORDERS[name]
    found, calls = drawn([part(1, 2, 3, 4, order=order, **options)])
    assert calls == 4
    assert_drawn_from(JOINT, found)


@pytest.mark.parametrize("sampling", ["multinomial", "gumbel"])
def test_the_authors_random_numbers_draw_from_the_same_distribution(sampling):
    options = {"sampling": sampling, "order_temperature": 1e6, "schedule": "maskgit", "noise_schedule": "linear"}
    shared = [Generator().manual_seed(0)] * 4000 if sampling == "multinomial" else None
    found, calls = drawn([part(1, 2, 3, 4, steps=4, **options)], draws=shared)
    assert calls == 4
    assert_drawn_from(JOINT, found)  # the noise is so large that the order is random


def test_two_parts_in_turn_draw_the_data_and_in_the_same_calls_they_do_not_hear_of_each_other():
    parts = [part(1, 2, remasking="random"), part(3, 4, remasking="random")]
    together, calls = drawn(parts)
    assert calls == 2
    assert total_variation(JOINT.counts(together) / len(together), JOINT.probs) > 0.05
    ids = torch.full((4000, 5), MASK)
    ids[:, 0] = 1
    draws = generators(*range(4000))
    for own in parts:
        canvas = Canvas.of(ids, ids != MASK, MASK)
        *_, last = denoise(within, canvas, own.config, draws, process=process([own]))
        ids = last.ids
    assert_drawn_from(JOINT, ids[:, 1:] - FIRST)


def test_what_may_not_stand_in_a_place_never_does():
    allowed = torch.tensor([[True, True, False], [False, True, True], [True] * 3, [True] * 3])
    own = replace(part(1, 2, 3, 4, remasking="random"), allowed=allowed)
    found, _ = drawn([own], rows=200)
    assert not bool((found[:, 0] == 2).any() | (found[:, 1] == 0).any())


@pytest.mark.parametrize("schedule", ["maskgit", "maskgit_fixed"])
def test_as_many_stay_open_as_the_schedule_says_of_what_was_open_or_of_all(schedule):
    known = torch.arange(12)[None] < 2
    canvas = Canvas.of(torch.full((1, 12), 3), known, MASK)
    options = {"schedule": schedule, "noise_schedule": "cosine", "order_temperature": 1.0}
    own = replace(part(*range(12), steps=4, **options), words=(3, 6))
    uniform = lambda canvas, asked: tuple(torch.zeros(*rows.shape, 3) for rows, _ in asked)
    steps = denoise(uniform, canvas, own.config, generators(0), process=process([own]))
    left = [int((~step.committed).sum()) for step in steps]
    shares = [0.9238, 0.7071, 0.3826]  # cos(pi r / 2) at r = 1/4, 1/2, 3/4
    of = 10 if schedule == "maskgit" else 12
    assert left == [*(min(int(of * share), 9) for share in shares), 0]
