"""Qwen3-VL as a start: transformers' model, saved and loaded, has its logits, each at the token that it scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dmllm.checkpoints.convert import convert
from dmllm.pipeline import load

LIMITS = {"min_pixels": 64, "max_pixels": 2000}
PICTURE, START, END, PAD = 110, 111, 112, 113
HALF = [0.5, 0.5, 0.5]
TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "eos_token_id": PAD,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}
KINDS = {
    "untied": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, {}, False),
    "tied": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, {}, True),
    "experts": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, EXPERTS, False),
}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, tmp_path_factory):
    """transformers' model and ours, from its folder."""
    torch.manual_seed(0)
    config, model, more, tied = KINDS[request.param]
    ids = {"image_token_id": PICTURE, "vision_start_token_id": START, "vision_end_token_id": END}
    theirs = model(
        config(
            text_config={**TEXT, **more, "tie_word_embeddings": tied},
            vision_config=VISION,
            tie_word_embeddings=tied,
            mask_token_id=119,
            **ids,
        )
    ).eval()
    for parameter in theirs.parameters():  # biases and norms start at 0 and 1: make each tell
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    folder = tmp_path_factory.mktemp("qwen3_vl") / "there"
    theirs.save_pretrained(folder)
    return theirs, load(str(folder), device="cpu", config={**LIMITS, "image_mean": HALF, "image_std": HALF}), folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


REQUESTS = [
    ([1, 2, 3, 4, 5], []),
    ([1, START, PICTURE, END, 6, 7, 9], [picture(24, 16)]),
    ([START, PICTURE, END, 8, START, PICTURE, END, 9], [picture(8, 40, seed=1), picture(61, 50, seed=2)]),
]


def given_to_theirs(rows: list[tuple[list[int], list[Image.Image]]]) -> dict[str, torch.Tensor]:
    """Requests as transformers' processor makes them: image tokens expanded, padding on the right."""
    processor = Qwen2VLImageProcessorPil(patch_size=4, image_mean=HALF, image_std=HALF, **LIMITS)
    pictures = [p for _, own in rows for p in own]
    given = dict(processor(pictures, return_tensors="pt")) if pictures else {}
    supply = iter((given["image_grid_thw"].prod(1) // 4).tolist()) if pictures else iter(())
    expanded = [[t for i in ids for t in ([i] * next(supply) if i == PICTURE else [i])] for ids, _ in rows]
    longest = max(map(len, expanded))
    given["input_ids"] = torch.tensor([row + [PAD] * (longest - len(row)) for row in expanded])
    given["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in expanded])
    return given | {"mm_token_type_ids": (given["input_ids"] == PICTURE).int()}


@torch.no_grad()
def logits_of(theirs, given) -> torch.Tensor:
    found = theirs(**given).logits
    return torch.cat([found[:, :1], found[:, :-1]], 1)  # the row before scores a token


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=["text", "a picture", "two pictures"])
def test_logits_are_those_of_transformers(pair, number) -> None:
    theirs, pipe, _ = pair
    ids, pictures = REQUESTS[number]
    given = given_to_theirs([(ids, pictures)])
    expected = logits_of(theirs, given)
    ours = pipe.logits(given["input_ids"], images=pictures or None)
    assert expected.std() > 0.5
    assert torch.allclose(ours, expected, atol=1e-4), (ours - expected).abs().max()


def test_padded_batches_have_the_same_logits(pair) -> None:
    theirs, pipe, _ = pair
    given = given_to_theirs(REQUESTS)
    real = given["attention_mask"].bool()
    expected = logits_of(theirs, given)
    ours = pipe.logits(given["input_ids"], real, images=[pictures for _, pictures in REQUESTS])
    assert torch.allclose(ours[real], expected[real], atol=1e-4), (ours[real] - expected[real]).abs().max()
    flipped = [given["input_ids"].flip(1), real.flip(1)]  # padding on the left: the same rows further on
    ids = torch.full_like(flipped[0], PAD)
    for row, kept in enumerate(real):
        ids[row, ~kept.flip(0)] = PAD
        ids[row, kept.flip(0)] = given["input_ids"][row, kept]
    ours = pipe.logits(ids, flipped[1], images=[pictures for _, pictures in REQUESTS])
    for row, kept in enumerate(real):
        assert torch.allclose(ours[row, kept.flip(0)], expected[row, kept], atol=1e-4)


def test_what_several_layers_of_the_tower_say_reaches_the_first_layers_behind(pair) -> None:
    """Without it the logits behind a picture are others, and those before it are not."""
    _, pipe, _ = pair
    ids, pictures = REQUESTS[1]
    whole = pipe.logits(torch.tensor([ids]), images=pictures)
    vision = pipe.model.vision
    assert pipe.model.stream_width == 32 * (1 + vision.deepstack) == 96
    forward = vision.features
    vision.features = lambda *given: forward(*given) * (torch.arange(96) < 32)
    pipe.images.clear()
    try:
        alone = pipe.logits(torch.tensor([ids]), images=pictures)
    finally:
        del vision.features
        pipe.images.clear()
    changed = (whole - alone).abs().amax(-1)[0] > 1e-3
    assert changed.tolist() == [False, False, False, True, True, True, True]


def test_it_decodes_what_transformers_takes_greedily(pair) -> None:
    theirs, pipe, _ = pair
    ids, pictures = REQUESTS[1]
    given = given_to_theirs([(ids, pictures)])
    with torch.no_grad():
        expected = theirs.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    found = pipe.generate(torch.tensor([ids]), images=pictures, max_new_tokens=6, eos_token_id=[])
    assert found.sequences[0, -6:].tolist() == expected[0, -6:].tolist()


@pytest.mark.parametrize("visibility", ["full", "block:4", "prefix"])
def test_as_a_denoiser_a_request_gives_the_same_alone_in_a_batch_and_uncached(pair, visibility) -> None:
    _, pipe, _ = pair
    options = {"max_new_tokens": 8, "eos_token_id": [], "visibility": visibility, "block_length": 4}
    asked = [(torch.tensor([ids]), pictures) for ids, pictures in REQUESTS]
    alone = [
        pipe.generate(ids, images=pictures or None, **options).sequences[0, -8:].tolist() for ids, pictures in asked
    ]
    uncached = [
        pipe.generate(ids, images=pictures or None, use_cache=False, **options).sequences[0, -8:].tolist()
        for ids, pictures in asked
    ]
    longest = max(len(ids) for ids, _ in REQUESTS)
    padded = torch.tensor([[PAD] * (longest - len(ids)) + ids for ids, _ in REQUESTS])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in REQUESTS])
    together = pipe.generate(padded, mask, images=[pictures for _, pictures in REQUESTS], **options)
    assert alone == uncached == together.sequences[:, -8:].tolist()


def test_published_to_ours_to_published_is_what_transformers_reads(pair, tmp_path) -> None:
    theirs, _, folder = pair
    convert(str(folder), tmp_path / "ours")
    back = convert(str(tmp_path / "ours"), tmp_path / "back", to="published")
    again, report = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = theirs.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
