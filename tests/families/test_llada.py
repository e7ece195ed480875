"""LLaDA against the authors' model, generate.py, likelihood and losses as recorded; Fast-dLLM without its caches."""

from __future__ import annotations

import json

import pytest
import torch

from dmllm.objectives import build_objective
from tests.families.recorded import Recorded, assert_written_back, corrupted, mean

RECORDED = Recorded("llada")
INPUTS, EXPECTED = RECORDED.inputs, RECORDED.expected
CASES = {case["name"]: case for case in json.loads((RECORDED.folder / "cases.json").read_text())}
EOS, EOT = 165, 166
OFFICIAL = [
    name
    for name, case in CASES.items()
    if case.get("impl") in ("LLaDA/generate.py", "Fast-dLLM:generate") and "random" not in name
]


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def options(params: dict) -> dict:
    """generate.py's arguments under our names."""
    same = ("steps", "block_length", "temperature", "cfg_scale", "threshold", "remasking")
    ours = {name: params[name] for name in same if name in params}
    ours |= {"max_new_tokens": params["gen_length"], "eos_token_id": []}
    if params.get("logits_eos_inf"):
        ours["suppress_ids"] = [EOS]
    if params.get("confidence_eos_eot_inf"):
        ours["distrust_ids"] = [EOS, EOT]
    return ours


def given(case: dict, ids: str = "prompt") -> tuple[torch.Tensor, torch.Tensor | None]:
    mask = case["inputs"].get("attention_mask")
    return INPUTS[case["inputs"][ids]], None if mask is None else INPUTS[mask]


@pytest.mark.parametrize("case", ["fwd", "fwd_leftpad", "fwd_rightpad"])
def test_logits_are_the_authors_also_beside_padding(pipe, case) -> None:
    ids, mask = given(CASES[case], "input_ids")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert (pipe.logits(ids, mask) - EXPECTED[f"{case}.logits"])[real].abs().max() < 1e-4


@pytest.mark.parametrize("name", OFFICIAL)
def test_greedy_decoding_takes_the_authors_steps_to_the_authors_tokens(pipe, name) -> None:
    case = CASES[name]
    ids, mask = given(case)
    out = pipe.generate(ids, mask, **options(case["params"]))
    assert torch.equal(out.sequences, EXPECTED[f"{name}.tokens"])
    assert out.num_forwards.tolist() == [case["nfe"]] * len(ids)
    if case.get("trajectory"):  # the canvas before each call
        before = EXPECTED[f"{name}.trajectory"][1:, :, ids.shape[1] :]
        assert torch.equal(torch.stack([step.ids for step in out.trajectory[:-1]]), before)


def test_in_random_order_every_quota_is_the_authors_and_orders_differ(pipe) -> None:
    ids, _ = given(CASES["s8_b8_random"])
    chosen = options(CASES["s8_b8_random"]["params"])
    firsts = set()
    for seed in range(6):
        out = pipe.generate(ids, generator=seed, **chosen)
        assert int(out.num_forwards) == CASES["s8_b8_random"]["nfe"]
        assert [int(step.committed.sum()) for step in out.trajectory] == list(range(2, 17, 2))
        firsts.add(tuple(out.trajectory[0].committed[0].nonzero().flatten().tolist()))
    assert len(firsts) > 3


def published(pipe, prompt: torch.Tensor, distrusted: list[int], block_length: int = 8) -> torch.Tensor:
    """generate.py at one token a call, with its `confidence_eos_eot_inf`: choices first, then what ranks them."""
    canvas = torch.cat([prompt, torch.full((1, 16), 168)], 1)
    for call in range(16):
        logits = pipe.logits(canvas)[0]
        token = logits.argmax(-1)
        logits[:, distrusted] = -torch.inf
        confidence = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
        end = prompt.shape[1] + (call // block_length + 1) * block_length
        confidence[(canvas[0] != 168) | (torch.arange(canvas.shape[1]) >= end)] = -torch.inf
        canvas[0, confidence.argmax()] = token[confidence.argmax()]
    return canvas


def test_a_suppressed_token_is_never_produced_and_a_distrusted_one_comes_last(pipe) -> None:
    ids, _ = given(CASES["s16_b16"])
    chosen = {"max_new_tokens": 16, "steps": 16, "block_length": 8, "eos_token_id": []}
    plain = pipe.generate(ids, **chosen).sequences
    frequent = sorted(set(plain[0, 9:].tolist()))[:3]
    without = pipe.generate(ids, **chosen, suppress_ids=frequent).sequences[0, 9:]
    assert not set(without.tolist()) & set(frequent)
    late = pipe.generate(ids, **chosen, distrust_ids=frequent).sequences
    assert torch.equal(late, published(pipe, ids, frequent))
    assert not torch.equal(late, plain)


@pytest.mark.parametrize("case", ["ll_mc16", "ll_mc8_cfg05"])
def test_likelihood_is_the_authors_on_what_they_hid(pipe, case) -> None:
    params, prompt = CASES[case]["params"], INPUTS["ll_prompt"]
    hidden = EXPECTED[f"{case}.noisy"][:, len(prompt) :] == 168
    cfg = params.get("cfg_scale", 0.0)
    found = pipe.score(prompt[None], INPUTS["ll_answer"][None], hidden=hidden, cfg_scale=cfg)
    assert abs(float(found) - float(EXPECTED[f"{case}.value"])) < 1e-4


def test_likelihood_converges_whatever_is_drawn(pipe) -> None:
    prompt, answer = INPUTS["ll_prompt"], INPUTS["ll_answer"]
    draws = [float(pipe.score(prompt[None], answer[None], num_samples=600, generator=seed)) for seed in (0, 1)]
    assert abs(draws[0] - draws[1]) < 0.05 * abs(draws[0])
    assert float(pipe.score(prompt[None], answer[None], num_samples=600, generator=0)) == draws[0]


def test_each_row_of_a_batch_scores_as_alone_also_padded(pipe) -> None:
    prompt, answer = INPUTS["ll_prompt"], INPUTS["ll_answer"]
    prompts = torch.stack([prompt, prompt.roll(2)])
    prompts[1, :2] = 0
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    both = pipe.score(prompts, answer.expand(2, -1), mask, num_samples=16, generator=0)
    rows = [row[real.bool()][None] for row, real in zip(prompts, mask, strict=True)]
    alone = [pipe.score(row, answer[None], num_samples=16, generator=0) for row in rows]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("case", "reduction"), [("loss_pretrain", "batch_length"), ("loss_sft", "answer_length")])
def test_losses_are_the_authors_under_the_reduction_of_that_stage(pipe, case, reduction) -> None:
    objective = build_objective("masked", {"reduction": reduction}, pipe.special, "full")
    ids, noisy, p = INPUTS["train"], EXPECTED[f"{case}.noisy"], EXPECTED[f"{case}.p_mask"]
    prompts = INPUTS["train_prompt_lengths"] if case == "loss_sft" else torch.zeros(3, dtype=torch.int64)
    scored = torch.arange(ids.shape[1]) >= prompts[:, None]
    noised = corrupted(objective, noisy, ids, p, scored=scored)
    assert torch.equal(noised.batch.input_ids, noisy)
    assert abs(mean(objective, pipe.model, noised) - float(EXPECTED[f"{case}.loss"])) < 1e-4


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path) -> None:
    assert_written_back(pipe, RECORDED, tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"alibi": True}, "alibi=True is not supported"),
        ({"activation_type": "swiglu"}, "activation_type='swiglu' is not supported; 'silu' is"),
        ({"block_type": "sequential"}, "block_type='sequential' is not supported"),
        ({"mask_token_id": None}, "lacks mask_token_id"),
        ({"n_layers": 3}, r"lacks .*model\.transformer\.blocks\.2\."),
        ({"n_layers": 1}, r"unexpected model\.transformer\.blocks\.1\."),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_a_missing_weight_is_named(tmp_path) -> None:
    weights = {k: v for k, v in RECORDED.weights.items() if k != "model.transformer.blocks.1.ff_proj.weight"}
    with pytest.raises(ValueError, match=r"model\.transformer\.blocks\.1\.ff_proj\.weight"):
        RECORDED.changed(tmp_path, weights)


def test_an_answer_of_any_length_takes_a_call_for_each_token_unless_said_otherwise(pipe) -> None:
    ids, _ = given(CASES["s16_b16"])
    for length in (7, 40, 100):
        assert int(pipe.generate(ids, max_new_tokens=length, eos_token_id=[]).num_forwards) == length
