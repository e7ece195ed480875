"""A canvas that is opened block by block: what is not opened is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dmllm.pipeline import Pipeline
from dmllm.samplers.config import decode_config
from tests.samplers.test_blocks import make, prompts, seeds, watched

SETTINGS: list[dict[str, Any]] = [
    {"block_length": 4, "blocks_ahead": 0},
    {"block_length": 3, "blocks_ahead": 1, "temperature": 0.8, "remasking": "random", "cfg_scale": 0.5},
    {"block_length": 4, "blocks_ahead": 0, "threshold": 0.1, "revoke_threshold": 0.5, "eos_token_id": [1, 2, 3, 4, 5]},
]


@pytest.fixture(scope="module", params=["full", "prefix", "shifted"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return make(request.param == "shifted", visibility="prefix" if request.param == "prefix" else "full")


def test_blocks_opened_one_after_the_other_are_answers_that_go_on_where_they_end(pipe: Pipeline) -> None:
    ids = [[5, 6, 7]]
    grown = pipe.generate(ids, max_new_tokens=12, block_length=4, blocks_ahead=0)
    draft: list[int] = []
    for length in (4, 8, 12):
        out = pipe.generate(ids, draft=[draft] if draft else None, max_new_tokens=length, block_length=4)
        draft = out.sequences[0, 3:].tolist()
    assert grown.sequences[0, 3:].tolist() == draft
    assert draft != pipe.generate(ids, max_new_tokens=12, block_length=4).sequences[0, 3:].tolist()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_row_of_a_batch_equals_the_same_request_alone(pipe: Pipeline, options: dict[str, Any]) -> None:
    ids, mask = prompts()
    together = pipe.generate(ids, mask, generator=seeds(), **options)
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = pipe.generate(own[real][None], generator=seeds()[row : row + 1], **options)
        assert torch.equal(alone.sequences[0, int(real.sum()) :], together.sequences[row, 9:])
        assert alone.num_forwards[0] == together.num_forwards[row]


def test_all_blocks_ahead_is_the_whole_canvas_and_what_is_not_opened_is_not_fed(pipe: Pipeline) -> None:
    whole, many = watched(pipe, block_length=4)
    every, same = watched(pipe, block_length=4, blocks_ahead=2)
    assert torch.equal(whole.sequences, every.sequences)
    assert [rows for rows, _ in same] == [rows for rows, _ in many]
    _, few = watched(pipe, block_length=4, blocks_ahead=0)
    fed, most = ([rows for rows, logits in calls if logits.shape[1]] for calls in (few, many))
    assert fed[:9:4] == [most[0] - 7, most[0] - 3, most[0]]


def test_however_long_the_answer_may_be_one_that_ends_early_is_the_same(pipe: Pipeline) -> None:
    stops = {"eos_token_id": list(range(0, 47, 4)), "block_length": 4, "blocks_ahead": 0}
    short, long = (pipe.generate(*prompts(), max_new_tokens=n, **stops) for n in (12, 40))
    assert torch.equal(short.sequences, long.sequences[:, : short.sequences.shape[1]])
    ended = long.num_forwards <= 12
    assert torch.equal(short.num_forwards[ended], long.num_forwards[ended])
    assert ended.any()


@pytest.mark.parametrize("options", [{}, {"block_length": 4, "suffix_ids": [3]}, {"block_length": 4, "cache": "dual"}])
def test_blocks_are_opened_only_where_there_are_some_and_nothing_behind_them(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="blocks_ahead=0 opens blocks one by one: say block_length"):
        decode_config({"blocks_ahead": 0, **options})


def test_block_causal_models_open_them_so_anyway() -> None:
    blocks = make()
    assert torch.equal(
        blocks.generate(*prompts(), block_length=4, blocks_ahead=0).sequences, blocks.generate(*prompts()).sequences
    )
    with pytest.raises(ValueError, match="no block sees those behind it"):
        blocks.generate(*prompts(), block_length=4, blocks_ahead=1)
