"""Dimple against the authors' model and diffusion_generate, recorded from yu-rp/Dimple (lmms-eval) with
transformers 4.48.3 and tiny random weights (no top_k, which transformers otherwise sets to 50)."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from dmllm.data.images import cut_tiles
from dmllm.pipeline import load
from dmllm.tiling import plan
from tests.families.qwen_tokenizer import IDS, NAMES, SIZE, qwen_tokenizer, with_rows
from tests.families.recorded import Recorded, assert_written_back

RECORDED = Recorded("dimple")
INPUTS, EXPECTED = RECORDED.inputs, RECORDED.expected
SAID = json.loads((RECORDED.folder / "cases.json").read_text())
REMASKING = {
    "maskgit_plus": "low_confidence",
    "topk_margin": "margin",
    "entropy": "entropy",
    "autoregressive": "sequential",
}
CANVAS, LIMITS = 4, SAID["limits"]  # tokens behind each recorded prompt; of pixels
SCHEDULE = {"dream": "time", "dim": "confident"}


@pytest.fixture(scope="module")
def pipe():
    return load(str(RECORDED.folder), device="cpu", config=LIMITS)


def pictures(case: str) -> list[str] | None:
    return [str(RECORDED.folder / f"{name}.png") for name in SAID["cases"][case]["images"]] or None


def test_pixels_are_the_authors(pipe) -> None:
    tiling = pipe.tiling
    images = [Image.open(RECORDED.folder / f"{name}.png") for name in "ab"]
    plans = [plan(image.width, image.height, tiling) for image in images]
    assert (torch.tensor([p.grid for p in plans]) * torch.tensor([1, 2, 2])).equal(EXPECTED["image_grid_thw"])
    tiles = torch.cat([cut_tiles(image, p, tiling) for image, p in zip(images, plans, strict=True)])
    patches = pipe.model.vision.patches(pipe.model.vision.normalise(tiles))
    assert (patches - EXPECTED["pixel_values"]).abs().max() < 1e-6


@pytest.mark.parametrize("case", list(SAID["cases"]))
def test_logits_are_the_authors(pipe, case) -> None:
    ids, mask = INPUTS[f"{case}/input_ids"], INPUTS[f"{case}/attention_mask"]
    found, theirs = pipe.logits(ids, mask, images=pictures(case)), EXPECTED[f"{case}/logits"]
    real = mask.bool()
    if not bool(real.all()):  # theirs give a padded row's first token the logits of the padding before it
        real = real & (real.cumsum(1) > 1)
    assert (found - theirs)[real].abs().max() < 1e-4


@pytest.mark.parametrize("case", list(SAID["cases"]))
def test_positions_are_the_authors(pipe, case) -> None:
    ids, mask = INPUTS[f"{case}/input_ids"], INPUTS[f"{case}/attention_mask"]
    _, asked = pipe._asked(ids, mask, pictures(case))
    for row, own in enumerate(asked):
        positions = own.example.positions
        expected = EXPECTED[f"{case}/position_ids"][:, row, mask[row].bool()]
        assert torch.equal(positions[-3:] if positions.ndim == 2 else positions.expand(3, -1), expected)


@pytest.mark.parametrize("name", list(SAID["generate"]))
def test_greedy_decoding_takes_the_authors_steps_to_the_authors_tokens(pipe, name) -> None:
    said = SAID["generate"][name]
    case = said["case"]
    out = pipe.generate(
        INPUTS[f"{case}/input_ids"][:, :-CANVAS],
        images=pictures(case),
        max_new_tokens=10,
        steps=said["steps"],
        schedule="even" if said["alg"] == "autoregressive" else SCHEDULE[said["decoding_pipeline"]],
        remasking=REMASKING[said["alg"]],
        threshold=None if said["alg"] == "entropy" else said.get("alg_p_threshold"),  # theirs never exceeds it
        temperature=0.0,
        top_p=1.0,
        eos_token_id=[],
    )
    assert torch.equal(out.sequences, EXPECTED[f"{name}/sequences"])
    assert out.num_forwards.tolist() == [said["forwards"]]


def test_a_batch_of_prompts_with_different_pictures_is_answered_as_each_alone(pipe) -> None:
    ids, mask = (INPUTS[f"batch/{name}"][:, :-CANVAS] for name in ("input_ids", "attention_mask"))
    a, b = (str(RECORDED.folder / f"{name}.png") for name in "ab")
    images = [[], [b], [a, b]]
    options = {"max_new_tokens": 6, "steps": 3, "remasking": "low_confidence", "temperature": 0.0, "top_p": 1.0}
    together = pipe.generate(ids, mask, images, **options)
    for row, own in enumerate(images):
        alone = pipe.generate(ids[row : row + 1, mask[row].bool()], images=own or None, **options)
        assert torch.equal(together.sequences[row, -6:], alone.sequences[0, -6:])


def test_a_chat_about_pictures_is_the_authors_prompt(tmp_path) -> None:
    """Text from their chat template; an image token for each tile of 28 pixels; positions in time, height and width."""
    RECORDED.changed(tmp_path, with_rows(RECORDED.weights), **LIMITS, **IDS, vocab_size=SIZE)
    qwen_tokenizer().save_pretrained(tmp_path)
    pipe = load(str(tmp_path), device="cpu")
    picture = Image.new("RGB", (90, 50))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    text = pipe.processor.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )
    example = pipe.processor.prompt(messages)
    rows = example.image_slots >= 0
    assert example.image_grids.tolist() == [[1, 2, 3]]
    assert example.image_slots[rows].tolist() == list(range(6))
    first = int(rows.int().argmax())
    assert example.input_ids[[first - 1, first + 6]].tolist() == [
        NAMES[f"<|vision_{end}|>"] for end in ("start", "end")
    ]
    assert example.positions[:, rows].tolist() == [
        [first + k for k in range(6)],
        [first] * 6,
        [first + k for k in (0, 0, 0, 1, 1, 1)],
        [first + k for k in (0, 1, 2, 0, 1, 2)],
    ]
    assert example.positions[:, first + 6].tolist() == [first + 6, first + 3, first + 3, first + 3]
    assert NAMES["<|im_end|>"] in pipe.processor.stop_ids
    reply = pipe.chat(messages, max_new_tokens=4, steps=2, generator=0)
    assert reply.num_forwards <= 2


def test_a_checkpoint_is_written_back_to_the_bit(tmp_path) -> None:
    assert_written_back(RECORDED.load(), RECORDED, tmp_path)


def test_a_saved_model_gives_the_same_logits(pipe, tmp_path) -> None:
    pipe.model.save_pretrained(tmp_path)
    again = load(str(tmp_path), device="cpu")
    ids = INPUTS["two/input_ids"]
    assert torch.equal(again.logits(ids, images=pictures("two")), pipe.logits(ids, images=pictures("two")))


def test_what_the_preprocessor_says_is_kept(tmp_path) -> None:
    said = {"min_pixels": 3136, "max_pixels": 8000, "image_mean": [0.5, 0.5, 0.5], "patch_size": 14, "merge_size": 2}
    tmp_path.joinpath("preprocessor_config.json").write_text(json.dumps(said))
    pipe = RECORDED.changed(tmp_path)
    assert (pipe.tiling.min_pixels, pipe.tiling.max_pixels) == (3136, 8000)
    assert tuple(pipe.model.vision.mean) == (0.5, 0.5, 0.5)
    tmp_path.joinpath("preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 9000}}))
    assert RECORDED.changed(tmp_path).tiling.max_pixels == 9000
    tmp_path.joinpath("preprocessor_config.json").write_text(json.dumps({**said, "merge_size": 3}))
    with pytest.raises(ValueError, match="merge_size=3"):
        RECORDED.changed(tmp_path)


def test_what_it_cannot_be_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="rope_scaling"):
        RECORDED.changed(tmp_path, rope_scaling={"type": "yarn", "factor": 4})
    with pytest.raises(ValueError, match="mrope_section"):
        RECORDED.changed(tmp_path, mrope_section=[16, 24, 24])
    lacking = {name: value for name, value in RECORDED.weights.items() if name != "img_projector.linear_2.bias"}
    with pytest.raises(ValueError, match=r"img_projector\.linear_2\.bias"):
        RECORDED.changed(tmp_path, lacking)
    with pytest.raises(ValueError, match=r"visual\.blocks\.9\.norm1\.weight"):
        RECORDED.changed(tmp_path, {**RECORDED.weights, "visual.blocks.9.norm1.weight": torch.ones(32)})
