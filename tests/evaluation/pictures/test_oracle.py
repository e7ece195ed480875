"""The oracle reads what was painted; a prompt holds of a picture exactly if its words are true of it."""

import numpy as np
import pytest

from dmllm.data.builtin import drawing, scenes
from dmllm.data.builtin.picture import keyed_generator
from dmllm.evaluation.pictures.oracle import Seen, read
from dmllm.evaluation.pictures.prompts import KINDS, RELATIONS, Prompt, draw_prompt, draw_prompts

OPTIONS = scenes.SceneOptions(reading=0.0)


def painted(index: int, size: int):
    picture = scenes.compose(keyed_generator("scenes", "val", 7, index), "val", size, OPTIONS)
    return picture.paint(), picture.truth["objects"]


@pytest.mark.parametrize("size", [64, 96])
def test_what_was_painted_is_read(size: int) -> None:
    """At least 99 of 100 pictures whole: every object, its shape, colour and size; and nothing else."""
    right = 0
    for index in range(100):
        pixels, objects = painted(index, size)
        seen = read(pixels)
        right += [(o.shape, o.color, o.size) for o in seen] == [(o["shape"], o["color"], o["size"]) for o in objects]
        for one, true in zip(seen, objects, strict=False):
            assert np.hypot(one.x - true["center"][0], one.y - true["center"][1]) < 1.5
    assert right >= 0.99 * 100


def test_an_empty_picture_shows_nothing_and_a_smear_no_shape() -> None:
    empty = np.full((64, 64, 3), 60, np.uint8)
    assert read(empty) == []
    smear = empty.copy()
    smear[30:34, 5:60] = scenes.INKS["red"]
    assert [(one.shape, one.color) for one in read(smear)] == [(None, "red")]
    speck = empty.copy()
    speck[10:13, 10:13] = scenes.INKS["red"]
    assert read(speck) == []
    with pytest.raises(ValueError, match="convert"):
        read(np.zeros((64, 64), np.uint8))


def test_blurred_and_noisy_pictures_are_still_read() -> None:
    """As a picture that went through a tokenizer is."""
    rng = np.random.default_rng(0)
    right = total = 0
    for index in range(60):
        pixels, objects = painted(index, 64)
        soft = pixels.astype(np.float32)
        soft = (2 * soft + np.roll(soft, 1, 0) + np.roll(soft, 1, 1)) / 4 + rng.normal(0, 8, soft.shape)
        seen = [(o.shape, o.color) for o in read(soft.clip(0, 255).astype(np.uint8))]
        total += len(objects)
        right += sum((o["shape"], o["color"]) in seen for o in objects)
    assert right >= 0.9 * total


def seen(shape: str | None, color: str = "red", x: float = 10, y: float = 10) -> Seen:
    return Seen(shape=shape, color=color, size="small", x=x, y=y, diameter=12, fit=1.0)


def test_prompts_hold_of_what_they_say_and_of_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for _ in range(20):
            prompt = draw_prompt(rng, kind)
            wanted = [seen(shape, color or "white") for shape, color in prompt.things] * (
                prompt.number if kind == "counting" else 1
            )
            if prompt.relation:
                x, y = RELATIONS[prompt.relation]
                wanted[1:] = [seen(prompt.things[1][0], x=10 - 30 * x, y=10 - 30 * y)]
                flipped = [seen(prompt.things[0][0], x=10 - 30 * x, y=10 - 30 * y), seen(prompt.things[1][0])]
                assert not prompt.holds(flipped, 64)
                assert not prompt.holds([seen(prompt.things[0][0]), seen(prompt.things[1][0])], 64)
            assert prompt.holds(wanted, 64)
            assert not prompt.holds(wanted[1:], 64)
            assert not prompt.holds([seen(None, one.color) for one in wanted], 64)
            more = [*wanted, seen(prompt.things[0][0])]
            assert prompt.holds(more, 64) == (kind != "counting")
            if prompt.things[0][1]:
                assert not prompt.holds(
                    [seen(shape, "white" if color == "red" else "red") for shape, color in prompt.things], 64
                )


def test_prompts_are_the_same_on_every_machine_and_say_no_shape_twice() -> None:
    prompts = draw_prompts(30, seed=3)
    assert prompts == draw_prompts(30, seed=3)
    assert [prompts.count(prompt) for prompt in prompts] != [30] * len(prompts)
    assert all(len({shape for shape, _ in prompt.things}) == len(prompt.things) for prompt in prompts)
    assert Prompt(kind="colors", text="an orange star", things=(("star", "orange"),)) in draw_prompts(200)
    with pytest.raises(ValueError, match="single_object"):
        draw_prompt(np.random.default_rng(0), "colour")


def test_every_shape_fits_itself_best() -> None:
    for shape in ("circle", *drawing.POLYGONS):
        canvas = np.full((64, 64, 3), 50, np.float32)
        drawing.blend(
            canvas, drawing.shape_mask(shape, 13, 0.25, 0.5), 20, 30, np.asarray(scenes.INKS["cyan"], np.float32)
        )
        (one,) = read(drawing.finish(canvas))
        assert (one.shape, one.color, one.size) == (shape, "cyan", "small")
        assert one.fit > 0.85
