"""LaViDa-Dream against the authors' model and diffusion_generate: tiles, features, streams, logits, texts, calls.

Recorded from jacklishufan/LaViDa with transformers 4.50.3, tiny random weights and one thread, without top_k and top_p;
the same code in float64 takes the same steps.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from dmllm.checkpoints.example import write_example
from dmllm.families import family_of
from dmllm.families.lavida import LAVIDA_DREAM
from dmllm.pipeline import load
from tests.families.recorded_pictures import Recorded, assert_written_back, digests, threads  # noqa: F401

RECORDED = Recorded("lavida_dream", threads=1)
CASES = RECORDED.cases
MERGED, GENERATED = CASES["merge_cases"], CASES["generate"]
PICTURES = [name for name, case in MERGED.items() if case["images"]]
CLEAN = [name for name, case in GENERATED.items() if not case["mask_chosen"]]
HOLES = [name for name, case in GENERATED.items() if case["mask_chosen"]]
REMASKING = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
MASK = CASES["special_ids"]["mask"]
EPS = 1e-3
pytestmark = [pytest.mark.usefixtures("threads"), pytest.mark.parametrize("threads", [RECORDED.threads], indirect=True)]


def options(params: dict) -> dict:
    """diffusion_generate's arguments under our names; the family's schedule is theirs where they name none."""
    length, ratio = params["max_new_tokens"], params.get("step_ratio")
    ours = {
        "max_new_tokens": length,
        "steps": params.get("steps") if ratio is None else int(length * ratio),
        "remasking": REMASKING[params["alg"]],
        "visibility": "prefix" if params["prefix_lm"] else "full",
        "eos_token_id": [],
    }
    if "schedule" in params:
        return {**ours, "schedule": params["schedule"], "shift": params.get("schedule_kwargs", {}).get("shift", 3.0)}
    return ours if ratio is None else {**ours, "eps": 1 - ratio * (1 - EPS)}  # of the times of all steps, the first


def answered(case: dict, **more):
    asked = MERGED[case["merge_case"]]
    images = RECORDED.images(asked) or None
    return RECORDED.pipe_of(asked).generate([asked["input_ids"]], images=images, **options(case["params"]), **more)


def assert_taken(out, case: dict) -> None:
    """The steps, the tokens and the number of calls are those recorded."""
    assert [step.ids[0].tolist() for step in out.trajectory] == case["history"]
    assert out.trajectory[-1].ids[0].tolist() == case["output"]
    assert int(out.num_forwards) == case["forwards"]


def aligned(theirs: Tensor, before: Tensor) -> Tensor:
    """Each row's logits at the token that they score, the first from the row `before` them."""
    return torch.cat([before, theirs[:, :-1]], 1)


@pytest.mark.parametrize("name", CASES["pixel_cases"])
def test_tiles_are_the_authors_to_the_bit_in_their_order(name) -> None:
    case = CASES["pixel_cases"][name]
    assert digests(RECORDED.tiles(RECORDED.pipe_of(case), case)) == case["sha256_uint8_tiles"]


@torch.no_grad()
def test_patches_are_projected_and_then_pooled_as_the_authors_pool_them() -> None:
    case = MERGED["anyres_a"]
    pipe = RECORDED.pipe_of(case)
    tower = pipe.model.vision(RECORDED.tiles(pipe, case))
    assert RECORDED.distance("features/anyres_a/tower", tower) < 1e-5
    assert RECORDED.distance("features/anyres_a/projected", pipe.model.projector.project(tower)) < 1e-5
    assert RECORDED.distance("features/anyres_a/pooled", pipe.model.projector(tower)) < 1e-5


@pytest.mark.parametrize("name", PICTURES)
def test_stream_and_logits_are_the_authors_once_each_stands_at_the_token_that_it_scores(name) -> None:
    case = MERGED[name]
    stream, logits = RECORDED.stream(RECORDED.pipe_of(case), case)
    assert stream.shape[1] == case["merged_len"]
    assert RECORDED.distance(f"merged/{name}/inputs_embeds", stream) < 1e-5
    rows, index = (RECORDED.expected[f"merged/{name}/logits@{part}"] for part in ("rows", "idx"))
    inside = index + 1 < case["merged_len"]
    assert (logits[:, index[inside] + 1] - rows[:, inside]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["anyres_a", "text"])
def test_an_answer_sees_a_prompt_that_does_or_does_not_see_it(name) -> None:
    case, expected = (
        MERGED[name],
        {part: RECORDED.expected[f"prefix/{name}/{part}"] for part in ("x", "cached", "full")},
    )
    ids = torch.cat([torch.tensor([case["input_ids"]]), expected["x"]], 1)
    given = len(case["input_ids"])
    asked = {"images": RECORDED.images(case) or None, "canvas": torch.arange(ids.shape[1])[None] >= given}
    pipe = RECORDED.pipe_of(case)
    theirs = aligned(expected["cached"], RECORDED.expected[f"prefix/{name}/first"])
    assert (pipe.logits(ids, visibility="prefix", **asked)[:, given:] - theirs).abs().max() < 1e-4
    full = pipe.logits(ids, visibility="full", **asked)[:, given:]
    assert (full - expected["full"][:, :-1]).abs().max() < 1e-4
    assert (full - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("name", CLEAN)
def test_greedy_decoding_takes_the_authors_steps_to_the_authors_tokens(name) -> None:
    assert_taken(answered(GENERATED[name]), GENERATED[name])


@pytest.mark.parametrize("name", HOLES)
def test_where_they_choose_the_mask_token_choose_mask_does_as_they_do_and_the_default_does_not(name) -> None:
    case = GENERATED[name]
    assert_taken(answered(case, choose_mask=True), case)
    out = answered(case)
    assert bool(out.trajectory[-1].committed.all())
    assert not bool((out.trajectory[-1].ids == MASK).any())
    assert int(out.num_forwards) == case["forwards"]


def test_fewer_steps_share_the_whole_time_unless_eps_ends_it_early_as_theirs() -> None:
    case = GENERATED["prefix_half"]
    known = [sum(token != MASK for token in step) for step in case["history"]]
    assert known[-2:] == [6, 16]
    asked = MERGED[case["merge_case"]]
    plain = {**options(case["params"]), "eps": EPS}
    out = RECORDED.pipe_of(asked).generate([asked["input_ids"]], images=RECORDED.images(asked), **plain)
    assert [int(step.committed.sum()) for step in out.trajectory] == [2, 3, 5, 7, 9, 11, 13, 16]


def test_as_many_calls_as_places_are_one_call_less_where_the_prompt_gives_the_first_token() -> None:
    case = CASES["errors"]["prefix_ratio1_shift"]
    assert case["error"].startswith("IndexError")
    out = answered(case)
    assert int(out.num_forwards) == case["params"]["max_new_tokens"] - 1
    assert bool(out.trajectory[-1].committed.all())


def test_two_requests_with_pictures_of_different_sizes_get_what_each_gets_alone() -> None:
    cases = [MERGED["anyres_a"], MERGED["anyres_c"]]
    images = [RECORDED.images(case) for case in cases]
    asked = {"max_new_tokens": 12, "steps": 6, "eos_token_id": []}
    pipe = RECORDED.pipe_of(cases[0])
    longest = max(len(case["input_ids"]) for case in cases)
    rows = [case["input_ids"] + [0] * (longest - len(case["input_ids"])) for case in cases]
    mask = [[1] * len(case["input_ids"]) + [0] * (longest - len(case["input_ids"])) for case in cases]
    both = pipe.generate(rows, mask, images=images, **asked)
    for row, (case, own) in enumerate(zip(cases, images, strict=True)):
        alone = pipe.generate([case["input_ids"]], images=own, **asked)
        assert torch.equal(both.trajectory[-1].ids[row], alone.trajectory[-1].ids[0])
        assert int(both.num_forwards[row]) == int(alone.num_forwards)


def test_written_back_it_is_the_authors_checkpoint_to_the_bit(tmp_path) -> None:
    assert_written_back(load(str(RECORDED.folder), device="cpu"), RECORDED, tmp_path)


def test_its_tokenizer_is_qwens_under_another_name_and_an_answer_ends_a_turn_or_the_text(tmp_path) -> None:
    folder = write_example("lavida_dream", tmp_path / "model")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    own = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.Dream", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    pipe = load(str(folder), device="cpu")
    assert family_of(pipe.model.config.published) is LAVIDA_DREAM
    assert pipe.processor.decode(pipe.processor.tokenizer("a picture, 12").input_ids) == "a picture, 12"
