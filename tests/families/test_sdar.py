"""SDAR against the authors' model and generate.py as recorded, with the arg-max in place of draws at temperature 1."""

from __future__ import annotations

import json

import pytest
import torch

from tests.families.recorded import Recorded, assert_written_back

RECORDED = Recorded("sdar")
INPUTS, EXPECTED = RECORDED.inputs, RECORDED.expected
CASES = {case["name"]: case for case in json.loads((RECORDED.folder / "cases.json").read_text())}
# In the other one a quota above what is open overwrites known tokens, which ours does not (see the family's quirks).
GREEDY = [name for name, case in CASES.items() if case["kind"] == "sample" and not name.startswith("quirk")]


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def options(params: dict) -> dict:
    """generate.py's arguments under our names; the family's schedule and calls are theirs."""
    strategy = params["remasking_strategy"]
    return {
        "max_new_tokens": params["gen_length"],
        "block_length": params["block_length"],
        "block_steps": params["denoising_steps"],
        "remasking": "sequential" if strategy == "sequential" else "low_confidence",
        "threshold": params["confidence_threshold"] if strategy.endswith("dynamic") else None,
        "eos_token_id": [],
    }


@pytest.mark.parametrize(("case", "visibility"), [("fwd_block4", None), ("fwd_full", "full")])
def test_logits_are_the_authors_in_blocks_and_with_full_visibility(pipe, case, visibility) -> None:
    found = pipe.logits(INPUTS["ids"], visibility=visibility)
    assert (found - EXPECTED[f"{case}.logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_decoding_makes_the_authors_calls_and_finds_their_tokens(pipe, name) -> None:
    """Their canvas goes on to the end of its last block, which is filled here too, and cut at the length asked for."""
    case = CASES[name]
    ids = INPUTS[case["inputs"]["prompt"]]
    out = pipe.generate(ids, **options(case["params"]))
    assert torch.equal(out.sequences, EXPECTED[f"{name}.tokens"][:, : ids.shape[1] + case["params"]["gen_length"]])
    assert int(out.num_forwards) == case["nfe"]


def test_a_call_is_fed_what_the_authors_feed(pipe) -> None:
    """The prompt's whole blocks, then one block at a time, once more when it is full."""
    name, fed = "dynamic_b4_th0.2", []
    embed, case = pipe.model.backbone.embed, CASES["dynamic_b4_th0.2"]
    pipe.model.backbone.embed = lambda ids: fed.append(ids) or embed(ids)
    pipe.generate(INPUTS[case["inputs"]["prompt"]], **options(case["params"]))
    del pipe.model.backbone.embed
    calls = [EXPECTED[f"{name}.call_input.{number:02d}"] for number in range(case["nfe"])]
    canvas = [call for call in fed[2:] if call.shape[1] == 4]  # behind the prompt, embedded once, and its stored blocks
    assert len(canvas) == len(calls) - 1
    for mine, theirs in zip(canvas[4:], calls[5:], strict=True):  # in the first block the prompt's token stands first
        assert torch.equal(mine, theirs)


def test_a_reply_that_ends_completes_its_block_and_its_storing_call(pipe) -> None:
    case = CASES["static_b4_s4"]
    ids, chosen = INPUTS[case["inputs"]["prompt"]], options(case["params"])
    whole = pipe.generate(ids, **chosen).sequences[0, 9:].tolist()
    stop = whole[4]  # in the second block
    at = whole.index(stop)
    out = pipe.generate(ids, **{**chosen, "eos_token_id": [stop]})
    blocks = (9 + at) // 4 - 2 + 1  # of which the first begins with a token of the prompt
    assert int(out.num_forwards) == 1 + 4 * blocks - 1 + blocks
    assert out.sequences[0, 9 : 9 + at + 1].tolist() == whole[: at + 1]
    assert (out.sequences[0, 9 + at + 1 :] == pipe.special.pad).all()


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path) -> None:
    assert_written_back(pipe, RECORDED, tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.* is not supported"),
        ({"mask_token_id": None}, "lacks mask_token_id"),
        ({"num_hidden_layers": 3}, r"lacks .*model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"unexpected model\.layers\.1\."),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_a_missing_weight_is_named(tmp_path) -> None:
    weights = {k: v for k, v in RECORDED.weights.items() if k != "model.layers.1.self_attn.q_norm.weight"}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_norm\.weight"):
        RECORDED.changed(tmp_path, weights)
