"""LLaDA2.0's and 2.1's generate, as recorded from the authors' code."""

from __future__ import annotations

import json

import pytest
import torch

from tests.families.recorded import Recorded

RECORDED = Recorded("llada2_moe")
INPUTS, EXPECTED = RECORDED.inputs, RECORDED.expected
CASES = {
    case["name"]: case
    for case in json.loads((RECORDED.folder / "cases.json").read_text())
    if case["kind"] == "sample" and f"{case['name']}.tokens" in EXPECTED
}
MORE = json.loads((RECORDED.folder / "generations.json").read_text())
"""Settings and prompts drawn at random, where noise of 3e-4 on the logits changes neither tokens nor calls."""


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def options(params: dict) -> dict:
    """generate's arguments under our names; the family's schedule is theirs."""
    return {
        "max_new_tokens": params["gen_length"],
        "block_length": params["block_length"],
        "block_steps": min(params["steps"], params["gen_length"] // params.get("minimal_topk", 1)),
        "threshold": params["threshold"],
        "eos_token_id": [] if params["eos_id"] < 0 else [params["eos_id"]],
        "eos_early_stop": params.get("eos_early_stop", False),
    }


def generate(pipe, prompt: list[int], **chosen) -> tuple[list[int], int]:
    """The answer, and its calls."""
    out = pipe.generate([prompt], **chosen)
    return out.sequences[0, len(prompt) :].tolist(), int(out.num_forwards)


def assert_same(pipe, answer: list[int], case: dict) -> None:
    """The answer is theirs, which ends with its end of sequence."""
    theirs = case["tokens"][: case["params"]["gen_length"]]
    assert answer == theirs + [pipe.special.pad] * (len(answer) - len(theirs))


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("name", list(CASES))
def test_greedy_decoding_makes_the_authors_calls_and_finds_their_tokens(pipe, name, use_cache) -> None:
    """Theirs computes everything before a block anew in every call; stored, it is the same, in as many calls."""
    case = CASES[name]
    ids, theirs = INPUTS[case["inputs"]["prompt"]], EXPECTED[f"{name}.tokens"]
    out = pipe.generate(ids, use_cache=use_cache, **options(case["params"]))
    answer = out.sequences[:, ids.shape[1] :]
    assert torch.equal(answer[:, : theirs.shape[1]], theirs)
    assert (answer[:, theirs.shape[1] :] == pipe.special.pad).all()
    assert int(out.num_forwards) == case["nfe"]


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("case", MORE["llada2"], ids=lambda case: str(case["params"]))
def test_other_blocks_steps_and_ends_too(pipe, case, use_cache) -> None:
    answer, calls = generate(pipe, case["prompt"], use_cache=use_cache, **options(case["params"]))
    assert_same(pipe, answer, case)
    assert calls == case["nfe"]


def editing(params: dict) -> dict:
    """The arguments of 2.1's generate under our names, two of which it never reads; its end of sequence apart."""
    unused = ("gen_length", "eos_id", "eos_early_stop", "steps", "minimal_topk")
    kept = {name: value for name, value in params.items() if name not in unused}
    return {"num_to_transfer": 1, "max_new_tokens": params["gen_length"], **kept}


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("case", MORE["llada21"], ids=lambda case: str(case["params"]))
def test_editing_makes_the_calls_of_llada2_1_and_finds_its_tokens(pipe, case, use_cache) -> None:
    """Its eos_early_stop=False fills every block and then cuts the answer at its end; here that is never computed."""
    params, ends = case["params"], [case["params"]["eos_id"]]
    early, eos_token_id = params.get("eos_early_stop", False), [] if ends == [-1] else ends
    answer, calls = generate(pipe, case["prompt"], use_cache=use_cache, eos_token_id=eos_token_id, **editing(params))
    assert_same(pipe, answer, case)
    if not early:
        assert calls <= case["nfe"]
        _, calls = generate(pipe, case["prompt"], use_cache=use_cache, eos_token_id=[], **editing(params))
    assert calls == case["nfe"]


@pytest.mark.parametrize("case", MORE["llada21"][:4], ids=lambda case: str(case["params"]))
def test_a_row_of_a_batch_is_edited_as_it_is_alone(pipe, case) -> None:
    prompts = [other["prompt"] for other in MORE["llada21"][:6]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(own)) + own for own in prompts])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])
    out = pipe.generate(ids, mask, eos_token_id=[], **editing(case["params"]))
    for row, prompt in enumerate(prompts):
        answer, calls = generate(pipe, prompt, eos_token_id=[], **editing(case["params"]))
        assert out.sequences[row, width:].tolist() == answer
        assert out.num_forwards[row] == calls
