"""Encoded pictures are kept by what they depend on, within a bound, and change no answer."""

from __future__ import annotations

import pytest
import torch

from dmllm.encoded import EncodedImages
from dmllm.pipeline import Pipeline
from tests.test_pipeline import TOKENS, make, picture

ROW = 32 * 4  # bytes of a row of features


@pytest.fixture
def pipeline() -> Pipeline:
    return make("prefix")


def counted(pipeline: Pipeline) -> list[int]:
    """How many tiles each call of the encoder is given from now on."""
    sizes, encode = [], pipeline.model.encode_images

    def counting(pixels, *args, **kwargs):
        sizes.append(len(pixels))
        return encode(pixels, *args, **kwargs)

    pipeline.model.encode_images = counting
    return sizes


def test_a_picture_is_encoded_once_for_all_calls_and_turns(pipeline: Pipeline) -> None:
    sizes = counted(pipeline)
    first = pipeline.chat("what?", picture(0), **TOKENS)
    assert pipeline.chat("what?", picture(0), **TOKENS) == first
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and now?"}]
    pipeline.chat(turns, picture(0), **TOKENS)
    pipeline.infill("a [MASK:1..2]", "what?", picture(0), num_samples=2)
    pipeline.rank("what?", ["a", "b"], picture(0), num_samples=2)
    pipeline.logits([[3, pipeline.special.image]], images=[picture(0)])
    pipeline.score([[3, pipeline.special.image]], [[4]], images=[picture(0)], num_samples=2)
    assert sizes == [1]
    assert (pipeline.images.misses, pipeline.images.hits) == (1, 8)
    pipeline.chat(["a", "b"], [picture(1), [picture(0), picture(2)]], **TOKENS)
    assert sizes == [1, 2], "of three pictures one is known"


def test_answers_are_those_of_a_pipeline_that_keeps_nothing(pipeline: Pipeline) -> None:
    forgetful = Pipeline(pipeline.model, pipeline.processor, image_room=0)
    sizes = counted(pipeline)
    asked = ["what?", "and now?"], [[picture(0), picture(1)], picture(0)]
    for _ in range(2):
        assert pipeline.chat(*asked, **TOKENS) == forgetful.chat(*asked, **TOKENS)
    assert sizes == [2, 2, 2]
    assert forgetful.images.bytes == forgetful.images.hits == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.projector.load_state_dict({k: v + 1 for k, v in model.projector.state_dict().items()}),
        lambda model: next(model.vision.parameters()).detach().mul_(1.5),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(lambda: model(torch.tensor([[1]])).logits.sum()),
        lambda model: model.to(torch.bfloat16),
    ],
    ids=["loaded", "in place", "a step", "another type"],
)
def test_weights_that_have_changed_know_no_picture(pipeline: Pipeline, change) -> None:
    pipeline.chat("what?", picture(0), **TOKENS)
    for parameter in pipeline.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    change(pipeline.model)
    sizes = counted(pipeline)
    pipeline.chat("what?", picture(0), **TOKENS)
    pipeline.chat("what?", picture(0), **TOKENS)
    assert sizes == [1]
    pipeline.model.train()
    pipeline.chat("what?", picture(0), **TOKENS)
    assert sizes == [1, 1], "in training mode nothing is kept"


def test_what_has_not_been_used_for_longest_leaves_first(pipeline: Pipeline) -> None:
    rows = pipeline.processor.rows_per_tile
    pipeline.images.room = 2 * rows * ROW
    sizes = counted(pipeline)
    for seed in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1
        pipeline.chat("what?", picture(seed), **TOKENS)
    assert sizes == [1, 1, 1, 1]
    assert pipeline.images.bytes == 2 * rows * ROW
    pipeline.images.clear()
    assert pipeline.images.bytes == 0
    pipeline.images.room = rows * ROW - 1
    pipeline.chat("what?", picture(0), **TOKENS)
    assert pipeline.images.bytes == 0, "it is larger than the room"
    with pytest.raises(ValueError, match="image_room=-1"):
        EncodedImages(-1)
