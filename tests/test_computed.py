"""The rows of a prompt that begins as an earlier one did are not computed again, and change no answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dmllm.computed import ComputedPrompts, contents_of
from dmllm.nn.cache import KVCache
from dmllm.nn.graphs import Workspaces
from dmllm.pipeline import Pipeline
from dmllm.types import ROW_BREAK, TEXT, Batch
from tests.samplers.test_blocks import make as on_ids
from tests.samplers.test_blocks import prompts, seeds
from tests.test_as_on_a_gpu import act
from tests.test_pipeline import TOKENS, make, picture

KINDS = ["prefix", "block:4", "causal"]
ROOM = 2**20


def keeping(pipeline: Pipeline, room: int = ROOM) -> Pipeline:
    """The same model, keeping prompts."""
    return Pipeline(pipeline.model, pipeline.processor, pipeline.generation, prompt_room=room)


def fed(pipeline: Pipeline, ask: Any) -> tuple[Any, list[int]]:
    """What `ask` gives, and how many rows each call of the model is fed."""
    rows, forward = [], pipeline.model.forward

    def watching(*args, **kwargs):
        rows.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    pipeline.model.forward = watching
    try:
        return ask(), rows
    finally:
        del pipeline.model.forward


def turns(pipeline: Pipeline, *said: str) -> list[dict[str, Any]]:
    """A conversation about one picture that opens the first question."""
    roles = ["user", "assistant"] * len(said)
    found: list[dict[str, Any]] = [{"role": r, "content": text} for r, text in zip(roles, said, strict=False)]
    found[0]["content"] = [{"type": "image"}, {"type": "text", "text": said[0]}]
    return found


def length(pipeline: Pipeline, conversation: list[dict[str, Any]], image: Any) -> int:
    return len(pipeline.processor.prompt(conversation, [image]))


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_feeds_what_is_new_and_answers_alike(kind: str, shift: bool) -> None:
    plain = make(kind, image_prefix=True)
    plain.model.config.shift = shift
    pipeline = keeping(plain)
    first = turns(pipeline, "what?")
    pipeline.chat(first, picture(0), **TOKENS)
    second = turns(pipeline, "what?", "that", "and where?")
    whole = length(pipeline, second, picture(0))
    (reply, few), (other, many) = (
        fed(p, lambda p=p: p.chat(second, picture(0), generator=0, **TOKENS)) for p in (pipeline, plain)
    )
    assert reply == other
    prefix = int((pipeline.processor.prompt(second, [picture(0)]).documents < 0).sum())
    assert prefix > 4, "the picture, and what comes before it"
    turn = length(pipeline, first, picture(0))
    if kind == "prefix":
        assert (few[0], many[0]) == (whole - prefix, whole)
        assert pipeline.prompts.hits == prefix
    elif kind == "causal":
        assert (few[0], many[0]) == (whole - turn, whole), "a turn ends where its answer begins"
        assert pipeline.prompts.hits == turn
    else:
        assert few[0] == many[0] - turn // 4 * 4
        assert pipeline.prompts.hits == turn // 4 * 4
    assert few[1:] == many[1:]


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_seeds_compute_no_prompt_row_again(kind: str, shift: bool) -> None:
    plain = on_ids(shift, kind)
    pipeline = keeping(plain)
    settings = {"temperature": 1.0, "max_new_tokens": 8, "block_length": 4}
    ids = [[7, 8, 9, 10, 11, 12, 13, 14, 15]]
    for seed in range(3):
        (mine, few), (theirs, many) = (
            fed(p, lambda p=p, s=seed: p.generate(ids, generator=s, **settings)) for p in (pipeline, plain)
        )
        assert torch.equal(mine.sequences, theirs.sequences)
        assert torch.equal(mine.num_forwards, theirs.num_forwards)
        if seed and kind == "block:4":
            assert (few[0], few[1:]) == (many[0] - 8, many[1:])
        elif seed and kind == "causal" and shift:
            assert (many[0], few) == (9, [1] * 8), "the last row of the prompt says what comes first"
        elif seed:
            assert few == many[1:], "the call that computes the prompt is not made"
    known = 8 if kind == "block:4" else 9  # the ninth shares its block with the answer
    assert (pipeline.prompts.hits, pipeline.prompts.misses) == (2 * known, known)


@pytest.mark.parametrize("static", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"block_length": 4, "max_new_tokens": 12},
        {
            "cfg_scale": 0.5,
            "temperature": 0.7,
            "eos_token_id": [1, 2, 3, 4, 5, 6],
            "block_length": 4,
            "max_new_tokens": 12,
        },
        {"store_calls": True, "prompt_first": True, "threshold": 0.1, "block_length": 4, "max_new_tokens": 12},
    ],
    ids=["greedy", "guided", "storing"],
)
def test_of_a_batch_some_rows_may_be_known(kind: str, options: dict, shift: bool, static: bool, monkeypatch) -> None:
    """Rows that are known whole, up to some place, longer than what is known, and not at all."""
    plain = on_ids(shift, kind)
    pipeline = keeping(plain)
    ids, mask = prompts()
    if static:
        act(monkeypatch)
    pipeline.generate(ids[:2], mask[:2], generator=seeds()[:2], **options)
    ids[2:4, :6], ids[4, :2] = ids[0, :6], ids[0, :2]
    mask[2::2] = 1  # to the middle of the second block, and of the first
    for _ in range(2):
        mine, theirs = (p.generate(ids, mask, generator=seeds(), **options) for p in (pipeline, plain))
        assert torch.equal(mine.sequences, theirs.sequences)
        assert torch.equal(mine.num_forwards, theirs.num_forwards)
    assert pipeline.prompts.hits > 0


class Handed(Workspaces):
    """Buffers that go from request to request, as on a GPU."""

    def take(self, batch: int, size: int, model: Any) -> KVCache:
        for cache in [cache for owner, cache in self._idle if owner == (batch, 64)]:
            cache.clear()
            return cache
        cache = KVCache(64)
        cache.owner = (batch, 64)
        return cache


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_another_request_has_left_hold_what_is_known(kind: str, shift: bool, monkeypatch) -> None:
    plain = on_ids(shift, kind)
    pipeline = keeping(plain)
    pipeline._workspaces = Handed()
    act(monkeypatch)
    for ids in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3]):
        mine, theirs = (p.generate([ids], max_new_tokens=8) for p in (pipeline, plain))
        assert torch.equal(mine.sequences, theirs.sequences)
    assert pipeline.prompts.hits > 0


def test_a_picture_of_the_same_size_is_another_prompt() -> None:
    pipeline = keeping(make("prefix", image_prefix=True))
    asked = turns(pipeline, "what?")
    pipeline.chat(asked, picture(0), **TOKENS)
    _, rows = fed(pipeline, lambda: pipeline.chat(asked, picture(1), **TOKENS))
    assert rows[0] == length(pipeline, asked, picture(1))
    assert pipeline.prompts.hits == 0
    _, rows = fed(pipeline, lambda: pipeline.chat([asked, asked], [picture(1), picture(0)], **TOKENS))
    assert set(rows) == {12}, "wherever in a batch a picture stands"


def test_rows_of_pictures_that_see_each_other_are_known_together() -> None:
    plain = make("prefix", image_prefix=True)
    pipeline = keeping(plain)
    asked = [("what?", [picture(0)]), ("what?", [picture(0), picture(1)]), ("where?", [picture(0), picture(1)])]
    replies = [[p.chat(*request, generator=0, **TOKENS) for request in asked] for p in (pipeline, plain)]
    assert replies[0] == replies[1]
    prompt = pipeline.processor.prompt(*asked[1])
    assert pipeline.prompts.hits == int((prompt.documents < 0).sum()), "of the third alone"


@pytest.mark.parametrize("kind", ["block:4", "causal"])
def test_what_comes_before_another_picture_is_the_same(kind: str) -> None:
    plain = make(kind)
    pipeline = keeping(plain)
    asked = "what, and where, and how many?"
    conversation = [{"role": "user", "content": [{"type": "text", "text": asked}, {"type": "image"}]}]
    replies = [
        [p.chat(conversation, picture(seed), generator=0, **TOKENS) for seed in (0, 1, 0)] for p in (pipeline, plain)
    ]
    assert replies[0] == replies[1]
    known = pipeline.prompts.hits
    rows = length(pipeline, conversation, picture(0))
    assert len(asked) - 4 < known - (rows if kind == "causal" else rows // 4 * 4) < rows - 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model: next(model.backbone.parameters()).detach().mul_(1.5),
        lambda model: model.backbone.load_state_dict({k: v * 1.1 for k, v in model.backbone.state_dict().items()}),
        lambda model: model.to(torch.bfloat16),
    ],
    ids=["in place", "loaded", "another type"],
)
def test_weights_that_have_changed_know_no_prompt(change) -> None:
    plain = on_ids(visibility="prefix")
    pipeline = keeping(plain)
    pipeline.generate([[1, 2, 3]])
    change(pipeline.model)
    assert torch.equal(pipeline.generate([[1, 2, 3]]).sequences, plain.generate([[1, 2, 3]]).sequences)
    assert pipeline.prompts.hits == 0
    pipeline.generate([[1, 2, 3]])
    assert pipeline.prompts.hits == 3
    pipeline.model.train()
    pipeline.generate([[1, 2, 3]])
    assert pipeline.prompts.hits == 3, "in training mode nothing is kept"


def test_what_was_computed_in_another_way_than_it_is_looked_for_is_not_kept() -> None:
    pipeline = keeping(make("block:4"))
    steps = pipeline.stream("what is it?", **TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        next(steps)
    assert pipeline.prompts.bytes == 0
    for _ in range(2):
        next(pipeline.stream("what is it?", **TOKENS))
    assert pipeline.prompts.hits > 0


def test_who_sees_whom_is_part_of_what_is_known() -> None:
    plain = on_ids(visibility="causal")
    pipeline = keeping(plain)
    for kind in ("causal", "prefix", "block:2", "full"):
        for p in (pipeline, plain):
            p.generate([[1, 2, 3, 4]], visibility=kind, max_new_tokens=4)
    assert (pipeline.prompts.hits, pipeline.prompts.misses) == (0, 12), "with full attention there is nothing to know"
    assert pipeline.generate([[1, 2, 3, 4]], use_cache=False) is not None
    assert pipeline.prompts.hits == 0


def test_what_has_not_been_used_for_longest_leaves_first() -> None:
    pipeline = keeping(on_ids(visibility="prefix"))
    pipeline.generate([[1, 2, 3]])
    size = pipeline.prompts.bytes
    assert size >= 3 * 2 * 2 * 32 * 4, "keys and values of two layers"
    pipeline.prompts.room = 2 * size
    for first in (2, 1, 3, 1, 2):  # 3 takes the place of 2
        pipeline.generate([[first, 2, 3]])
        assert pipeline.prompts.bytes <= 2 * size
    assert (pipeline.prompts.hits, pipeline.prompts.misses) == (6, 12)
    pipeline.prompts.clear()
    assert pipeline.prompts.bytes == 0
    pipeline.prompts.room = size - 1
    pipeline.generate([[1, 2, 3]])
    assert pipeline.prompts.bytes == 0, "it is larger than the room"


def test_of_a_causal_conversation_the_last_turn_alone_is_kept() -> None:
    pipeline = keeping(on_ids(visibility="causal"))
    sizes = []
    for turn in (4, 8, 12):
        pipeline.generate([list(range(turn))], max_new_tokens=4)
        sizes.append(pipeline.prompts.bytes / turn)
    assert sizes[0] == sizes[1] == sizes[2]
    assert (pipeline.prompts.hits, pipeline.prompts.misses) == (4 + 8, 12)


def test_without_room_nothing_is_kept() -> None:
    pipeline = keeping(on_ids(visibility="prefix"), 0)
    for _ in range(2):
        pipeline.generate([[1, 2, 3]])
    assert pipeline.prompts.bytes == pipeline.prompts.hits == pipeline.prompts.misses == 0
    with pytest.raises(ValueError, match="prompt_room=-1"):
        ComputedPrompts(-1)


def test_answers_are_ranked_and_holes_filled_behind_a_known_prompt() -> None:
    plain = make("prefix")
    pipeline = keeping(plain)
    pipeline.chat("what?", picture(0), **TOKENS)
    ask: dict[str, Any] = {"num_samples": 4, "generator": 0}
    mine, theirs = (p.rank("what?", ["a", "bc"], picture(0), **ask) for p in (pipeline, plain))
    filled, other = (p.infill("a [MASK:1..2]", "what?", picture(0), **ask) for p in (pipeline, plain))
    assert [(one.text, one.log_prob) for one in mine] == [(one.text, pytest.approx(one.log_prob)) for one in theirs]
    assert (filled.text, filled.num_forwards) == (other.text, other.num_forwards)
    assert pipeline.prompts.hits > 0


def image_batch(slots: list[int], **how: Any) -> Batch:
    """One row of such image slots, of four tiles of two rows each, or of four rows of native size."""
    row = torch.tensor([slots])
    tiles = torch.randint(0, 256, (4, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    zero = torch.zeros_like(row)
    positions = torch.arange(len(slots))[None]
    return Batch(
        input_ids=zero + 5,
        labels=zero,
        image_slots=row,
        documents=zero,
        positions=positions,
        **{"pixel_values": tiles, **how},
    )


def differing(one: Batch, other: Batch, rows_per_tile: int) -> list[int]:
    """The places in which the two hold something else."""
    mine, theirs = (contents_of(batch, rows_per_tile)[0] for batch in (one, other))
    return (mine != theirs).any(1).nonzero()[0].tolist()


@pytest.mark.parametrize("tile", range(4))
def test_a_tile_that_differs_is_in_its_own_rows_those_of_its_map_or_of_its_picture(tile: int) -> None:
    slots = [TEXT, 0, 1, ROW_BREAK, 2, 3, 4, 5, 6, 7, TEXT]
    given = image_batch(slots)
    assert given.pixel_values is not None
    pixels = given.pixel_values.clone()
    pixels[tile] += 1
    own = [i for i, slot in enumerate(slots) if slot >= 0 and slot // 2 == tile]
    assert differing(given, replace(given, pixel_values=pixels), 2) == own
    resize = torch.tensor([[1, 1, 2, 0, 2, 0, 2, 1, 1]])  # tiles 1 and 2
    of_map = [i for i, slot in enumerate(slots) if slot >= 0 and slot // 2 in ([1, 2] if tile in (1, 2) else [tile])]
    mapped = image_batch(slots, image_resizes=resize)
    assert differing(mapped, replace(mapped, pixel_values=pixels), 2) == of_map
    assert differing(mapped, replace(mapped, image_resizes=resize + (torch.arange(9) == 8)), 2) == [4, 5, 6, 7]
    native = image_batch([TEXT, 0, 1, 2, 3], image_grids=torch.tensor([[1, 1, 1], [1, 1, 3]]))
    assert differing(native, replace(native, pixel_values=pixels), 1) == ([1] if tile == 0 else [2, 3, 4])
    turned = replace(native, image_grids=torch.tensor([[1, 1, 1], [1, 3, 1]]))
    assert differing(native, turned, 1) == [2, 3, 4]


def test_what_stands_in_a_place_is_the_same_wherever_its_picture_is_in_a_batch() -> None:
    given = image_batch([TEXT, 2, 3, 4, 5])
    assert given.pixel_values is not None
    alone = replace(given, pixel_values=given.pixel_values[1:3], image_slots=torch.tensor([[TEXT, 0, 1, 2, 3]]))
    assert differing(given, alone, 2) == []
    assert differing(given, replace(given, image_slots=torch.tensor([[TEXT, 2, 3, 5, 4]])), 2) == [3, 4]
    assert differing(given, replace(given, positions=given.positions + torch.tensor([0, 0, 0, 0, 1])), 2) == [4]
    assert differing(given, replace(given, documents=given.documents - torch.tensor([1, 0, 0, 0, 0])), 2) == [0]
    assert differing(given, replace(given, input_ids=given.input_ids + 1), 2) == [0], "an image's ids are not read"
