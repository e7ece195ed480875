"""SDAR-VL as recorded, and against transformers' LLaVA-OneVision, whose frame it has: pictures, logits, both ways."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from dmllm.checkpoints.published import write_published
from dmllm.data.images import cut_tiles
from dmllm.families import family_of
from dmllm.families.sdar_vl import SDAR_VL
from dmllm.pipeline import load
from dmllm.tiling import plan
from tests.families.recorded import Recorded, assert_written_back

CONFIG = {**SDAR_VL.example, "pad_token_id": 258}
IMAGE = CONFIG["image_token_index"]
RECORDED = Recorded("sdar_vl")
CASES = json.loads((RECORDED.folder / "cases.json").read_text())
"""Prompts drawn at random, for which noise of 3e-4 on the logits changes neither tokens nor calls."""
PICTURES = {name: str(RECORDED.folder / f"{name}.png") for name in ("square", "wide", "tall", "large")}
SIZES = [(56, 56), (100, 60), (60, 130), (168, 168), (200, 40)]


@pytest.fixture(scope="module")
def theirs() -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    text = {**CONFIG["text_config"], "model_type": "qwen3"}
    config = LlavaOnevisionConfig(**{**CONFIG, "text_config": text, "model_type": "llava_onevision"})
    config._attn_implementation = "eager"
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 / parameter.shape[-1] ** 0.5 + 0.05)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdar_vl")
    weights = {
        re.sub(r"^model\.vision_tower\.(?!vision_model)", "model.vision_tower.vision_model.", name): tensor.clone()
        for name, tensor in theirs.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return load(str(folder), device="cpu")


def picture(size: tuple[int, int]) -> Image.Image:
    torch.manual_seed(size[0] * 1000 + size[1])
    small = Image.fromarray(torch.randint(0, 256, (5, 4, 3), dtype=torch.uint8).numpy())
    return small.resize(size, Image.Resampling.BICUBIC)


def tiles_of(pipe, image):
    """Our tiles, as transformers takes them."""
    scheme = plan(image.width, image.height, pipe.tiling)
    return scheme, pipe.model.vision.normalise(cut_tiles(image, scheme, pipe.tiling))


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_rows_of_a_picture_are_those_that_llava_onevision_packs(theirs, pipe, size):
    image = picture(size)
    _, pixels = tiles_of(pipe, image)
    found = theirs.model.get_image_features(
        pixels[None],
        torch.tensor([[image.height, image.width]]),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    packed = getattr(found, "pooler_output", found)
    packed = torch.cat(list(packed)) if not isinstance(packed, torch.Tensor) else packed.flatten(0, -2)
    ids = torch.tensor([[5, IMAGE, 7]])
    example = pipe._asked(ids, None, [[image]])[1][0].example
    assert len(example) == len(packed) + 2


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_logits_are_llava_onevisions_under_causal_visibility(theirs, pipe, size):
    image = picture(size)
    _, pixels = tiles_of(pipe, image)
    ids = torch.tensor([[5, 9, IMAGE, 7, 11, 3]])
    rows = len(pipe._asked(ids, None, [[image]])[1][0].example) - 5
    long = torch.tensor([[5, 9, *[IMAGE] * rows, 7, 11, 3]])
    wanted = theirs(
        input_ids=long,
        pixel_values=pixels[None],
        image_sizes=torch.tensor([[image.height, image.width]]),
        vision_aspect_ratio="anyres_max_9",
    ).logits
    found = pipe.logits(long, images=[[image]], visibility="causal")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_answers_of_a_batch_are_those_of_each_request_alone(pipe):
    ids = torch.tensor([[5, IMAGE, 7, 9], [258, 5, IMAGE, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    images = [[picture(SIZES[1])], [picture(SIZES[3])]]
    decode = {"max_new_tokens": 12, "eos_token_id": [], "threshold": 0.2}
    both = pipe.generate(ids, mask, images, **decode)
    for row in range(2):
        alone = pipe.generate(ids[row : row + 1][:, mask[row].bool()], None, images[row], **decode)
        assert both.sequences[row, 4:].tolist() == alone.sequences[0, -12:].tolist()
        assert both.num_forwards[row] == alone.num_forwards[0]


def test_it_is_written_back_to_the_bit(pipe, folder, tmp_path):
    write_published(pipe.model, tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert family_of(json.loads((tmp_path / "config.json").read_text())) is SDAR_VL


def test_another_layer_of_the_tower_is_refused_by_name(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vision_feature_layer": -2}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="vision_feature_layer=-2"):
        load(str(tmp_path))


def test_sizes_to_choose_from_are_heights_and_widths(folder):
    wide = load(str(folder), device="cpu", config={"image_grid_pinpoints": [[56, 112]]})
    assert wide.tiling is not None
    assert [tuple(size) for size in wide.tiling.pinpoints] == [(56, 112)]


@pytest.fixture(scope="module")
def recorded():
    return RECORDED.load()


def cut(pipe, name: str):
    """The tiles of a recorded picture, and how they lie."""
    image = Image.open(PICTURES[name])
    scheme = plan(image.width, image.height, pipe.tiling)
    return cut_tiles(image, scheme, pipe.tiling), scheme


@pytest.mark.parametrize("name", list(PICTURES))
def test_pixels_are_those_of_the_authors_processor(recorded, name):
    assert torch.equal(cut(recorded, name)[0], RECORDED.expected[f"{name}.tiles"])


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_pixels_are_those_of_a_processor_that_is_not_fast_where_none_is_named(tmp_path, name):
    slow = RECORDED.changed(tmp_path)
    assert torch.equal(cut(slow, name)[0], RECORDED.expected[f"{name}.tiles_by_pillow"])


@pytest.mark.parametrize("name", ["text", *PICTURES])
def test_logits_are_the_authors_in_blocks(recorded, name):
    ids = RECORDED.inputs[name]
    found = recorded.logits(ids, images=[[PICTURES[name]] if name in PICTURES else []])
    torch.testing.assert_close(
        found[:, ids[0] != recorded.special.image], RECORDED.expected[f"{name}.logits"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", list(PICTURES))
def test_features_are_the_authors(recorded, name):
    tiles, scheme = cut(recorded, name)
    rows = recorded.model.encode_images(tiles)
    packed = RECORDED.expected[f"{name}.features"]
    side = recorded.model.image_grid[0] * recorded.model.image_grid[1]
    torch.testing.assert_close(rows[:side], packed[:side], atol=1e-4, rtol=0)
    assert len(scheme.slots) == len(packed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['image']}, {case['params']}")
def test_greedy_decoding_makes_the_authors_calls_and_finds_their_tokens(recorded, case):
    """With pictures in whole blocks, as generate.py needs them; a reply ends behind the block of its stop."""
    params, theirs = case["params"], case["tokens"]
    strategy, block = params["remasking_strategy"], params["block_length"]
    stops = params.get("stopping_criteria_idx", [])
    out = recorded.generate(
        [case["prompt"]],
        images=[[PICTURES[case["image"]]] if case["image"] else []],
        max_new_tokens=len(theirs),
        block_length=block,
        block_steps=params["denoising_steps"],
        visibility=f"block:{block}",
        remasking="sequential" if strategy == "sequential" else "low_confidence",
        threshold=params["confidence_threshold"] if strategy.endswith("dynamic") else None,
        eos_token_id=stops,
    )
    ends = min([theirs.index(stop) + 1 for stop in stops if stop in theirs], default=len(theirs))
    assert out.sequences[0, len(case["prompt"]) :][:ends].tolist() == theirs[:ends]
    assert int(out.num_forwards) == case["nfe"]


def test_the_recorded_checkpoint_is_written_back_with_its_processor(recorded, tmp_path):
    assert_written_back(recorded, RECORDED, tmp_path)
    there, back = (
        json.loads((folder / "preprocessor_config.json").read_text()) for folder in (RECORDED.folder, tmp_path)
    )
    assert there == back
