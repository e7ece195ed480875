"""Decoders are compared as a stranger would do it: unequal rows are refused, others' code is borrowed by its path."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decode, machine, peers
from benchmarks.decode import main
from benchmarks.shape import Shape, write
from benchmarks.watch import Calls
from dmllm.evaluation.products import count
from dmllm.pipeline import load

TOY = Shape(width=32, layers=2, heads=2, inner=48, vocabulary=160, prompt=19, tokens=8, block=4, per_call=2)
OPTIONS = [word for name, value in vars(TOY).items() for word in (f"--{name.replace('_', '-')}", str(value))]
# Greedy decoding block by block, for the loop's signature that LLaDA published.
LOOP = """
import torch

def generate(model, prompt, steps, gen_length, block_length, temperature, mask_id):
    x = torch.cat([prompt, torch.full((1, gen_length), mask_id)], 1)
    for start in range(prompt.shape[1], x.shape[1], block_length):
        for _ in range(steps * block_length // gen_length):
            p, best = model(x).logits.softmax(-1).max(-1)
            p[x != mask_id] = -1
            p[:, start + block_length:] = -1
            chosen = p.topk(gen_length // steps).indices
            x.scatter_(1, chosen, best.gather(1, chosen){WRONG})
    return x
"""
METHODS = """
class Model:
    @staticmethod
    def add_gumbel_noise(logits, temperature):
        return logits

    @staticmethod
    def get_num_transfer_tokens(mask_index, steps):
        return torch.ones(1, dtype=torch.float64)

    def generate_with_embeds(self, inputs_embeds, mask_id=126336):
        return mask_id, self.get_num_transfer_tokens(None, 1).dtype
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(TOY, tmp_path_factory.mktemp("shape") / "model")


def test_every_way_of_ours_is_measured_and_written_down(tmp_path, capsys):
    main([*OPTIONS, "--rounds", "2", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["name"], row["dtype"]): row for row in found["rows"]}
    assert [name for name, dtype in rows if dtype == "bf16"] == [name for name, dtype in rows if dtype == "fp32"]
    # 19 rows of prompt reach into a fifth block of 4: the answer of 8 touches three, and fills the last one whole
    forwards = {"no cache": 4, "prefix cache": 4, "dual cache": 4, "prefix once": 4 + 1, "block-causal": 1 + 2 + 2}
    for name, calls in forwards.items():
        row = rows[f"ours, {name}", "fp32"]
        assert row["forwards"] == calls, name
        assert row["tokens_per_second"]["median"] > 0 < row["peak_bytes"]
    assert found["shape"] == vars(TOY)
    assert {"processor", "torch", "date"} <= set(found["about"])
    assert found["command"].startswith("python -m benchmarks.decode --width 32")
    assert len(found["load_averages"]) == 3
    for step in found["steps"]:
        assert list(step["share"]) == ["own_products", "own_products_in_cache", "cube"]
        assert min(step["limit_seconds"].values()) > 0
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if line.startswith("  ours, ")]
    assert len(table) == len(found["rows"]) + len(found["steps"])


def test_a_loop_of_others_is_compared_token_by_token_before_anything_is_timed(tmp_path):
    (tmp_path / "generate.py").write_text(LOOP.replace("{WRONG}", ""))
    out = tmp_path / "found.json"
    main([*OPTIONS, "--rounds", "1", "--llada", str(tmp_path), "--only", "LLaDA", "ours, no cache", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["agreement"] == [
        {"rows": ["LLaDA generate", "ours, no cache"], "equal_tokens": 8, "of": 8, "calls": [4, 4]}
    ]
    out.unlink()
    (tmp_path / "generate.py").write_text(LOOP.replace("{WRONG}", " % 7"))
    with pytest.raises(SystemExit, match=r"differ: \d of 8 tokens"):
        main([*OPTIONS, "--rounds", "1", "--llada", str(tmp_path), "--only", "LLaDA", "no cache", "--out", str(out)])
    assert not out.exists()


def test_equal_tokens_in_more_calls_are_not_equal():
    same = {"a": torch.ones(1, 3), "b": torch.ones(1, 3)}
    assert decode.check(same, {"a": 2, "b": 2}, [("a", "b")])[0]["equal_tokens"] == 3
    with pytest.raises(SystemExit, match=r"calls \(2, 3\)"):
        decode.check(same, {"a": 2, "b": 3}, [("a", "b")])


def test_borrowed_methods_get_token_ids_of_this_vocabulary_and_no_float64():
    for library, dtype in ((torch, torch.float64), (peers.Single(), torch.float32)):
        assert peers.borrow(METHODS, 1000, library)().generate_with_embeds(None) == (1000 - 128, dtype)


def test_a_checkout_without_the_file_is_named(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match=r"holds no llada/generate\.py"):
        peers.fast_dllm(tmp_path, checkpoint, TOY)


@pytest.mark.parametrize("name", ["dual cache", "block-causal"])
def test_a_cached_step_is_fed_the_block_alone_however_much_is_finished(checkpoint, name):
    long = Shape(**{**vars(TOY), "prompt": 8, "tokens": 32})
    way = next(way for way in decode.ours(load(str(checkpoint), device="cpu"), "fp32", long) if name in way.name)
    with Calls(way.module) as calls:
        way.answer(long.ids())
    blocks = [calls.fed[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(blocks) == 8
    if name == "dual cache":
        assert blocks == [[8 + 32, 4]] * 8
    else:
        assert blocks == [[8 + 4, 4]] + [[4 + 4, 4]] * 7  # the block before it is stored along with its first call


def test_a_request_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="30 tokens in blocks of 4"):
        main([*OPTIONS, "--tokens", "30"])


def test_products_are_repeated_with_weights_of_their_own_that_all_calls_share():
    x, weights = torch.randn(3, 8), [torch.randn(5, 8) for _ in range(4)]
    calls = [count(lambda n=n: [torch.nn.functional.linear(x[:n], w) for w in weights])[1] for n in (3, 2)]
    apart, together = machine.apart(calls), machine.together(calls)
    assert [left.shape[0] for left, _ in apart] == [3] * 4 + [2] * 4
    assert len({right.data_ptr() for _, right in apart}) == 4
    assert len({right.data_ptr() for _, right in together}) == 1
    for matrices in (apart, together):
        assert {(tuple(right.shape), right.stride()) for _, right in matrices} == {((8, 5), (1, 8))}
        assert len(matrices) == 8
