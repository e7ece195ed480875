"""Any causal model of transformers as a start: converted, it computes what it did, and can learn to denoise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import dmllm
from dmllm.checkpoints import folder
from dmllm.checkpoints.compose import ModelSpec
from dmllm.checkpoints.convert import convert
from dmllm.cli import main
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.training import TrainConfig, train
from dmllm.training.config import OptimiserConfig
from tests.checkpoints.conftest import SHAPE, _without_specials

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
PAD, END, START, PICTURE, STOP = 256, 258, 259, 260, 261
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {**SHAPE, "intermediate_size": 48, "head_dim": 16, "eos_token_id": END, "pad_token_id": PAD}
PREPARED = {
    "size": {"shortest_edge": 64, "longest_edge": 2000},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
TOWERS = {
    "qwen2_5_vl": {**TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
CASES = [(kind, tied) for kind in CLASSES for tied in (False, True)]


def tokenizer(*more: str):
    """One id a byte, Qwen's special tokens behind them, and `more`."""
    made = PreTrainedTokenizerFast(tokenizer_object=_without_specials(None), extra_special_tokens=[*WORDS, *more])
    made.eos_token, made.pad_token, made.chat_template = "<|im_end|>", "<|endoftext|>", TEMPLATE
    assert made.convert_tokens_to_ids(["<|endoftext|>", "<|image_pad|>"]) == [PAD, PICTURE]
    return made


def source(
    path: Path, kind: str, *, tied: bool = False, rows: int = 280, words=(), shard="1GB", dtype=None, stretch=None
):
    """A model of transformers with a tokenizer, as their `save_pretrained` writes the two."""
    torch.manual_seed(0)
    model_class = getattr(transformers, CLASSES[kind])
    text = {**TEXT, "vocab_size": rows, "tie_word_embeddings": tied}
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    if kind in TOWERS:
        ids = {"image_token_id": PICTURE, "vision_start_token_id": START, "vision_end_token_id": STOP}
        config = model_class.config_class(
            text_config={**text, "num_attention_heads": 2, "rope_parameters": {**rope, "mrope_section": [4, 2, 2]}},
            vision_config=TOWERS[kind],
            tie_word_embeddings=tied,
            **ids,
        )
        path.mkdir(parents=True)
        (path / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    else:
        text |= {"sliding_window": None} if kind == "mistral" else {}
        config = model_class.config_class(**text, rope_parameters=rope | dict(stretch or {}))
    model = model_class(config).eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1: make each tell
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    tokenizer(*words).save_pretrained(path)
    return model


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def distance(pipeline, model, rows: list[tuple[list[int], list[Image.Image]]], tokens: int = 262) -> float:
    """How far our causal logits are from the source's, those of the row before, over its `tokens`; rows are padded."""
    pictures = [p for _, own in rows for p in own]
    given = {}
    if pictures:
        processor = Qwen2VLImageProcessorPil(**PREPARED)
        given = dict(processor(pictures, return_tensors="pt"))
    supply = iter((given["image_grid_thw"].prod(1) // 4).tolist() if pictures else ())
    expanded = [[t for i in ids for t in ([i] * next(supply) if i == PICTURE else [i])] for ids, _ in rows]
    longest = max(map(len, expanded))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in expanded])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in expanded])
    if pictures:
        given["mm_token_type_ids"] = (ids == PICTURE).int()
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=real, **given).logits[..., :tokens]
    theirs = torch.cat([theirs[:, :1], theirs[:, :-1]], 1)
    images = [own for _, own in rows] if pictures else None
    ours = pipeline.logits(ids, real, images=images, visibility="causal")[..., :tokens]
    assert theirs.std() > 0.3
    return float((ours - theirs)[real.bool()].abs().max())


WRITTEN = [([5, 6, 7, 8, 9, 10, 11, 12], []), ([40, 40, 3, 99], []), ([1, 2, 3, 4, 5, 255], [])]
SHOWN = [
    ([7, START, PICTURE, STOP, 8, 9], [picture(16, 24, 0)]),
    ([1, 2, 3], []),
    ([START, PICTURE, STOP, START, PICTURE, STOP, 9], [picture(40, 8, 1), picture(50, 61, 2)]),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four questions about pictures of one colour, as LLaVA writes them; and the same without pictures."""
    path = tmp_path_factory.mktemp("data")
    rows = []
    for number, colour in enumerate(["red", "green", "blue", "black"]):
        Image.new("RGB", (16 + 8 * number, 16), colour).save(path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": f"it is {colour}"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (path / "shown.json").write_text(json.dumps(rows))
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = "colour?"
    (path / "written.json").write_text(json.dumps(rows))
    return path


def train_a_little(model: Path, data: Path, out: Path, *, sees: bool):
    """Two steps of train.py's loop."""
    file = data / ("shown.json" if sees else "written.json")
    config = TrainConfig(
        output_dir=str(out),
        model=ModelSpec(checkpoint=str(model)),
        data=DataConfig(datasets=(DataSource(json_path=str(file), image_folder=str(data)),)),
        steps=2,
        batch_size=2,
        optimiser=OptimiserConfig(lr=1e-3),
        log_every=1,
    )
    return train(config)


@pytest.mark.parametrize("to", ["masked", "block"])
@pytest.mark.parametrize(("kind", "tied"), CASES, ids=[f"{kind}{'-tied' if tied else ''}" for kind, tied in CASES])
def test_a_causal_model_becomes_one_that_can_learn_to_denoise(tmp_path, data, kind, tied, to):
    """Its causal logits are the source's; its mask token is nothing else; it answers, and it learns by the loop."""
    model = source(tmp_path / "source", kind, tied=tied)
    main(["convert", "--from", str(tmp_path / "source"), "--to", to, str(tmp_path / "start")])
    pipeline = dmllm.load(str(tmp_path / "start"), device="cpu")
    config = pipeline.model.config
    assert (config.visibility, config.shift) == ("full" if to == "masked" else "block:32", True)
    assert distance(pipeline, model, WRITTEN) < 1e-5
    if kind in TOWERS:
        assert distance(pipeline, model, SHOWN) < 1e-5

    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "start"))
    mask = config.mask_token_id
    assert mask == pipeline.special.mask == after.mask_token_id == len(before)  # the first free row
    assert after.convert_ids_to_tokens(mask) == "<|mask|>"
    assert mask not in before.get_vocab().values()
    texts = ["every <byte|mask> ÿ\x00 |mask|", *WORDS]
    assert all(mask not in after(text)["input_ids"] for text in texts)
    assert all(after(text)["input_ids"] == before(text)["input_ids"] for text in texts)
    backbone = pipeline.model.backbone
    assert (backbone.embed_tokens.weight is backbone.lm_head.weight) == tied
    rows = backbone.embed_tokens.weight.detach()
    assert float((rows[mask] - rows[:mask].mean(0)).abs().max()) < rows[:mask].std()

    ids, images = SHOWN[0] if kind in TOWERS else WRITTEN[0]
    found = pipeline.generate(torch.tensor([ids]), images=images or None, max_new_tokens=8, eos_token_id=[])
    assert found.sequences.shape == (1, len(ids) + 8)
    assert mask not in found.sequences[0, -8:]
    said = pipeline.chat("what?", images=images or None, max_new_tokens=8, eos_token_id=[])
    assert len(said.ids) >= 8

    result = train_a_little(tmp_path / "start", data, tmp_path / "run", sees=kind in TOWERS)
    logged = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    old, new = (load_file(path / "model.safetensors") for path in (tmp_path / "start", result.model))
    assert old.keys() == new.keys()
    learned = {name for name in old if not torch.equal(old[name], new[name])}
    assert {"backbone.layers.0.self_attn.q_proj.weight", "backbone.embed_tokens.weight"} <= learned
    assert (kind in TOWERS) == any(name.startswith("vision.tower.blocks.0") for name in learned)
    assert (kind == "qwen3_vl") == any("deepstack_merger_list" in name for name in learned)
    again = folder.load(result.model).model.config
    assert (again.visibility, again.mask_token_id, again.shift) == (config.visibility, mask, True)


def test_the_stretched_positions_of_llama_3_are_computed_and_others_are_refused(tmp_path):
    stretch = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = source(tmp_path / "source", "llama", stretch={"rope_type": "llama3", **stretch})
    convert(str(tmp_path / "source"), tmp_path / "start", to="masked")
    pipeline = dmllm.load(str(tmp_path / "start"), device="cpu")
    long = [([*range(256)], [])]
    assert distance(pipeline, model, long) < 1e-5
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    assert config["backbone"]["rope_scaling"] == stretch
    plain = dict(config["backbone"], rope_scaling=None)
    (tmp_path / "start" / "config.json").write_text(json.dumps(config | {"backbone": plain}))
    assert distance(dmllm.load(str(tmp_path / "start"), device="cpu"), model, long) > 1e-2
    source(tmp_path / "other", "llama", stretch={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="only rope_type 'default' and 'llama3' are"):
        convert(str(tmp_path / "other"), tmp_path / "out", to="masked")


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shards_in_bfloat16_stay_in_bfloat16(tmp_path, kind, tied):
    """Read shard by shard; what is written is as large as what was read, and its logits are the same."""
    model = source(tmp_path / "source", kind, tied=tied, shard="20KB", dtype=torch.bfloat16)
    assert len([*(tmp_path / "source").glob("model-*-of-*.safetensors")]) > 2
    convert(str(tmp_path / "source"), tmp_path / "start", to="masked")
    written = load_file(tmp_path / "start" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    pipeline = dmllm.load(str(tmp_path / "start"), device="cpu")  # in float32 on a CPU
    theirs = type(model).from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    assert distance(pipeline, theirs, SHOWN if kind in TOWERS else WRITTEN) < 1e-5
    (file := next((tmp_path / "source").glob("model-00002-*"))).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file.name}"):
        convert(str(tmp_path / "source"), tmp_path / "other", to="masked")


@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl", "qwen3_vl"])
def test_a_mask_token_that_the_tokenizer_has_is_taken_with_the_row_it_has(tmp_path, kind):
    model = source(tmp_path / "source", kind, words=("<|mask|>",))
    convert(str(tmp_path / "source"), tmp_path / "start", to="masked")
    pipeline = dmllm.load(str(tmp_path / "start"), device="cpu")
    assert pipeline.model.config.mask_token_id == 262
    assert len(pipeline.processor.tokenizer) == 263
    assert distance(pipeline, model, WRITTEN, tokens=280) < 1e-5  # every row is as it was
    assert torch.equal(pipeline.model.backbone.embed_tokens.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_without_a_free_row_grows(tmp_path, data, kind, tied):
    """To a multiple of 64; one with padding rows keeps its size and gives the first of them to the mask token."""
    model = source(tmp_path / "source", kind, tied=tied, rows=262)
    convert(str(tmp_path / "source"), tmp_path / "start", to="block:4")
    pipeline = dmllm.load(str(tmp_path / "start"), device="cpu")
    backbone = pipeline.model.backbone
    assert len(backbone.embed_tokens.weight) == len(backbone.lm_head.weight) == backbone.config.vocab_size == 320
    assert pipeline.model.config.mask_token_id == 262
    assert torch.equal(backbone.embed_tokens.weight[:262], model.get_input_embeddings().weight)
    assert distance(pipeline, model, SHOWN if kind in TOWERS else WRITTEN) < 1e-5
    result = train_a_little(tmp_path / "start", data, tmp_path / "run", sees=kind in TOWERS)
    assert folder.load(result.model).model.config.backbone["vocab_size"] == 320
    if kind in TOWERS:
        with pytest.raises(ValueError, match="Only a model that came from a published checkpoint"):
            convert(str(tmp_path / "start"), tmp_path / "back", to="published")

    source(tmp_path / "roomy", kind, tied=tied, rows=300)
    convert(str(tmp_path / "roomy"), tmp_path / "kept", to="block:4")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("roomy", "kept"))
    rows = new["backbone.embed_tokens.weight"]
    before = next(tensor for name, tensor in old.items() if name.endswith("embed_tokens.weight"))
    assert rows.shape == before.shape
    assert (rows != before).any(1).nonzero().flatten().tolist() == [262]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_vision_language_model_is_also_continued_without_being_converted(tmp_path, data, kind):
    """As `model: {checkpoint: FOLDER, visibility: block:4}`; and loaded as it is, its tokenizer has a mask token."""
    model = source(tmp_path / "source", kind)
    pipeline = dmllm.load(str(tmp_path / "source"), device="cpu")
    assert pipeline.processor.tokenizer.mask_token_id == pipeline.model.config.mask_token_id == 262
    assert distance(pipeline, model, SHOWN) < 1e-5
    there = ModelSpec(checkpoint=str(tmp_path / "source"), visibility="block:4")
    file = DataSource(json_path=str(data / "shown.json"), image_folder=str(data))
    config = TrainConfig(
        output_dir=str(tmp_path / "run"), model=there, data=DataConfig(datasets=(file,)), steps=1, batch_size=2
    )
    again = dmllm.load(str(train(config).model), device="cpu")
    assert (again.model.config.visibility, again.model.config.mask_token_id) == ("block:4", 262)
    assert again.decode_config().block_length is None  # that of the visibility, not the causal model's 1
    convert(str(tmp_path / "source"), tmp_path / "ours")  # the format alone
    convert(str(tmp_path / "ours"), tmp_path / "back", to="published")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "back"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def siglip(path: Path) -> Path:
    """A tower of transformers with pictures of 16 x 16 in patches of 8."""
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**shape, image_size=16, patch_size=8)
    transformers.SiglipVisionModel(config).save_pretrained(path)
    said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "size": {"height": 16, "width": 16}}
    (path / "preprocessor_config.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("to", ["masked", "block:4"])
def test_a_vision_tower_is_put_before_a_language_model(tmp_path, data, kind, to):
    """With its published weights, an image token and a new projector; text is as it was, pictures tell, all learns."""
    model = source(tmp_path / "source", kind, words=("<|mask|>",))
    tower = siglip(tmp_path / "siglip")
    given = ["--from", str(tmp_path / "source"), "--to", to, "--vision", f"hf:{tower}", str(tmp_path / "start")]
    main(["convert", *given])
    pipeline = dmllm.load(str(tmp_path / "start"), device="cpu")
    config = pipeline.model.config
    assert distance(pipeline, model, WRITTEN) < 1e-5
    assert config.image_token_id == PICTURE  # <|image_pad|>, which Qwen's tokenizer has
    assert (config.projector["name"], pipeline.processor.config.tiling.tile_size) == ("mlp2x_gelu", (16, 16))
    published = load_file(tower / "model.safetensors")
    written = load_file(tmp_path / "start" / "model.safetensors")
    own = {name.removeprefix("vision.tower."): t for name, t in written.items() if name.startswith("vision.tower.")}
    theirs = {name.removeprefix("vision_model."): t for name, t in published.items()}
    theirs = {name: t for name, t in theirs.items() if not name.startswith("head.")}
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)

    ids = torch.tensor([[5, PICTURE, 6, 7]])
    one, two = (pipeline.logits(ids, images=[picture(20, 30, seed)]) for seed in (0, 1))
    assert float((one - two).abs().max()) > 1e-4
    assert len(pipeline.chat("what?", images=picture(20, 30, 0), max_new_tokens=8, eos_token_id=[]).ids) >= 8
    result = train_a_little(tmp_path / "start", data, tmp_path / "run", sees=True)
    learned = load_file(result.model / "model.safetensors")
    for name in ("projector.0.weight", "vision.tower.encoder.layers.0.self_attn.q_proj.weight"):
        assert not torch.equal(learned[name], written[name])


def test_what_does_not_go_together_is_refused_and_nothing_is_written(tmp_path):
    llama, sees = (str(tmp_path / name) for name in ("llama", "sees"))
    source(Path(llama), "llama")
    source(Path(sees), "qwen3_vl")
    out = tmp_path / "out"
    for given, message in (
        ({"source": sees, "to": "masked", "vision": "timm:vit_tiny_patch16_224"}, "has a vision tower already; leave"),
        ({"source": llama, "to": "masked", "vision": "vit_tiny"}, "write 'timm:vit_tiny', 'open_clip:...' or 'hf:...'"),
        ({"source": llama, "to": "masked", "vision": "tim:vit_tiny"}, "tim"),
        ({"source": llama, "to": "masked", "vision": "timm:vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"source": llama, "to": "dmllm", "vision": "timm:vit_tiny_patch16_224"}, "--vision and --no-shift go with"),
        ({"source": sees, "to": "published", "shift": False}, "--vision and --no-shift go with --to masked"),
        ({"source": llama, "to": "block:0"}, "block:N such as block:32"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(given.pop("source"), out, **given)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(llama, out, to="masked", vision=f"hf:{tmp_path / 'nowhere'}")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act='gelu' is not supported; only 'silu' is"):
        convert(llama, out, to="masked")
    weights = load_file(tmp_path / "sees" / "model.safetensors")
    weights["model.visual.extra"] = weights.pop("model.visual.deepstack_merger_list.0.norm.weight")
    save_file(weights, tmp_path / "sees" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*deepstack_merger_list.0.norm.weight .* unexpected model.visual.ext"):
        convert(sees, out, to="masked")
    for file in (tmp_path / "sees").glob("tokenizer*"):
        file.unlink()
    weights["model.visual.deepstack_merger_list.0.norm.weight"] = weights.pop("model.visual.extra")
    save_file(weights, tmp_path / "sees" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no tokenizer"):
        convert(sees, out, to="masked")
    assert not out.exists()
