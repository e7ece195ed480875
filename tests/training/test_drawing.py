"""From a recipe to pictures: a model that gets a place for codes, learns to draw beside answering, and draws."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dmllm.checkpoints.compose import compose
from dmllm.checkpoints.image_tokenizer import save_image_tokenizer
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.models.image_tokenizers import build_image_tokenizer
from dmllm.pipeline import load
from dmllm.training import train
from dmllm.training.config import ObjectiveConfig, OptimiserConfig, SamplesConfig, ValidationConfig
from dmllm.types import IGNORE, Record
from tests.training.test_loop import lines


@pytest.fixture
def drawn(tmp_path):
    """A tokenizer of pictures, and records that ask for two pictures."""
    torch.manual_seed(0)
    codes = build_image_tokenizer("fsq", {"levels": (4, 4), "channels": (8, 8), "patch": 2, "depth": 0})
    for parameter in codes.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    save_image_tokenizer(codes, tmp_path / "codes")
    rows = []
    for seed, name in enumerate(("red", "blue")):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        question = {"role": "user", "content": [{"type": "text", "text": name}]}
        answer = {"role": "assistant", "content": [{"type": "image", "image": f"{name}.png"}]}
        rows.append({"messages": [question, answer]})
    (tmp_path / "drawn.json").write_text(json.dumps(rows))
    return tmp_path


def drawing_recipe(recipe, drawn, *, mixed: bool, **overrides):
    overrides = {"validation": None, **overrides}
    config = recipe(with_vision=mixed, objective=ObjectiveConfig(name="unified"), **overrides)
    source = DataSource(json_path=str(drawn / "drawn.json"), image_folder=str(drawn))
    sources = (*config.data.datasets, source) if mixed else (source,)
    drawing = {"image_tokenizer": str(drawn / "codes"), "size": 8, "caption_dropout": 0.2}
    return replace(config, data=DataConfig(datasets=sources), model=replace(config.model, drawing=drawing))


def test_a_model_learns_pictures_beside_answers_and_draws_from_its_folder(recipe, drawn):
    samples = SamplesConfig(every=6, num_examples=4, decode={"max_new_tokens": 4})
    config = drawing_recipe(recipe, drawn, mixed=True, steps=6, batch_size=8)
    config = replace(config, samples=samples, validation=ValidationConfig(data=config.data, num_examples=6, every=3))
    result = train(config)
    last = lines(result, "loss")[-1]
    assert math.isfinite(last["loss"])
    pipeline = load(str(result.model), device="cpu")
    images = pipeline.model.config.images
    assert images.offset + images.size <= pipeline.model.config.backbone["vocab_size"]
    assert pipeline.imagine("red", generator=1)[0].size == (8, 8)
    reply = pipeline.chat("colour?", str(next(drawn.glob("*.png"))), max_new_tokens=4, generator=1)
    assert reply.num_forwards >= 1
    again = train(replace(config, model=replace(config.model, backbone=None, checkpoint=str(result.model), vision=None,
        tokenizer=None), output_dir=str(drawn / "again"), steps=2))  # fmt: skip
    assert load(str(again.model), device="cpu").model.config.images == images


def test_what_is_learned_is_drawn_from_its_name(recipe, drawn):
    config = drawing_recipe(
        recipe, drawn, mixed=False, steps=150, batch_size=16, optimiser=OptimiserConfig(lr=1e-2), save_every=1000
    )
    pipeline = load(str(train(config).model), device="cpu")
    for name in ("red", "blue"):
        pixels = torch.from_numpy(np.array(Image.open(drawn / f"{name}.png"))).permute(2, 0, 1)[None]
        known = pipeline.image_tokenizer.decode(pipeline.image_tokenizer.encode(pixels))[0].permute(1, 2, 0)
        drawing = pipeline.imagine(name, generator=1, temperature=0.0, order_temperature=0.0, steps=4)[0]
        assert np.array_equal(np.asarray(drawing), known.numpy())


def test_rows_are_the_prompt_that_is_asked_with_and_labelled_codes(recipe, drawn):
    config = drawing_recipe(recipe, drawn, mixed=False)
    model, processor = compose(config.model)
    images, path = model.config.images, str(drawn / "red.png")

    def example(parts, seed=0, answer=None):
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer or [picture]}]
        record = Record(messages=messages, source="drawn", location="drawn.json: record 0")
        return processor.example(record, generator=torch.Generator().manual_seed(seed))

    picture = {"type": "image", "image": path}
    codes = processor.codes(path)
    text = {"type": "text", "text": "red"}
    plain, empty = images.drawing(processor.tokens.encode("red")[0].tolist()), images.drawing([])
    found = [example([text], seed) for seed in range(60)]
    assert {tuple(one.input_ids.tolist()) for one in found} == {
        (*opening, *images.picture(codes)[1:].tolist()) for opening in (plain, empty)
    }
    for one in found[:3]:
        labelled = one.labels != IGNORE
        assert torch.equal(one.labels[labelled] - images.offset, codes.flatten())
    seen, drawn_codes = images.picture(codes).tolist(), images.picture(codes)[1:].tolist()
    edits = {tuple(example([picture, text], seed).input_ids.tolist()) for seed in range(60)}
    assert edits == {(*seen, *opening, *drawn_codes) for opening in (plain, empty)}
    with pytest.raises(ValueError, match=r"record 0: a picture is the whole answer"):
        example([text], answer=[text, picture])


def test_a_tokenizer_of_other_codes_and_a_size_between_codes_are_refused(recipe, drawn):
    config = drawing_recipe(recipe, drawn, mixed=False)
    with pytest.raises(ValueError, match=r"size=10x10 must be in codes of 4 pixels"):
        compose(replace(config.model, drawing={**config.model.drawing, "size": 10}))
    with pytest.raises(ValueError, match=r"Unknown key 'sise' in model.drawing"):
        compose(replace(config.model, drawing={**config.model.drawing, "sise": 8}))
