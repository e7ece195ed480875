"""Block-causal decoding on a tiny random model: what is stored changes nothing, and rows do not know of each other."""

from __future__ import annotations

import pytest
import torch

import dmllm.samplers.absorbing as loop
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.pipeline import Pipeline

MASK = 49
SETTINGS = [
    {},
    {"block_steps": 2, "schedule": "fixed", "threshold": 0.3},
    {"remasking": "sequential", "num_to_transfer": 3},
    {"prompt_first": True, "sub_block_length": 2, "threshold": 0.1, "temperature": 0.5, "cfg_scale": 0.5},
    {"temperature": 1.0, "remasking": "random", "eos_token_id": [1, 2, 3, 4, 5, 6]},
    {"temperature": 0.7, "cfg_scale": 0.8, "eos_token_id": [1, 2, 3, 4, 5, 6], "eos_early_stop": False},
    {"editing_threshold": 0.1, "max_post_steps": 3},
    {"block_length": 6, "editing_threshold": 0.05, "num_to_transfer": 2, "max_post_steps": 2, "cfg_scale": 0.5},
    {"store_calls": True, "block_steps": 2, "eos_token_id": [1, 2, 3, 4, 5, 6], "eos_early_stop": False},
    {"threshold": 0.1, "kl_threshold": 0.5, "kl_history_length": 1, "cfg_scale": 0.5},
    {"block_length": 8, "threshold": 0.1, "revoke_threshold": 0.5},
    {"schedule": "time", "remasking": "origin", "remdm": "rescale", "eta": 0.8, "temperature": 1.0, "block_steps": 5},
    {"schedule": "first_hitting", "remasking": "random", "temperature": 1.0, "noise_schedule": "cosine"},
    {"schedule": "carried", "threshold": 0.15, "block_length": 6, "block_steps": 3},
]


def make(shift: bool = False, visibility: str = "block:4") -> Pipeline:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DmllmConfig(
        backbone=shape, mask_token_id=MASK, eos_token_id=48, pad_token_id=47, visibility=visibility, shift=shift
    )
    model = MultimodalModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return Pipeline(model, None, {"max_new_tokens": 11, "eos_token_id": []}, prompt_room=0)


@pytest.fixture(scope="module", params=[False, True], ids=["aligned", "shifted"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return make(request.param)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Of 9, 4, 1, 6 and 2 tokens: parts of a block and whole ones."""
    lengths = torch.tensor([9, 4, 1, 6, 2])
    ids = torch.randint(0, 47, (5, 9), generator=torch.Generator().manual_seed(3))
    return ids, (torch.arange(9) < lengths[:, None]).long()


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(5)]


def watched(pipe: Pipeline, **options):
    """The outcome, and the rows fed and the logits of each call that asked for some."""
    calls, forward = [], pipe.model.forward

    def watching(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append((kwargs["inputs_embeds"].shape[1], output.logits))
        return output

    pipe.model.forward = watching
    try:
        return pipe.generate(*prompts(), generator=seeds(), **options), calls
    finally:
        del pipe.model.forward


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_with_finished_blocks_stored_logits_and_tokens_are_those_without(pipe: Pipeline, options: dict) -> None:
    stored, few = watched(pipe, **options)
    plain, many = watched(pipe, **options, use_cache=False)
    assert torch.equal(stored.sequences, plain.sequences)
    if options.get("store_calls"):  # calls that only store are those of the cache
        assert (stored.num_forwards > plain.num_forwards).all()
        return
    assert torch.equal(stored.num_forwards, plain.num_forwards)
    assert sum(rows for rows, _ in few) < sum(rows for rows, _ in many)
    for (_, mine), (_, theirs) in zip(few, many, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_row_of_a_batch_equals_the_same_request_alone(pipe: Pipeline, options: dict, use_cache: bool | None) -> None:
    ids, mask = prompts()
    together = pipe.generate(ids, mask, generator=seeds(), use_cache=use_cache, **options)
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = pipe.generate(own[real][None], generator=seeds()[row : row + 1], use_cache=use_cache, **options)
        assert torch.equal(alone.sequences[0, int(real.sum()) :], together.sequences[row, 9:])
        assert alone.num_forwards[0] == together.num_forwards[row]


def test_padding_may_stand_left_or_right(pipe: Pipeline) -> None:
    ids, mask = prompts()
    lengths = mask.sum(1)
    left = torch.stack([row.roll(9 - int(n)) for row, n in zip(ids, lengths, strict=True)])
    of_left = torch.stack([row.roll(9 - int(n)) for row, n in zip(mask, lengths, strict=True)])
    ends = [pipe.generate(i, m).sequences[:, 9:] for i, m in ((ids, mask), (left, of_left))]
    assert torch.equal(*ends)


def test_blocks_are_counted_from_the_prompts_first_token_and_each_is_filled_before_the_next(pipe: Pipeline) -> None:
    ids, mask = prompts()
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        trajectory = pipe.generate(own[real][None]).trajectory
        given = int(mask[row].sum())
        of_token = (torch.arange(11) + given) // 4
        for step in trajectory:
            begun = of_token[step.committed[0]].max()
            assert step.committed[0, of_token < begun].all()
        whole = -(-(given + 11) // 4) * 4 - given  # the last block is filled to its end, the answer cut at 11
        assert len(trajectory) == whole
        assert trajectory[-1].ids.shape == (1, 11)


def test_a_block_longer_than_the_answer_is_still_whole(pipe: Pipeline) -> None:
    out = pipe.generate([[1, 2, 3]], max_new_tokens=2, block_length=8)
    assert out.sequences.shape == (1, 5)
    assert int(out.num_forwards) == 5
    assert int(pipe.generate([[1, 2, 3]], max_new_tokens=2, block_length=8, block_steps=2).num_forwards) == 2


def test_only_the_active_block_is_fed_once_what_is_before_it_is_stored() -> None:
    pipe, fed = make(), []
    forward = pipe.model.forward

    def watching(*args, **kwargs):
        fed.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    pipe.model.forward = watching
    pipe.generate([[1] * 9], block_steps=2)
    assert fed == [12, 4, 8, 4, 8, 4]  # two blocks of prompt beside the first, then each beside the one after it
    fed.clear()
    out = pipe.generate([[1] * 9], block_steps=2, store_calls=True)
    assert fed == [8, 4, 4, 4, 4, 4, 4, 4, 4, 4]  # each in a call of its own
    assert int(out.num_forwards) == 10


def test_a_stop_is_obeyed_at_once_or_at_the_end_of_its_block(pipe: Pipeline) -> None:
    stops = list(range(0, 47, 2))
    early, late = (pipe.generate(*prompts(), eos_token_id=stops, eos_early_stop=early) for early in (True, False))
    assert torch.equal(early.sequences, late.sequences)
    assert (early.num_forwards <= late.num_forwards).all()
    assert (early.num_forwards < late.num_forwards).any()


def test_steps_of_the_whole_answer_are_shared_by_its_blocks(pipe: Pipeline) -> None:
    assert int(pipe.generate([[1] * 4], max_new_tokens=8, steps=4).num_forwards) == 4
    with pytest.raises(ValueError, match="try 2 or 4"):
        pipe.generate([[1] * 4], max_new_tokens=8, steps=3)
    with pytest.raises(ValueError, match="masks a whole answer at once, not visibility='block:4'"):
        pipe.score([[1, 2]], [[3]])


def test_without_a_prompt_blocks_begin_with_the_answer(pipe: Pipeline) -> None:
    out = pipe.generate(torch.zeros(1, 0, dtype=torch.int64), store_calls=True)
    assert out.sequences.shape == (1, 11)
    assert int(out.num_forwards) == 12 + 3


@pytest.mark.parametrize("options", SETTINGS[:6], ids=str)
def test_asking_for_whole_blocks_as_on_a_gpu_gives_the_same_tokens(pipe: Pipeline, options: dict, monkeypatch) -> None:
    compact, open_rows = pipe.generate(*prompts(), generator=seeds(), **options), loop._open_rows
    monkeypatch.setattr(loop, "_open_rows", lambda *given, compact: open_rows(*given, compact=False))
    static = pipe.generate(*prompts(), generator=seeds(), **options)
    assert torch.equal(compact.sequences, static.sequences)


def test_calls_that_store_are_made_only_where_something_is_stored() -> None:
    whole = make(visibility="full")
    assert int(whole.generate([[1] * 9], store_calls=True).num_forwards) == 11
    assert int(make().generate([[1] * 9], store_calls=True, use_cache=False).num_forwards) == 11


@pytest.mark.parametrize("visibility", ["full", "block:4"])
@pytest.mark.parametrize(
    "options", [{"eos_early_stop": False}, {"editing_threshold": 0.1, "num_to_transfer": 2}, {"revoke_threshold": 0.5}]
)
def test_what_stays_open_behind_an_end_keeps_no_reply_from_ending(visibility: str, options: dict) -> None:
    stops = {"eos_token_id": list(range(0, 47, 3)), "fill_behind_eos": False, "threshold": 0.1}
    out = make(visibility=visibility).generate(*prompts(), block_length=4, **stops, **options)
    assert len(out.trajectory) < 60
