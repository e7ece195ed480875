"""LLaDA-UI: transformers' own tower in front of LLaDA2's experts, whose logits are verified in test_llada2."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dmllm.checkpoints.example import write_example
from dmllm.families.llada2 import LLADA2
from dmllm.pipeline import load

LIMITS = {"min_pixels": 784, "max_pixels": 7840}
PICTURE = 261
VISION = "model.visual."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_example("llada_ui", tmp_path_factory.mktemp("ui") / "out")


@pytest.fixture(scope="module")
def pipe(folder):
    return load(str(folder), device="cpu", config=LIMITS)


def picture(width: int, height: int) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(width))
    return Image.fromarray(values.to(torch.uint8).numpy())


@torch.no_grad()
def test_a_picture_is_the_rows_of_transformers_tower_and_counts_as_that_many_tokens(pipe, folder, tmp_path) -> None:
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tower = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**config["vision_config"])).eval()
    tower.load_state_dict({k.removeprefix(VISION): v for k, v in weights.items() if k.startswith(VISION)})
    images = [picture(84, 56), picture(30, 60)]
    given = Qwen2VLImageProcessorPil(**LIMITS)(images, return_tensors="pt")
    rows = tower(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
    sizes = (given["image_grid_thw"].prod(1) // 4).tolist()
    ids = torch.tensor([[5, 6] + [PICTURE] * sizes[0] + [7] + [PICTURE] * sizes[1] + list(range(8, 40))])

    text = {k.replace("model.language_model.", "model."): v for k, v in weights.items() if not k.startswith(VISION)}
    save_file(text, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config["text_config"], "model_type": "llada2_moe"}))
    alone = load(str(tmp_path), device="cpu").model
    assert alone.config.family == LLADA2.name
    stream = alone.embed(ids).masked_scatter((ids == PICTURE)[..., None], rows)
    assert torch.allclose(pipe.logits(ids, images=images), alone(inputs_embeds=stream).logits, atol=1e-5)


def test_a_batch_is_answered_as_each_alone_block_after_block(pipe) -> None:
    rows, images = [[1, 2, PICTURE, 3, 4], [7, 8, 9]], [[picture(84, 56)], []]
    ids = torch.tensor([rows[0], [0, 0, *rows[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    options = {"max_new_tokens": 40, "eos_token_id": []}
    together = pipe.generate(ids, mask, images, **options)
    for number, (row, own) in enumerate(zip(rows, images, strict=True)):
        alone = pipe.generate(torch.tensor([row]), images=own or None, **options)
        assert torch.equal(together.sequences[number, -40:], alone.sequences[0, -40:])
        assert together.num_forwards[number] == alone.num_forwards[0]


def test_the_prompt_is_the_one_of_its_training(pipe) -> None:
    content = [{"type": "text", "text": "Where?\n"}, {"type": "image", "image": picture(56, 56)}]
    text = pipe.processor.chat.render([{"role": "user", "content": content}], True)
    shown = pipe.processor.tokens.image_text
    assert text.replace(shown, "@").replace("<|vision_start|><|image_pad|><|vision_end|>", "@") == (
        "<role>SYSTEM</role>You are a helpful assistant.\n<role>HUMAN</role>Where?\n@<|role_end|><role>ASSISTANT</role>"
    )


def test_the_vocabulary_projection_may_stand_inside_and_what_lacks_is_named(folder, tmp_path) -> None:
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({k.replace("lm_head", "model.lm_head"): v for k, v in weights.items()}, tmp_path / "model.safetensors")
    assert torch.equal(load(str(tmp_path), device="cpu").model.backbone.lm_head.weight, weights["lm_head.weight"])
    del weights["model.visual.merger.mlp.0.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.visual\.merger\.mlp\.0\.bias"):
        load(str(tmp_path), device="cpu")


def test_rotary_positions_that_its_code_does_not_have_are_refused(folder, tmp_path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_scaling"] = {"type": "yarn", "factor": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="rope_scaling='yarn'"):
        load(str(tmp_path), device="cpu")
