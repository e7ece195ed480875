"""LLaDA2's generate: 2.0's as recorded from the authors' code, 2.1's editing against its loop written out."""

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
MASK = 168


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


def edited(pipe, prompt, *, threshold, editing_threshold, max_post_steps=16, num_to_transfer=1, block=8, length=16):
    """LLaDA2.1's loop for one row at temperature 0, without an end of sequence: the answer, and its calls."""
    given, calls = prompt.shape[1], 0
    total = -(-(given + length) // block) * block
    canvas = torch.full((1, total), MASK)
    canvas[:, :given] = prompt
    for start in range(given // block * block, total, block):
        post = 0
        while True:
            old = canvas[0, start : start + block].clone()
            unknown = old == MASK
            post += not unknown.any()
            if post > max_post_steps:
                break
            calls += 1
            logits = pipe.logits(canvas[:, : start + block], visibility=f"block:{block}")
            confidence, tokens = logits[0, start:].softmax(-1).max(-1)
            ranked = confidence.masked_fill(~unknown, -torch.inf)
            fill = ranked > threshold
            if fill.sum() < num_to_transfer:
                fill[ranked.topk(min(num_to_transfer, int(unknown.sum()))).indices] = True
            edit = ~unknown & (torch.arange(start, start + block) >= given)
            edit &= (confidence > editing_threshold) & (tokens != old)
            canvas[0, start : start + block] = torch.where(fill | edit, tokens, old)
            if not unknown.any() and not edit.any():
                break
    return canvas[:, given : given + length], calls


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ("p9", {"threshold": 0.3, "editing_threshold": 0.9}),
        ("p9", {"threshold": 0.3, "editing_threshold": 0.2, "max_post_steps": 4}),
        ("p8", {"threshold": 0.2, "editing_threshold": 0.3, "max_post_steps": 2}),
        ("p9", {"threshold": 0.9, "num_to_transfer": 2, "editing_threshold": 0.3, "max_post_steps": 3}),
        ("p3", {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 1}),
    ],
    ids=str,
)
def test_editing_takes_the_steps_of_llada2_1(pipe, prompt, settings, use_cache) -> None:
    chosen = {"num_to_transfer": 1, **settings}
    out = pipe.generate(
        INPUTS[prompt], max_new_tokens=16, block_length=8, eos_token_id=[], use_cache=use_cache, **chosen
    )
    answer, calls = edited(pipe, INPUTS[prompt], **chosen)
    assert torch.equal(out.sequences[:, -16:], answer)
    assert int(out.num_forwards) == calls
