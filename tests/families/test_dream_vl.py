"""Dream-VL against the authors' model and diffusion_generate, recorded from DreamLM/Dream-VLX (vl/train/dreamvl) with
transformers 4.48.3 and tiny random weights (no top_k, which transformers otherwise sets to 50)."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from dmllm.pipeline import load
from tests.families.qwen_tokenizer import IDS, SIZE, qwen_tokenizer, with_rows
from tests.families.recorded import Recorded, assert_written_back

RECORDED = Recorded("dream_vl")
INPUTS, EXPECTED = RECORDED.inputs, RECORDED.expected
SAID = json.loads((RECORDED.folder / "cases.json").read_text())
REMASKING = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
CANVAS, LIMITS = 4, SAID["limits"]  # tokens behind each recorded prompt; of pixels


@pytest.fixture(scope="module")
def pipe():
    return load(str(RECORDED.folder), device="cpu", config=LIMITS)


def pictures(case: str) -> list[str] | None:
    return [str(RECORDED.folder / f"{name}.png") for name in SAID["cases"][case]["images"]] or None


@pytest.mark.parametrize("case", list(SAID["cases"]))
def test_logits_are_the_authors(pipe, case) -> None:
    ids, mask = INPUTS[f"{case}/input_ids"], INPUTS[f"{case}/attention_mask"]
    found, theirs = pipe.logits(ids, mask, images=pictures(case)), EXPECTED[f"{case}/logits"]
    real = mask.bool()
    if not bool(real.all()):  # theirs give a padded row's first token the logits of the padding before it
        real = real & (real.cumsum(1) > 1)
    assert (found - theirs)[real].abs().max() < 1e-4


@pytest.mark.parametrize("name", list(SAID["generate"]))
def test_greedy_decoding_takes_the_authors_steps_to_the_authors_tokens(pipe, name) -> None:
    said = SAID["generate"][name]
    case = said["case"]
    out = pipe.generate(
        INPUTS[f"{case}/input_ids"][:, :-CANVAS],
        images=pictures(case),
        max_new_tokens=10,
        steps=said["steps"],
        remasking=REMASKING[said["alg"]],
        temperature=0.0,
        eos_token_id=[],
    )
    assert torch.equal(out.sequences, EXPECTED[f"{name}/sequences"])
    assert out.num_forwards.tolist() == [said["forwards"]]


def test_a_picture_is_its_image_tokens_alone(tmp_path) -> None:
    RECORDED.changed(tmp_path, with_rows(RECORDED.weights), **LIMITS, **IDS, vocab_size=SIZE)
    qwen_tokenizer().save_pretrained(tmp_path)
    pipe = load(str(tmp_path), device="cpu")
    picture = Image.new("RGB", (56, 84))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    text = pipe.processor.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>user\n<|image_pad|>What?<|im_end|>\n<|im_start|>assistant\n")
    example = pipe.processor.prompt(messages)
    assert int((example.image_slots >= 0).sum()) == 6
    assert example.image_grids.tolist() == [[1, 3, 2]]


def test_a_checkpoint_is_written_back_to_the_bit(tmp_path) -> None:
    assert_written_back(RECORDED.load(), RECORDED, tmp_path)


def test_pictures_are_as_large_as_the_authors_preprocessor_lets_them_be() -> None:
    tiling = RECORDED.load().tiling
    assert (tiling.mode, tiling.min_pixels, tiling.max_pixels) == ("native", 3136, 3_211_264)


def test_what_it_cannot_be_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="projector_hidden_act='silu'"):
        RECORDED.changed(tmp_path, projector_hidden_act="silu")
    lacking = {name: value for name, value in RECORDED.weights.items() if name != "projector.linear_1.weight"}
    with pytest.raises(ValueError, match=r"projector\.linear_1\.weight"):
        RECORDED.changed(tmp_path, lacking)
    with pytest.raises(ValueError, match=r"image_newline"):
        RECORDED.changed(tmp_path, {**RECORDED.weights, "image_newline": torch.ones(64)})
