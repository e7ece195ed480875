"""LaViDa against the authors' code: tiles, pooled features, streams, logits with and without a cached prompt, texts."""

from __future__ import annotations

import pytest
import torch

from dmllm.checkpoints.example import write_example
from dmllm.families import family_of
from dmllm.families.lavida import LAVIDA, LAVIDA_DREAM
from dmllm.pipeline import load
from dmllm.samplers.schedules import commit_counts
from tests.families.recorded_pictures import Recorded, assert_written_back, digests, threads  # noqa: F401

RECORDED = Recorded("lavida", threads=2)  # recorded with 1
CASES = RECORDED.cases
MERGED = {name: case for name, case in CASES["merge_cases"].items() if name != "two_anyres"}  # whose rows are not kept
GREEDY = [name for name, case in CASES["generate"].items() if "seed" not in case["params"]]
pytestmark = [pytest.mark.usefixtures("threads"), pytest.mark.parametrize("threads", [RECORDED.threads], indirect=True)]


def options(params: dict) -> dict:
    """generate.py's arguments under our names."""
    calls = params["block_length"] * params.get("step_ratio", 1)
    return {
        "max_new_tokens": params["max_new_tokens"],
        "block_length": params["block_length"],
        "block_steps": int(calls),
        "schedule": params.get("schedule") or "even",
        "remasking": {"entrophy": "entropy"}.get(params.get("remasking"), params.get("remasking", "low_confidence")),
        "visibility": "prefix" if params["prefix_lm"] else "full",
        "draft": [params["draft"]] if "draft" in params else None,
        "eos_token_id": [],
    }


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
    for mode in ("average", "max"):
        other = RECORDED.pipe(mm_spatial_pool_mode=mode).model.projector
        assert other.grid == (13, 13)
        assert RECORDED.distance(f"features/anyres_a/pooled_{mode}", other(tower)) < 1e-5


@pytest.mark.parametrize("name", MERGED)
def test_stream_and_logits_are_the_authors(name) -> None:
    case = MERGED[name]
    stream, logits = RECORDED.stream(RECORDED.pipe_of(case), case)
    assert stream.shape[1] == case["merged_len"]
    assert RECORDED.distance(f"merged/{name}/inputs_embeds", stream) < 1e-5
    assert RECORDED.distance(f"merged/{name}/logits", logits) < 1e-4


@pytest.mark.parametrize(("visibility", "name"), [("prefix", "logits_cached"), ("full", "logits_full")])
def test_an_answer_sees_a_prompt_that_does_or_does_not_see_it(visibility, name) -> None:
    case = CASES["merge_cases"]["anyres_a"]
    answer = RECORDED.expected["prefix/x"]
    ids = torch.cat([torch.tensor([case["input_ids"]]), answer], 1)
    canvas = torch.arange(ids.shape[1])[None] >= len(case["input_ids"])
    logits = RECORDED.pipe_of(case).logits(ids, images=RECORDED.images(case), canvas=canvas, visibility=visibility)
    assert RECORDED.distance(f"prefix/{name}", logits[:, len(case["input_ids"]) :]) < 1e-4


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_decoding_takes_the_authors_steps_to_the_authors_tokens(name) -> None:
    case = CASES["generate"][name]
    asked = CASES["merge_cases"][case["merge_case"]]
    out = RECORDED.pipe_of(asked).generate(
        [asked["input_ids"]], images=RECORDED.images(asked), **options(case["params"])
    )
    assert out.sequences[0, len(asked["input_ids"]) :].tolist() == case["output"]
    assert [step.ids[0].tolist() for step in out.trajectory] == case["history"]
    assert int(out.num_forwards) == len(case["history"])


def test_each_call_commits_as_many_tokens_as_the_authors_tables_say() -> None:
    for name, counts in CASES["num_transfer"].items():
        curve, tokens, calls, shift = name.split("|")
        if curve != "None":
            shift = 3 if shift == "null" else float(shift.partition(": ")[2].rstrip("}"))
            assert list(commit_counts(curve, shift, int(tokens[2:]), int(calls[6:]))) == counts, name


def test_two_requests_with_pictures_of_different_sizes_get_what_each_gets_alone() -> None:
    first, second = CASES["merge_cases"]["anyres_a"], CASES["merge_cases"]["anyres_c"]
    pipe = RECORDED.pipe_of(first)
    asked = {"max_new_tokens": 16, "block_length": 16, "block_steps": 8, "schedule": "shift", "eos_token_id": []}
    images = [RECORDED.images(first), RECORDED.images(second)]
    both = pipe.generate([first["input_ids"], second["input_ids"]], images=images, **asked).sequences
    for row, (case, own) in enumerate(zip((first, second), images, strict=True)):
        assert torch.equal(both[row], pipe.generate([case["input_ids"]], images=own, **asked).sequences[0])


def test_written_back_it_is_the_authors_checkpoint_to_the_bit(tmp_path) -> None:
    assert_written_back(load(str(RECORDED.folder), device="cpu"), RECORDED, tmp_path)


@pytest.mark.parametrize("family", [LAVIDA, LAVIDA_DREAM])
def test_a_random_model_of_either_backbone_is_recognised_and_answers_about_a_picture(family, tmp_path) -> None:
    write_example(family.name, tmp_path / "model")
    pipe = load(str(tmp_path / "model"), device="cpu")
    assert family_of(pipe.model.config.published) is family
    image = str(RECORDED.folder / "image_d.png")
    out = pipe.generate([[5, -200, 7]], images=[image], max_new_tokens=8, block_length=8, eos_token_id=[])
    assert out.sequences.shape == (1, 11)
    uncached = pipe.generate(
        [[5, -200, 7]], images=[image], max_new_tokens=8, block_length=8, eos_token_id=[], use_cache=False
    )
    assert torch.equal(out.sequences, uncached.sequences)


def test_the_prompt_of_dream_predicts_the_first_token_with_and_without_its_cache(tmp_path) -> None:
    write_example("lavida_dream", tmp_path / "model")
    pipe = load(str(tmp_path / "model"), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    alone = pipe.logits(torch.cat([ids, torch.tensor([[302]])], 1), canvas=torch.tensor([[False] * 3 + [True]]))[0, 3]
    many = pipe.logits(torch.cat([ids, torch.full((1, 4), 302)], 1), canvas=torch.arange(7)[None] >= 3)[0, 3]
    asked = {"max_new_tokens": 8, "eos_token_id": [], "suppress_ids": [302]}
    for use_cache in (None, False):  # it is known before the first call, which commits another one
        out = pipe.generate(ids, use_cache=use_cache, **asked)
        assert int(out.trajectory[0].ids[0, 0]) == int(many.scatter(0, torch.tensor(302), -torch.inf).argmax())
        assert int(out.num_forwards) == 8
    assert not bool(pipe.generate(ids, prompt_first=False, **asked).trajectory[0].committed.any())
    assert torch.allclose(alone, many, atol=1e-5)  # no row of the canvas has a part in it
    assert not torch.allclose(alone, pipe.logits(torch.tensor([[5, 6, 8, 302]]))[0, 3], atol=1e-3)
