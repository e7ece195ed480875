"""Qwen2.5-VL as a start: transformers' model, saved and loaded, has its logits, each at the token that it scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dmllm.pipeline import load

LIMITS = {"min_pixels": 64, "max_pixels": 2000}
PICTURE = 110


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def theirs(request):
    torch.manual_seed(0)
    text = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 113,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": request.param,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    ids = {"image_token_id": PICTURE, "vision_start_token_id": 111, "vision_end_token_id": 112, "pad_token_id": 113}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, mask_token_id=119, tie_word_embeddings=request.param, **ids
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@torch.no_grad()
def logits_of(theirs, ids: torch.Tensor, picture: Image.Image) -> torch.Tensor:
    given = Qwen2VLImageProcessorPil(patch_size=4, **LIMITS)(picture, return_tensors="pt")
    found = theirs(input_ids=ids, mm_token_type_ids=(ids == PICTURE).int(), **given).logits
    return torch.cat([found[:, :1], found[:, :-1]], 1)  # the row before scores a token


@pytest.mark.parametrize("layout", ["as transformers writes it", "as on the hub"])
def test_logits_are_those_of_transformers(theirs, tmp_path, layout) -> None:
    theirs.save_pretrained(tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    if layout == "as on the hub":
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        config["model_type"] = "qwen2_5_vl"
        flat = {
            k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
            for k, v in weights.items()
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(flat, tmp_path / "model.safetensors")
    pipe = load(str(tmp_path), device="cpu", config=LIMITS)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    ids = torch.tensor([[1, 111] + [PICTURE] * 6 + [112, 6, 7, 8]])
    assert torch.allclose(pipe.logits(ids, images=[picture]), logits_of(theirs, ids, picture), atol=1e-4)


def test_it_decodes_what_transformers_takes_greedily(theirs, tmp_path) -> None:
    theirs.save_pretrained(tmp_path)
    pipe = load(str(tmp_path), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, theirs(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    found = pipe.generate(ids[:, :3], max_new_tokens=5, eos_token_id=[])
    assert torch.equal(found.sequences, ids)
