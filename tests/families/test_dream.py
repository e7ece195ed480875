"""Dream against the authors' model and diffusion_generate, as recorded; their logits are compared after their shift."""

from __future__ import annotations

import json

import pytest
import torch

from tests.families.recorded import Recorded, assert_written_back

RECORDED = Recorded("dream")
INPUTS, EXPECTED = RECORDED.inputs, RECORDED.expected
CASES = {case["name"]: case for case in json.loads((RECORDED.folder / "cases.json").read_text())}
REMASKING = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy", "origin": "origin"}
GREEDY = [name for name, case in CASES.items() if case.get("impl") == "Dream" and "origin" not in name]


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def options(params: dict) -> dict:
    """diffusion_generate's arguments under our names; the family's schedule is theirs."""
    ours = {name: params[name] for name in ("steps", "max_new_tokens", "temperature", "eps") if name in params}
    return {**ours, "remasking": REMASKING[params["alg"]], "eos_token_id": []}


def given(case: dict, ids: str = "prompt") -> tuple[torch.Tensor, torch.Tensor | None]:
    mask = case["inputs"].get("attention_mask")
    return INPUTS[case["inputs"][ids]], None if mask is None else INPUTS[mask]


@pytest.mark.parametrize("case", ["fwd", "fwd_leftpad", "fwd_rightpad"])
def test_logits_are_the_authors_once_each_stands_at_the_token_that_it_scores(pipe, case) -> None:
    ids, mask = given(CASES[case], "input_ids")
    theirs = EXPECTED[f"{case}.logits"]
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    first = real.long().argmax(1)
    before = (torch.arange(ids.shape[1]) - 1).maximum(first[:, None])  # of the first token, its own row
    aligned = theirs.gather(1, before[..., None].expand_as(theirs))
    assert (pipe.logits(ids, mask) - aligned)[real].abs().max() < 1e-4


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_decoding_takes_the_authors_steps_to_the_authors_tokens(pipe, name) -> None:
    case = CASES[name]
    ids, mask = given(case)
    out = pipe.generate(ids, mask, **options(case["params"]))
    assert torch.equal(out.sequences, EXPECTED[f"{name}.tokens"])
    assert out.num_forwards.tolist() == [case["nfe"]] * len(ids)
    if case.get("trajectory"):  # the first canvas, then each step's
        after = EXPECTED[f"{name}.trajectory"][1:, :, ids.shape[1] :]
        assert torch.equal(torch.stack([step.ids for step in out.trajectory]), after)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("fast_full")])
def test_what_fast_dllms_threshold_turns_down_is_carried_over_to_later_calls(pipe, name) -> None:
    """Of an even share what is sure, the best in any case; where some are left at the last step, steps are added."""
    case = CASES[name]
    params, ids = case["params"], given(case)[0]
    chosen = {k: params[k] for k in ("steps", "threshold", "max_new_tokens")}
    options = {"schedule": "carried", "remasking": "low_confidence", "eos_token_id": [], **chosen}
    out = pipe.generate(ids, **options)
    assert torch.equal(out.sequences, EXPECTED[f"{name}.tokens"])
    assert int(out.num_forwards) == case["nfe"]


@pytest.mark.parametrize("name", ["origin_s8", "origin_s16"])
def test_origin_takes_the_authors_number_of_steps_and_their_choice_where_it_chooses(pipe, name) -> None:
    """Which positions are drawn differs with the generator; what is committed there is the most probable token."""
    case = CASES[name]
    ids, _ = given(case)
    out = pipe.generate(ids, generator=1, **options(case["params"]))
    assert int(out.num_forwards) == case["nfe"]
    before = torch.cat([ids, torch.full((1, 16), pipe.special.mask)], 1)
    for step in out.trajectory:
        best = pipe.logits(before)[:, ids.shape[1] :].argmax(-1)
        fresh = step.committed & (before[:, ids.shape[1] :] == pipe.special.mask)
        assert torch.equal(step.ids[fresh], best[fresh])
        before = torch.cat([ids, step.ids], 1)


def test_origin_commits_each_token_with_the_share_of_time_that_passes(pipe) -> None:
    ids, _ = given(CASES["origin_s8"])
    rows = ids.expand(64, -1)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(64)]
    out = pipe.generate(rows, generator=seeds, **options(CASES["origin_s8"]["params"]))
    known = torch.stack([step.committed.float().mean() for step in out.trajectory])
    times = torch.linspace(1, 1e-3, 9)[1:]
    assert (known[:-1] - (1 - times[:-1])).abs().max() < 0.05  # 1024 tokens: a standard deviation is at most 0.016
    assert known[-1] == 1


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path) -> None:
    assert_written_back(pipe, RECORDED, tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; 'silu' is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.* is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"mask_token_id": None}, "lacks mask_token_id"),
        ({"num_hidden_layers": 3}, r"lacks .*model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"unexpected model\.layers\.1\."),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_a_missing_weight_is_named(tmp_path) -> None:
    weights = {k: v for k, v in RECORDED.weights.items() if k != "model.layers.1.self_attn.k_proj.bias"}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias"):
        RECORDED.changed(tmp_path, weights)
