"""Approximate caches: Fast-dLLM's recorded runs token by token, and what must hold whatever is kept."""

from __future__ import annotations

import json

import pytest
import torch

from dmllm.samplers.policy import CachePolicy
from tests.families.recorded import Recorded
from tests.samplers.test_blocks import make, prompts, seeds

POLICIES = [
    {"kind": "prefix"},
    {"kind": "dual"},
    {"kind": "dual", "refresh": 2},
    {"kind": "dual", "vicinity": 3},
    {"kind": "prefix", "refresh": 3, "vicinity": 1},
]
SETTINGS = [
    {"block_length": 4, "threshold": 0.2, "num_to_transfer": 1},
    {"block_length": 3, "temperature": 0.8, "remasking": "random", "eos_token_id": [1, 2, 3, 4, 5, 6]},
    {"block_length": 5, "cfg_scale": 0.7, "threshold": 0.1, "num_to_transfer": 1},
    {"block_length": 4, "prompt_first": True, "steps": 9, "schedule": "time", "remasking": "entropy"},
]


def fast(family: str) -> list:
    recorded = Recorded(family)
    cases = json.loads((recorded.folder / "cases.json").read_text())
    return [pytest.param(recorded, c, id=f"{family}-{c['name']}") for c in cases if c["name"].startswith("fast_")]


def options(case: dict) -> dict:
    """Fast-dLLM's arguments under our names."""
    params, impl = case["params"], case["impl"].split(":")[1]
    found = {
        "temperature": 0.0,
        "max_new_tokens": params.get("gen_length") or params["max_new_tokens"],
        "block_length": params["block_length"],
        "eos_token_id": [],
    }
    if "threshold" in params:
        found |= {"threshold": params["threshold"], "num_to_transfer": 1, "schedule": "even"}
    else:
        found["steps"] = params["steps"]
    if impl in ("prefix", "dual"):
        found["cache"] = impl
    if impl == "block":  # of Dream
        found |= {"cache": "dual" if params["dual_cache"] else "prefix", "prompt_first": True}
        found["remasking"] = "entropy" if params["alg"] == "entropy" else "low_confidence"
    return found


@pytest.mark.parametrize(
    ("recorded", "case"), [p for f in ("llada", "dream") for p in fast(f) if "block_length" in p.values[1]["params"]]
)
def test_fast_dllm_makes_the_same_calls_with_the_same_tokens(recorded: Recorded, case: dict) -> None:
    pipe, fed = recorded.load(), []
    embed = pipe.model.backbone.embed
    pipe.model.backbone.embed = lambda ids: fed.append(ids) or embed(ids)
    out = pipe.generate(recorded.inputs[case["inputs"]["prompt"]], **options(case))
    assert torch.equal(out.sequences, recorded.expected[f"{case['name']}.tokens"])
    assert int(out.num_forwards) == case["nfe"]
    given = recorded.inputs[case["inputs"]["prompt"]].shape[1]
    for number, call in enumerate(fed[1:]):  # behind the prompt, which is embedded once
        theirs = recorded.expected.get(f"{case['name']}.call_input.{number:02d}")
        if theirs is not None:
            canvas = theirs[:, given:] if theirs.shape[1] > given else theirs
            assert torch.equal(call[:, -canvas.shape[1] :], canvas)


@pytest.fixture(scope="module", params=[False, True], ids=["aligned", "shifted"])
def pipe(request: pytest.FixtureRequest):
    return make(request.param, visibility="full")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_row_of_a_batch_equals_the_same_request_alone(pipe, policy: dict, settings: dict) -> None:
    settings = {"max_new_tokens": 12, "cache": policy, **settings}
    ids, mask = prompts()
    together = pipe.generate(ids, mask, generator=seeds(), **settings)
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = pipe.generate(own[real][None], generator=seeds()[row : row + 1], **settings)
        assert torch.equal(alone.sequences[0, int(real.sum()) :], together.sequences[row, 9:])
        assert alone.num_forwards[0] == together.num_forwards[row]


@pytest.mark.parametrize("policy", [{"kind": "dual", "vicinity": 30}, {"kind": "prefix", "vicinity": 30}], ids=str)
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_feeding_everything_is_no_cache_at_all(pipe, policy: dict, settings: dict) -> None:
    settings = {"max_new_tokens": 12, **settings}
    ids, mask = prompts()
    kept = pipe.generate(ids, mask, generator=seeds(), cache=policy, **settings)
    plain = pipe.generate(ids, mask, generator=seeds(), **settings)
    assert torch.equal(kept.sequences, plain.sequences)
    assert torch.equal(kept.num_forwards, plain.num_forwards)


def test_blocks_of_one_token_are_refreshed_at_every_call_and_equal_no_cache(pipe) -> None:
    settings = {"max_new_tokens": 12, "block_length": 1}
    kept = pipe.generate(*prompts(), cache="dual", **settings)
    assert torch.equal(kept.sequences, pipe.generate(*prompts(), **settings).sequences)


def test_what_is_fed_is_what_the_policy_says() -> None:
    pipe, fed = make(visibility="full"), []
    forward = pipe.model.forward

    def watching(*args, **kwargs):
        fed.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    pipe.model.forward = watching
    settings = {"max_new_tokens": 12, "block_length": 4, "steps": 6}
    for policy, expected in [
        ({"kind": "prefix"}, [21, 12, 21, 8, 21, 4]),
        ({"kind": "dual"}, [21, 4, 21, 4, 21, 4]),
        ({"kind": "dual", "refresh": 2}, [21, 4, 4, 4, 21, 4]),
        ({"kind": "dual", "vicinity": 2}, [21, 8, 21, 8, 21, 6]),
    ]:
        fed.clear()
        pipe.generate([[1] * 9], cache=policy, **settings)
        assert fed == expected, policy


def test_what_is_no_policy_is_refused() -> None:
    pipe = make(visibility="full")
    for policy, said in [
        ("duel", "prefix, dual; did you mean"),
        ({"kind": "dual", "refreshes": 2}, "did you mean refresh"),
        ({"kind": "dual", "refresh": 0}, "at least 1"),
        ({"refresh": 2}, "or these fields: kind, refresh"),
        (3, "must be prefix or dual"),
    ]:
        with pytest.raises(ValueError, match=said):
            pipe.generate([[1, 2]], cache=policy)
    with pytest.raises(ValueError, match="for models with full attention"):
        make(visibility="block:4").generate([[1, 2]], cache="dual")
    with pytest.raises(ValueError, match="say different things"):
        pipe.generate([[1, 2]], cache="dual", use_cache=True)
    assert CachePolicy.of({"kind": "dual"}) == CachePolicy.of("dual")
