"""The benchmark counts products as one would by hand, and reports every quantity of a random tiny model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dmllm.checkpoints import folder
from dmllm.evaluation import bench, products, rounds
from dmllm.types import IGNORE
from tests.test_pipeline import make

CONFIG = bench.BenchConfig(seconds=0, rounds=2, pictures=4, batch_size=2, questions=2, cube=16)
DECODE = {"max_new_tokens": 4}


@pytest.fixture(params=["prefix", "full"])
def visibility(request):
    return request.param


@pytest.fixture
def checkpoint(visibility, tmp_path):
    pipeline = make(visibility, image_prefix=visibility == "prefix")
    return str(folder.save(tmp_path / "model", pipeline.model, pipeline.processor, generation=DECODE))


def test_linear_layers_and_attention_are_counted_forward_and_backward():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 8), (6, 8), (6,)))
    flops, seen = products.count(lambda: F.linear(x, weight, bias).sum().backward())
    assert flops == 3 * 2 * 10 * 8 * 6  # the output and the gradients of both operands
    assert sum(product.flops * times for product, times in seen.items()) == flops
    q, k, v = (torch.randn(1, heads, length, 16, requires_grad=True) for heads, length in ((4, 3), (2, 7), (2, 7)))

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward()

    flops, seen = products.count(attend)
    one = 2 * 4 * 3 * 7 * 16
    assert flops in (6 * one, 7 * one)  # 2 products, then 4, or 5 where the kernel forms the scores anew
    assert not seen or flops == 6 * one  # no product of two matrices, unless the kernel is written in them


def test_noted_products_can_be_run_again_in_the_same_layout():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    _, seen = products.count(lambda: F.linear(x, weight).sum().backward())
    again = products.operands(seen, torch.device("cpu"))
    assert [(tuple(a.shape), a.stride()) for a, _, _ in again] == [product.left for product in seen]
    assert [(tuple(b.shape), b.stride()) for _, b, _ in again] == [product.right for product in seen]
    assert products.count(lambda: products.multiply(again))[1] == seen


def test_answers_are_runs_of_labelled_tokens():
    labels = torch.full((2, 8), IGNORE)
    labels[0, [0, 1, 3, 7]] = 5
    labels[1, 2:6] = 5
    assert bench.count_answers(labels) == 4


def test_everything_takes_its_turn_after_a_round_that_does_not_count():
    called = []
    actions = {name: lambda name=name: called.append(name) or len(called) for name in "ab"}
    taken = rounds.in_turn(actions, rounds=2, seconds=0, device=torch.device("cpu"))
    assert called == ["a", "b"] * 3
    assert [found for _, found in taken["a"]] == [3, 5]


def test_ratios_are_taken_within_a_round():
    assert str(rounds.ratio([2, 30, 400], [1, 10, 100])) == "3 [2, 4]"
    assert rounds.ratio([1, 1, 3], [8, 4, 4]).percent() == "25 % [12.5, 75]"
    assert [rounds.short(value) for value in (12345.6, 99.94, 0.01234)] == ["12346", "99.9", "0.0123"]


def test_a_run_reports_every_quantity(checkpoint, visibility, capsys):
    bench.main(["--model", checkpoint], CONFIG)
    about, training, decoding = (part.splitlines() for part in capsys.readouterr().out.strip().split("\n\n"))
    assert "parameters" in about[0]
    assert training[0].startswith("training: a round is 2 steps, 4 pictures")
    assert training[1].split() == ["fp32", "bf16"]
    assert [line.count("[") for line in training[2:-1]] == [2] * 8
    assert decoding[0].startswith("decoding: a round is 2 questions with their pictures; 2 of them are answered alike")
    caches = ["no cache"] if visibility == "full" else ["prompt cached", "no cache"]
    ways = [line.split("   ")[0].strip() for line in decoding[2:] if "times" not in line]
    paces = [(1, "as set"), (2, "as set"), (2, "a token a call")]
    assert ways == [f"batch {size}, {cache}, {pace}" for size, pace in paces for cache in caches]
    assert sum(line.endswith("times the answers") for line in decoding) == (2 if visibility == "full" else 5)


@pytest.mark.parametrize("visibility", ["prefix"], indirect=True)
def test_shares_are_ratios_of_the_same_round(checkpoint, tmp_path):
    data = bench.make("scenes", tmp_path / "scenes", num=CONFIG.pictures, workers=1) / "data.json"
    training = bench.measure_training(checkpoint, data, tmp_path, CONFIG)
    assert training.rounds == CONFIG.rounds
    assert training.work.examples == CONFIG.pictures
    assert training.work.pairs >= CONFIG.pictures
    for rates in training.rates.values():
        for name, value in vars(rates).items():
            assert 0 <= value.least <= value.median <= value.greatest < math.inf, name
        assert rates.waiting.greatest < 1
        assert rates.share_of_cube.least >= rates.step.least / rates.cube.greatest * (1 - 1e-9)
        assert rates.share_of_cube.greatest <= rates.step.greatest / rates.cube.least * (1 + 1e-9)
