"""DiffusionGemma behind the pipeline and in transformers' own generate(): tiny random weights, recorded runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import dmllm
from dmllm.checkpoints.convert import convert
from dmllm.checkpoints.example import write_example
from dmllm.checkpoints.published import write_published
from dmllm.data.images import cut_tiles
from dmllm.families import FAMILIES
from dmllm.models.vision.gemma4 import patches_of, tiling_of
from dmllm.tiling import plan

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion_gemma"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CASES = json.loads((GOLDEN / "cases.json").read_text())
PROMPT, CANVAS = EXPECTED["ids_text"], EXPECTED["canvas"]
IDS = torch.cat([PROMPT, CANVAS], 1)
P = PROMPT.shape[1]
PICTURES = [str(GOLDEN / f"image_{name}.png") for name in "ac"]
SHOWN = EXPECTED["ids_image"]  # a prompt with the 60 rows of the first picture
OF_PICTURE = torch.cat([SHOWN, CANVAS], 1)
SHORT = {"max_new_tokens": 32, "steps": 3, "entropy_bound": 2.0}


@pytest.fixture(scope="module")
def pipeline() -> dmllm.Pipeline:
    return dmllm.load(str(GOLDEN), device="cpu")


def folder(path: Path, weights: dict[str, torch.Tensor], **fields: object) -> str:
    path.mkdir(exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((GOLDEN / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    return str(path)


def test_logits_of_the_canvas_are_the_authors_with_and_without_the_last_ones_fed_back(pipeline):
    first = pipeline.logits(IDS)
    torch.testing.assert_close(first[:, P:], EXPECTED["direct/text/logits_step1"], atol=1e-4, rtol=0)
    assert first[:, :P].isnan().all(), "prompts are not predicted"
    second = pipeline.logits(IDS, feedback=first)
    torch.testing.assert_close(second[:, P:], EXPECTED["direct/text/logits_selfcond"], atol=1e-4, rtol=0)


def test_which_columns_are_the_canvas_can_be_said(pipeline):
    columns = torch.arange(IDS.shape[1]) >= P
    assert torch.equal(pipeline.logits(IDS, canvas=columns[None])[:, P:], pipeline.logits(IDS)[:, P:])
    assert torch.equal(pipeline.logits(CANVAS), pipeline.logits(CANVAS, canvas=torch.ones_like(CANVAS).bool()))
    with pytest.raises(ValueError, match=r"a prompt and then its canvas; say which columns"):
        pipeline.logits(IDS, canvas=~columns[None])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_logits_that_it_has_alone(pipeline, side):
    short = torch.cat([PROMPT[:, :10], CANVAS], 1)
    pad, one = torch.zeros(1, 8, dtype=torch.int64), torch.ones_like(short)
    row, mask = ((pad, short), (pad, one)) if side == "left" else ((short, pad), (one, pad))
    ids = torch.cat([IDS, torch.cat(row, 1)])
    mask = torch.cat([torch.ones_like(IDS), torch.cat(mask, 1)])
    both = pipeline.logits(ids, mask)
    torch.testing.assert_close(both[0], pipeline.logits(IDS)[0], atol=1e-4, rtol=0, equal_nan=True)
    torch.testing.assert_close(both[1][mask[1].bool()], pipeline.logits(short)[0], atol=1e-4, rtol=0, equal_nan=True)


def last(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -CANVAS.shape[1] :]


@pytest.mark.parametrize("size", [(64, 40), (30, 90), (200, 200), (7, 5), (1, 300), (900, 2), (97, 33)])
@pytest.mark.parametrize("rows", [70, 280])
def test_pictures_are_cut_as_transformers_cuts_them(size, rows):
    theirs = transformers.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=3, max_soft_tokens=rows)
    picture = Image.effect_noise(size, 80).convert("RGB")
    wanted = theirs(picture, return_tensors="pt")
    tiling = tiling_of({"max_soft_tokens": rows}, 4, 3)
    scheme = plan(*size, tiling)
    assert scheme.grid is not None
    values, places = patches_of(cut_tiles(picture, scheme, tiling), *scheme.grid[1:], 4)
    n = len(values)
    assert wanted["num_soft_tokens_per_image"].tolist() == [scheme.num_tiles]
    torch.testing.assert_close(values, wanted["pixel_values"][0, :n].float(), atol=1e-6, rtol=0)
    assert torch.equal(places, wanted["image_position_ids"][0, :n])
    assert (wanted["image_position_ids"][0, n:] == -1).all()


@pytest.mark.parametrize("number", [0, 1])
def test_a_pictures_rows_are_the_authors(pipeline, number):
    picture = Image.open(PICTURES[number])
    scheme = plan(*picture.size, pipeline.tiling)
    rows = pipeline.model.encode_images(cut_tiles(picture, scheme, pipeline.tiling), torch.tensor([scheme.grid]))
    torch.testing.assert_close(rows, EXPECTED[f"vision/{'ac'[number]}/projected"], atol=1e-4, rtol=0)


def test_logits_behind_a_picture_are_those_of_the_authors_generation(pipeline):
    found = pipeline.logits(OF_PICTURE, images=PICTURES[:1])
    torch.testing.assert_close(last(found), EXPECTED["masked/image/logits_step1"], atol=1e-4, rtol=0)


def test_where_a_pictures_rows_do_not_see_each_other_they_are_those_of_the_authors_plain_call():
    text = json.loads((GOLDEN / "config.json").read_text())["text_config"]
    causal = {"text_config": {**text, "use_bidirectional_attention": None}}
    pipeline = dmllm.load(str(GOLDEN), device="cpu", config=causal)
    first = pipeline.logits(OF_PICTURE, images=PICTURES[:1])
    recorded = EXPECTED["direct/image/logits_step1"]
    torch.testing.assert_close(last(first), recorded, atol=1e-4, rtol=0)
    feedback = torch.cat([first[:, : SHOWN.shape[1]], recorded], 1)  # rounding in the first call grows in the second
    second = pipeline.logits(OF_PICTURE, images=PICTURES[:1], feedback=feedback)
    torch.testing.assert_close(last(second), EXPECTED["direct/image/logits_selfcond"], atol=1e-4, rtol=0)


def test_one_image_token_stands_for_a_whole_picture(pipeline):
    once = torch.cat([OF_PICTURE[:, :5], OF_PICTURE[:, 64:]], 1)
    assert torch.equal(
        last(pipeline.logits(once, images=PICTURES[:1])), last(pipeline.logits(OF_PICTURE, images=PICTURES[:1]))
    )


def test_ids_may_be_made_for_another_number_of_rows_than_the_processor_says():
    pipeline = dmllm.load(str(GOLDEN), device="cpu", config={"max_soft_tokens": 280})
    found = pipeline.logits(OF_PICTURE, images=PICTURES[:1])
    torch.testing.assert_close(last(found), EXPECTED["masked/image/logits_step1"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"row 0: 59 image tokens for 1 images of \[273\] rows"):
        pipeline.logits(torch.cat([OF_PICTURE[:, :5], OF_PICTURE[:, 6:]], 1), images=PICTURES[:1])


def test_rows_with_and_without_pictures_have_the_logits_and_tokens_that_they_have_alone(pipeline):
    short = torch.cat([SHOWN[:, :5], SHOWN[:, 64:], SHOWN[:, 3:5], SHOWN[:, 64:]], 1)  # an image token for each of two
    rows = [(PROMPT, []), (short, PICTURES[::-1]), (SHOWN, PICTURES[:1])]
    width = SHOWN.shape[1]
    ids = torch.cat([torch.nn.functional.pad(own, (width - own.shape[1], 0)) for own, _ in rows])
    mask = torch.stack([(torch.arange(width) >= width - own.shape[1]).long() for own, _ in rows])
    images = [own for _, own in rows]
    canvas = CANVAS.expand(3, -1)
    both = pipeline.logits(torch.cat([ids, canvas], 1), torch.cat([mask, torch.ones_like(canvas)], 1), images)
    options = {"generator": 0, "max_new_tokens": 32, "steps": 3, "entropy_bound": 2.0}
    made = pipeline.generate(ids, mask, images, **options).sequences
    for row, (own, pictures) in enumerate(rows):
        alone = pipeline.logits(torch.cat([own, CANVAS], 1), images=pictures)
        torch.testing.assert_close(last(both[row : row + 1]), last(alone), atol=1e-4, rtol=0)
        assert (
            made[row, width:].tolist()
            == pipeline.generate(own, images=pictures, **options).sequences[0, own.shape[1] :].tolist()
        )


def test_generation_behind_a_picture_is_transformers_own(pipeline):
    theirs = transformers.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=3, max_soft_tokens=70)
    shown = theirs(Image.open(PICTURES[0]), return_tensors="pt")
    torch.manual_seed(6)
    wanted = pipeline.model.inner.generate(
        input_ids=SHOWN,
        pixel_values=shown["pixel_values"].float(),
        image_position_ids=shown["image_position_ids"],
        mm_token_type_ids=SHOWN.eq(pipeline.special.image).long(),
        max_new_tokens=32,
        max_denoising_steps=4,
        sampler_config=transformers.models.diffusion_gemma.generation_diffusion_gemma.EntropyBoundSamplerConfig(2.0),
    )
    torch.manual_seed(6)
    made = pipeline.generate(SHOWN, images=PICTURES[:1], max_new_tokens=32, steps=4, entropy_bound=2.0)
    assert made.sequences.tolist() == wanted.sequences.tolist()


@pytest.mark.parametrize("case", list(CASES))
def test_torchs_global_generator_gives_the_recorded_canvases_step_by_step(pipeline, case):
    recorded = CASES[case]
    ids, pads = torch.tensor(recorded["input_ids"]), recorded["left_pad"]
    torch.manual_seed(recorded["torch_seed"])
    params = {name: value for name, value in recorded["params"].items() if name != "leftpad"}
    made = pipeline.generate(ids, (torch.arange(ids.shape[1]) >= pads).long().expand_as(ids), **params)
    assert made.sequences.tolist() == recorded["sequences"]
    new = made.sequences.shape[1] - P
    per_call = torch.tensor(recorded["tokens_per_forward"])
    torch.testing.assert_close(new / made.num_forwards, per_call)
    steps = len(recorded["argmax"]) * pipeline.model.canvas_length // new
    for number, (step, argmax) in enumerate(zip(made.trajectory, recorded["argmax"], strict=True)):
        here = number // steps * pipeline.model.canvas_length
        assert step.ids[:, here : here + pipeline.model.canvas_length].tolist() == argmax


def test_padding_counts_as_positions_without_a_generator_alone(pipeline):
    """transformers' positions: rounding then differs from the row's alone, and decides the recorded case."""
    recorded = CASES["leftpad"]
    ids = torch.tensor(recorded["input_ids"])
    mask, params = (ids > 0).long(), {"max_new_tokens": 16, "steps": 4, "entropy_bound": 0.5}
    torch.manual_seed(recorded["torch_seed"])
    alone = pipeline.generate(ids[:, 3:], **params).sequences[:, 15:]
    assert (alone != torch.tensor(recorded["sequences"])[:, 18:]).sum() == 1
    seeded = [
        pipeline.generate(*given, generator=5, **params).sequences[:, -16:] for given in ((ids, mask), (ids[:, 3:],))
    ]
    assert torch.equal(*seeded)
    assert torch.equal(seeded[0], alone)


def test_a_seed_gives_a_row_the_recorded_tokens_too(pipeline):
    recorded = CASES["text_eb2_two_canvases"]
    made = pipeline.generate(recorded["input_ids"], generator=recorded["torch_seed"], **recorded["params"])
    assert made.sequences.tolist() == recorded["sequences"]


def test_a_padded_row_of_a_batch_draws_what_it_draws_alone(pipeline):
    options = {"generator": 0, "max_new_tokens": 16, "steps": 3, "entropy_bound": 2.0}
    ids = torch.cat([PROMPT, torch.cat([torch.zeros(1, 4, dtype=torch.int64), PROMPT[:, :14]], 1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    both = pipeline.generate(ids, mask, **options).sequences
    assert both[0].tolist() == pipeline.generate(PROMPT, **options).sequences[0].tolist()
    assert both[1, 4:].tolist() == pipeline.generate(PROMPT[:, :14], **options).sequences[0].tolist()


def test_an_answer_ends_at_its_end_token_and_no_canvas_follows(pipeline):
    whole = pipeline.generate(PROMPT, generator=0, **SHORT).sequences[0, P:].tolist()
    made = pipeline.generate(PROMPT, generator=0, eos_token_id=whole[5], **SHORT)
    first = whole.index(whole[5])
    assert made.sequences[0, P:].tolist() == whole[: first + 1] + [pipeline.special.pad] * (31 - first)
    assert made.num_forwards.tolist() == [3]


def test_a_draft_is_shown_at_every_call_and_is_known_only_at_the_end_of_its_canvas(pipeline):
    steps = pipeline.generate(PROMPT, generator=0, **SHORT).trajectory
    known = [step.committed[0].view(2, 16).all(1).tolist() for step in steps]
    assert known == [[False, False]] * 2 + [[True, False]] * 3 + [[True, True]]
    assert [step.num_forwards.tolist() for step in steps] == [[n] for n in range(1, 7)]


def test_settings_come_from_the_checkpoint_and_wrong_ones_are_named(pipeline, tmp_path):
    assert vars(pipeline.decode_config()).items() >= FAMILIES.load("diffusion_gemma").decode.items()
    shutil.copytree(GOLDEN, tmp_path / "own")
    own = {"max_denoising_steps": 7, "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.3}}
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": [1, 106]}))
    config: Any = dmllm.load(str(tmp_path / "own"), device="cpu").decode_config(t_max=0.9)
    assert (config.steps, config.entropy_bound, config.t_max, config.stops) == (7, 0.3, 0.9, (1, 106))
    with pytest.raises(ValueError, match=r"'entropy_bounds' for DiffusionGemma; did you mean entropy_bound\?"):
        pipeline.generate(PROMPT, entropy_bounds=1.0)
    with pytest.raises(ValueError, match=r"t_min=0.9 must lie between 0 and t_max=0.8"):
        pipeline.generate(PROMPT, t_min=0.9)


def test_a_checkpoint_with_a_tokenizer_can_be_asked(tmp_path):
    asked = dmllm.load(str(write_example("diffusion_gemma", tmp_path / "model")), device="cpu")
    reply = asked.chat("Hi", generator=1, max_new_tokens=16, steps=2)
    assert (len(reply.ids), reply.num_forwards, reply.finish_reason) == (16, 2, "length")
    assert [step.num_forwards.item() for step in asked.stream("Hi", max_new_tokens=16, steps=2)] == [1, 2]


def test_a_chat_shows_pictures_between_the_tokens_that_begin_and_end_one(tmp_path):
    asked = dmllm.load(str(write_example("diffusion_gemma", tmp_path / "model")), device="cpu")
    row = asked.processor.prompt("What is it?", PICTURES[1:])
    begin, image, end = (
        FAMILIES.load("diffusion_gemma").example[f"{name}_token_id"] for name in ("boi", "image", "eoi")
    )
    places = (row.input_ids == image).nonzero().squeeze(1)
    assert (row.input_ids[places[0] - 1], row.input_ids[places[-1] + 1]) == (begin, end)
    assert row.image_slots[places].tolist() == list(range(56))
    options = {"generator": 1, "max_new_tokens": 16, "steps": 2, "entropy_bound": 2.0}
    both = asked.chat(["Hi", "What is it?"], images=[None, PICTURES], **options)
    assert both[0].ids == asked.chat("Hi", **options).ids
    assert both[1].ids == asked.chat("What is it?", PICTURES, **options).ids != asked.chat("What is it?", **options).ids


def test_as_a_folder_of_ours_it_has_the_same_logits_and_goes_back_to_the_bit(pipeline, tmp_path):
    ours = dmllm.load(str(convert(str(GOLDEN), tmp_path / "ours")), device="cpu")
    ids = torch.arange(10, 40)[None]
    logits = pipeline.logits(ids)
    torch.testing.assert_close(ours.logits(ids), logits, rtol=0, atol=0, equal_nan=True)
    assert ours.generation == pipeline.generation
    back = convert(str(tmp_path / "ours"), tmp_path / "back", to="published")
    written, weights = (load_file(path / "model.safetensors") for path in (back, GOLDEN))
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())
    assert json.loads((back / "config.json").read_text()) == json.loads((GOLDEN / "config.json").read_text())


@pytest.mark.parametrize("form", ["as saved", "without pictures", "shared weights under the encoder's names"])
def test_the_checkpoint_comes_back_to_the_bit_under_the_names_it_had(pipeline, tmp_path, form):
    weights = load_file(GOLDEN / "model.safetensors")
    if form != "as saved":
        weights = {name: tensor for name, tensor in weights.items() if "vision" not in name}
    if form == "shared weights under the encoder's names":
        own = ("self_conditioning", "layer_scalar")
        weights = {
            name if any(part in name for part in own) else name.replace("decoder", "encoder.language_model"): tensor
            for name, tensor in weights.items()
        }
    loaded = dmllm.load(folder(tmp_path / "there", weights), device="cpu")
    assert torch.equal(loaded.logits(IDS)[:, P:], pipeline.logits(IDS)[:, P:])
    write_published(loaded.model, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert weights.keys() == back.keys()
    assert all(torch.equal(weights[name], back[name]) for name in weights)
    there, config = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("there", "back"))
    assert config == there
    if form == "without pictures":
        with pytest.raises(ValueError, match="takes text only; leave the images out"):
            loaded.generate(SHOWN, images=PICTURES[:1])


def test_what_the_processor_says_is_read_and_written_back(pipeline, tmp_path):
    said = (GOLDEN / "processor_config.json").read_text()
    assert json.loads(
        (write_published(pipeline.model, tmp_path / "out") / "processor_config.json").read_text()
    ) == json.loads(said)
    weights = load_file(GOLDEN / "model.safetensors")
    there = Path(folder(tmp_path / "there", weights))
    assert (
        dmllm.load(str(there), device="cpu").tiling == tiling_of({}, 4, 3) == tiling_of({"max_soft_tokens": 280}, 4, 3)
    )
    (there / "preprocessor_config.json").write_text(json.dumps({"max_soft_tokens": 140}))
    assert dmllm.load(str(there), device="cpu").tiling == tiling_of({"max_soft_tokens": 140}, 4, 3)
    for field, value in (("max_soft_tokens", 100), ("patch_size", 8), ("do_resize", False), ("resample", 2)):
        with pytest.raises(ValueError, match=rf"{field}={value}.* not supported"):
            dmllm.load(str(there), device="cpu", config={field: value})
    with pytest.raises(ValueError, match=r"image_mean=\[0.5, 0.5, 0.5\] are not supported"):
        dmllm.load(str(there), device="cpu", config={"do_normalize": True, "image_mean": [0.5] * 3})


def test_a_weight_too_few_too_many_or_of_another_shape_is_named(tmp_path):
    weights = load_file(GOLDEN / "model.safetensors")
    norm, tower = "model.decoder.norm.weight", "model.encoder.vision_tower.std_bias"
    for lost in (norm, tower):
        few = {name: tensor for name, tensor in weights.items() if name != lost}
        with pytest.raises(ValueError, match=rf"lacks .*{lost}"):
            dmllm.load(folder(tmp_path / "few", few), device="cpu")
    with pytest.raises(ValueError, match=r"unexpected .*model\.extra"):
        dmllm.load(folder(tmp_path / "many", {**weights, "model.extra": torch.zeros(2)}), device="cpu")
    with pytest.raises(ValueError, match=rf"{norm} \(\[31\] for \[32\]\)"):
        dmllm.load(folder(tmp_path / "shape", {**weights, norm: torch.zeros(31)}), device="cpu")


def test_a_transformers_without_the_model_says_what_to_type(monkeypatch):
    monkeypatch.setattr("dmllm.checkpoints.native.transformers", type("Old", (), {"__version__": "5.0.0"}))
    with pytest.raises(ValueError, match=r"DiffusionGemmaForBlockDiffusion; this is transformers 5\.0\.0\. Type: pip"):
        dmllm.load(str(GOLDEN), device="cpu")
    assert hasattr(transformers, "DiffusionGemmaForBlockDiffusion")


def test_what_it_cannot_do_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"DiffusionGemma has no mask token, so it cannot score"):
        pipeline.score(PROMPT, CANVAS, num_samples=1)
    with pytest.raises(ValueError, match=r"row 0: 0 image tokens for 1 images of \[60\] rows"):
        pipeline.generate(PROMPT, images=PICTURES[:1])


def test_another_model_takes_no_feedback():
    with pytest.raises(ValueError, match=r"not conditioned on its own logits; leave feedback out"):
        dmllm.load("dmllm-tiny", device="cpu").logits([[1, 2]], feedback=torch.zeros(1, 2, 4))
