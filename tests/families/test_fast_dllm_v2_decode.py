"""Fast-dLLM v2's generate and batch_sample, as recorded from the authors' code."""

from __future__ import annotations

import json

import pytest
import torch

import dmllm.samplers.absorbing as loop
from tests.families.recorded import Recorded

RECORDED = Recorded("fast_dllm_v2")
CASES = json.loads((RECORDED.folder / "cases.json").read_text())
"""Prompts drawn at random, for which noise of 3e-4 on the logits changes neither tokens nor calls."""
BLOCK = 8
PROMPTS = torch.randint(100, (40,), generator=torch.Generator().manual_seed(5))
SETTINGS = [
    {"threshold": 1.0},
    {"threshold": 0.3},
    {"threshold": 0.1},
    {"threshold": 0.3, "sub_block_length": 8},
    {"threshold": 0.2, "sub_block_length": 2},
    {"threshold": 1.0, "sub_block_cache": True},
    {"threshold": 0.3, "sub_block_cache": True},
    {"threshold": 0.1, "sub_block_length": 8, "sub_block_cache": True},
]
LENGTHS = [11, 5, 16, 13, 8, 15, 17]


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def name_of(case: dict) -> str:
    return f"{len(case['prompt'])} tokens, {case['params']}"


def options(settings: dict) -> dict:
    return {"sub_block_length": 4, "eos_token_id": [], **settings}


def asked(params: dict) -> dict:
    """generate's arguments under our names, but for its length and its end."""
    named = {
        "sub_block_length": params.get("small_block_size", 8),
        "sub_block_cache": params.get("use_block_cache", False),
    }
    block = params["block_size"]
    visibility = None if block == BLOCK else f"block:{block}"
    return {"threshold": params["threshold"], "block_length": block, "visibility": visibility, **named}


def length_of(params: dict, given: int) -> int:
    """Up to the token behind their last block."""
    block = params["block_size"]
    return params["max_new_tokens"] // block * block - given % block + 1


@pytest.mark.parametrize("case", CASES["single"], ids=name_of)
def test_greedy_decoding_makes_the_authors_calls_and_finds_their_tokens(pipe, case) -> None:
    """Its last call gives the token after the last block; asked for up to there or not, there are as many calls."""
    prompt, params = case["prompt"], case["params"]
    length = length_of(params, len(prompt))
    assert len(case["tokens"]) == length
    for less in (0, 1):
        out = pipe.generate([prompt], max_new_tokens=length - less, eos_token_id=[], **asked(params))
        assert out.sequences[0, len(prompt) :].tolist() == case["tokens"][: length - less]
        assert int(out.num_forwards) == case["nfe"]


@pytest.mark.parametrize("case", CASES["stopped"], ids=name_of)
def test_a_reply_ends_where_theirs_does(pipe, case) -> None:
    prompt, params, theirs = case["prompt"], case["params"], case["tokens"]
    length = length_of(params, len(prompt))
    out = pipe.generate([prompt], max_new_tokens=length, eos_token_id=params["stop_token"], **asked(params))
    assert out.sequences[0, len(prompt) :].tolist() == theirs + [pipe.special.pad] * (length - len(theirs))
    assert int(out.num_forwards) == case["nfe"]


def together(pipe, case: dict) -> list[list[int]]:
    """The answers to a batch, as far as batch_sample goes: its blocks are counted from the longest prompt's."""
    prompts, params = case["prompts"], case["params"]
    width, block = max(map(len, prompts)), params["block_size"]
    last = width // block * block + params["max_new_tokens"] // block * block + 1
    ids = torch.tensor([[0] * (width - len(own)) + own for own in prompts])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])
    ends = [] if params["stop_token"] < 0 else params["stop_token"]
    length = last - min(map(len, prompts))
    out = pipe.generate(ids, mask, max_new_tokens=length, eos_token_id=ends, eos_early_stop=False, **asked(params))
    return [row[width : width + last - len(own)].tolist() for row, own in zip(out.sequences, prompts, strict=True)]


@pytest.mark.parametrize("case", CASES["batch"], ids=lambda case: str(case["params"]))
def test_a_batch_finds_the_tokens_of_batch_sample(pipe, case) -> None:
    """Theirs go on behind a block that holds a stop token as far as the longest row does; the answers end at it."""
    stop = case["params"]["stop_token"]
    for ours, theirs in zip(together(pipe, case), case["tokens"], strict=True):
        ends = theirs.index(stop) + 1 if stop in theirs else len(theirs)
        assert ours[:ends] == theirs[:ends]
        assert ours[ends:] == [pipe.special.pad] * (len(ours) - ends)


@pytest.mark.parametrize("name", ["multiple", "one_more"])
def test_every_row_of_a_batch_is_what_the_authors_give_for_it_alone(pipe, name) -> None:
    """Their batch_sample is wrong for two lengths of prompts that are longer than another of the batch by a block."""
    case = CASES["defects"][name]
    assert case["together"] != case["alone"]
    for ours, theirs in zip(together(pipe, case), case["alone"], strict=True):
        known = min(len(ours), len(theirs))
        assert ours[:known] == theirs[:known]


def test_a_prompt_of_one_block_is_read(pipe) -> None:
    """The authors' calls see nothing of it, whatever it is."""
    first, second = CASES["defects"]["one_block"]
    assert first["prompt"] != second["prompt"]
    assert first["tokens"] == second["tokens"]
    ours = [
        pipe.generate([case["prompt"]], max_new_tokens=9, eos_token_id=[], **asked(case["params"])).sequences[:, 8:]
        for case in (first, second)
    ]
    assert not torch.equal(*ours)


def test_one_token_a_call_takes_the_calls_of_its_tokens_and_of_its_blocks(pipe) -> None:
    out = pipe.generate([PROMPTS[:11].tolist()], max_new_tokens=14, **options({"threshold": 1.0}))
    assert int(out.num_forwards) == 1 + (5 + 1) + (7 + 1)


@pytest.mark.parametrize("settings", [*SETTINGS, {"threshold": 0.3, "temperature": 0.7}], ids=str)
def test_a_row_of_a_batch_equals_the_same_request_alone(pipe, settings) -> None:
    ids = PROMPTS[:20].repeat(len(LENGTHS), 1)
    mask = (torch.arange(20) < torch.tensor(LENGTHS)[:, None]).long()
    asked = {"max_new_tokens": 15, **options(settings)}
    seeds = [torch.Generator().manual_seed(row) for row in range(len(LENGTHS))]
    together = pipe.generate(ids, mask, generator=seeds, **asked)
    for row, given in enumerate(LENGTHS):
        alone = pipe.generate([PROMPTS[:given].tolist()], generator=[torch.Generator().manual_seed(row)], **asked)
        assert torch.equal(alone.sequences[0, given:], together.sequences[row, 20:])
        assert alone.num_forwards[0] == together.num_forwards[row]


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_what_is_stored_changes_neither_tokens_nor_calls(pipe, settings) -> None:
    for given in LENGTHS:
        prompt = [PROMPTS[:given].tolist()]
        stored, plain = (
            pipe.generate(prompt, max_new_tokens=15, use_cache=c, **options(settings)) for c in (None, False)
        )
        assert torch.equal(stored.sequences, plain.sequences)
        assert torch.equal(stored.num_forwards, plain.num_forwards)


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_asking_for_whole_sub_blocks_as_on_a_gpu_gives_the_same_tokens(pipe, settings, monkeypatch) -> None:
    ids, mask = PROMPTS[:20].repeat(3, 1), (torch.arange(20) < torch.tensor([[16], [11], [5]])).long()
    asked, open_rows = {"max_new_tokens": 18, **options(settings)}, loop._open_rows
    compact = pipe.generate(ids, mask, **asked)
    monkeypatch.setattr(loop, "_open_rows", lambda *given, compact: open_rows(*given, compact=False))
    static = pipe.generate(ids, mask, **asked)
    assert torch.equal(compact.sequences, static.sequences)
    assert torch.equal(compact.num_forwards, static.num_forwards)


def test_a_sub_block_is_fed_alone_once_its_first_token_is_known(pipe) -> None:
    fed, forward = [], pipe.model.forward

    def watching(*args, **kwargs):
        fed.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    pipe.model.forward = watching
    pipe.generate(
        [PROMPTS[:11].tolist()], max_new_tokens=14, sub_block_cache=True, eos_token_id=[], sub_block_length=4,
        remasking="sequential", threshold=None,
    )  # fmt: skip
    del pipe.model.forward
    block = [8, 4, 4, 4]  # its second sub-block; before it, what is left of the first
    assert fed == [8, 8, *block, 9, 8, 4, 4, *block, 9]  # a full block with the place behind it, which it predicts


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sub_block_length": 3}, "sub_block_length=3 does not divide block_length=8; try 2 or 8"),
        ({"editing_threshold": 0.5}, "say sub_block_length=None, sub_block_cache=False and prompt_first=False"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pipe, given, said) -> None:
    with pytest.raises(ValueError, match=said):
        pipe.generate([[1, 2, 3]], **given)
