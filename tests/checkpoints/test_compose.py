"""A model composed of parts has what it needs, computes what its parts computed, and refuses parts that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from dmllm.checkpoints import folder
from dmllm.checkpoints.compose import ModelSpec, compose
from dmllm.checkpoints.vocabulary import grow
from dmllm.config import load_config, save_config
from dmllm.models.projectors import ProjectorConfig
from dmllm.models.vision import VisionConfig
from tests.checkpoints.conftest import CAUSAL, SHAPE, VISION, language_model, spec

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def test_what_is_missing_is_added(tokenizer_folder):
    model, processor = compose(spec(tokenizer_folder))
    tokenizer, special = processor.tokenizer, model.config.special
    assert model.config.backbone["vocab_size"] % 64 == 0
    assert model.config.backbone["vocab_size"] >= len(tokenizer)
    assert (special.mask, special.eos, special.pad, special.image) == (2, 1, 0, 3)
    assert processor.special == special
    tiling = processor.config.tiling
    assert (tiling.tile_size, tiling.grid, tiling.interpolation) == ((16, 16), (2, 2), "bicubic")


def test_a_composed_model_answers_a_picture(composed):
    model, processor = composed
    from PIL import Image

    example = processor.prompt("how many?", [Image.new("RGB", (40, 30), "red")])
    slots = example.image_slots[None]
    logits = model(example.input_ids[None], pixel_values=example.pixel_values, image_slots=slots).logits
    assert logits.isfinite().all()
    assert logits.shape == (1, len(example), model.config.backbone["vocab_size"])


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_weights_of_a_published_tower_arrive_in_the_model(tmp_path, tokenizer_folder, kind):
    config_class, model_class = {
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
        "clip": (CLIPVisionConfig, CLIPVisionModel),
    }[kind]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    published = model_class(config_class(**shape, patch_size=8, image_size=16))
    for parameter in published.parameters():
        torch.nn.init.normal_(parameter)
    published.save_pretrained(tmp_path)
    tower = VisionConfig(name=f"hf:{tmp_path}", layer=-2, mean=(0.5,) * 3, std=(0.5,) * 3)
    model, _ = compose(spec(tokenizer_folder, vision=tower))
    arrived, original = model.vision.tower.state_dict(), published.state_dict()
    assert arrived
    assert all(torch.equal(weight, original[name]) for name, weight in arrived.items())
    random, _ = compose(spec(tokenizer_folder, vision=replace(tower, pretrained=False)))
    assert not torch.equal(next(random.vision.parameters()), next(model.vision.parameters()))


def test_a_text_only_model_has_no_tiling_and_no_image_token(tokenizer_folder):
    model, processor = compose(spec(tokenizer_folder, vision=None))
    assert (model.vision, model.config.image_token_id, processor.config.tiling) == (None, None, None)


@pytest.mark.parametrize("kind", list(CAUSAL))
def test_a_causal_language_model_computes_the_same_as_a_backbone(tmp_path, tokenizer_folder, kind):
    original = language_model(tmp_path / kind, tokenizer_folder, kind)
    model, processor = compose(ModelSpec(backbone=str(tmp_path / kind), visibility="causal"))
    logits = model.eval()(IDS, canvas=torch.zeros_like(IDS, dtype=torch.bool)).logits
    torch.testing.assert_close(logits[..., :256], original(IDS).logits[..., :256], atol=2e-5, rtol=1e-4)
    assert model.config.special.mask == processor.tokenizer.convert_tokens_to_ids("<|mask|>") >= 256
    assert model.config.backbone["vocab_size"] == 280  # the 24 spare rows hold the new tokens


def test_a_vocabulary_that_is_too_small_grows_with_rows_that_change_little(tmp_path, tokenizer_folder):
    original = language_model(tmp_path, tokenizer_folder, "llama", vocab_size=258)
    model, processor = compose(ModelSpec(backbone=str(tmp_path), visibility="causal", vision=VisionConfig(**VISION)))
    assert model.config.backbone["vocab_size"] == 320
    logits = model.eval()(IDS, canvas=torch.zeros_like(IDS, dtype=torch.bool)).logits
    old, new = logits[..., :256], logits[..., 256:]
    torch.testing.assert_close(old, original(IDS).logits[..., :256], atol=2e-5, rtol=1e-4)
    assert (new.amax() < old.amax()).all()
    assert (new - old.mean(-1, keepdim=True)).abs().amax() < old.std() * 2
    assert processor.tokenizer.convert_tokens_to_ids("<|image|>") == model.config.image_token_id


def test_new_rows_differ_from_each_other_and_tied_matrices_stay_one():
    matrix = torch.randn(8, 4)
    grown = grow({"embed_tokens.weight": matrix, "lm_head.weight": matrix}, used=range(6), fresh=[6], size=10)
    assert grown["embed_tokens.weight"] is grown["lm_head.weight"]
    rows = grown["embed_tokens.weight"]
    assert torch.equal(rows[:6], matrix[:6])
    assert torch.equal(rows[7], matrix[7])  # neither used nor new: left alone
    assert len({tuple(row.tolist()) for row in rows[[6, 8, 9]]}) == 3


def test_our_own_backbone_can_start_another_model(tmp_path, composed, tokenizer_folder):
    model, processor = composed
    folder.save(tmp_path / "first", model, processor)
    again, second = compose(
        ModelSpec(backbone=str(tmp_path / "first"), vision=VisionConfig(**VISION), projector="linear")
    )
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.parameters(), again.backbone.parameters(), strict=True))
    assert (second.special, again.config.projector["name"]) == (processor.special, "linear")


def test_a_checkpoint_is_continued_with_another_use_of_its_data(tmp_path, composed):
    model, processor = composed
    folder.save(tmp_path / "first", model, processor)
    changes = {"turns": "each", "image_prefix": True, "max_length": 77}
    spec = ModelSpec(
        checkpoint=str(tmp_path / "first"), processor=changes, visibility="prefix", generation={"steps": 4}
    )
    again, second = compose(spec)
    assert (second.config.turns, second.config.max_length, second.config.tiling) == (
        "each",
        77,
        processor.config.tiling,
    )
    assert again.config.visibility == "prefix"
    assert folder.decode_defaults(again) == {"max_new_tokens": 8, "steps": 4}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_same_seed_gives_the_same_model(tokenizer_folder):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(compose(spec(tokenizer_folder))[0])
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_specification_survives_yaml(tmp_path):
    whole = ModelSpec(backbone=SHAPE, vision=VisionConfig(**VISION), projector=ProjectorConfig(name="linear"))
    save_config(whole, tmp_path / "a.yaml")
    assert load_config(ModelSpec, tmp_path / "a.yaml") == whole
    (tmp_path / "b.yaml").write_text("{backbone: a/b, vision: hf:c/d, projector: pool, tiling: {mode: pad}}")
    read = load_config(
        ModelSpec, tmp_path / "b.yaml", ["--tokenizer=x", "--processor={turns: each, image_prefix: true}"]
    )
    assert (read.backbone, read.vision, read.projector, read.tokenizer) == ("a/b", "hf:c/d", "pool", "x")
    assert read.processor == {"turns": "each", "image_prefix": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": None}, "give one of checkpoint"),
        ({"checkpoint": "x"}, "give one of checkpoint"),
        ({"tokenizer": None}, "dmllm tokenizer train"),
        ({"backbone": {**SHAPE, "hidden_sizes": 100}}, "did you mean hidden_size"),
        ({"backbone": {**SHAPE, "vocab_size": 100}}, "less than the tokenizer's 2"),
        ({"processor": {"turn": "all"}}, "did you mean turns"),
        ({"tiling": {"modes": "pad"}}, "did you mean mode"),
        ({"tiling": {"tile_size": [8, 8]}}, r"make it \(16, 16\)"),
        ({"tiling": {"mode": "pad"}, "vision": None}, "no vision encoder"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tokenizer_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        compose(spec(tokenizer_folder, **changes))


def test_a_checkpoint_keeps_its_parts(tmp_path, composed):
    folder.save(tmp_path / "first", *composed)
    with pytest.raises(ValueError, match=r"write model: \{backbone:"):
        compose(ModelSpec(checkpoint=str(tmp_path / "first"), projector="linear"))


def test_a_gpt2_in_an_old_file_is_the_same(tmp_path, tokenizer_folder):
    """Its names lack "transformer.", its head is the embedding, and the causal mask is stored too."""
    original = language_model(tmp_path, tokenizer_folder, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = compose(ModelSpec(backbone=str(tmp_path), visibility="causal"))
    logits = model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits[..., :256], original(IDS).logits[..., :256], atol=2e-5, rtol=1e-4)
    save_file({**old, "h.0.extra": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit gpt2: it has unexpected h\.0\.extra"):
        compose(ModelSpec(backbone=str(tmp_path)))


def test_a_language_model_with_other_weights_or_settings_is_refused_by_name(tmp_path, tokenizer_folder):
    language_model(tmp_path, tokenizer_folder, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.extra"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks norm.weight .* unexpected layers.0.extra"):
        compose(ModelSpec(backbone=str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(ValueError, match="attention_bias=True is not supported"):
        compose(ModelSpec(backbone=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "phi"}))
    with pytest.raises(ValueError, match="'phi' is not one of llama, mistral, qwen2, qwen3, gpt2"):
        compose(ModelSpec(backbone=str(tmp_path)))


def test_a_name_that_is_nowhere_says_what_was_wanted(monkeypatch, tmp_path, tokenizer_folder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"Wanted: config.json, model.safetensors .*hf download Qwen/Qwen3-0.6B --revision v1"
    ):
        compose(ModelSpec(backbone="Qwen/Qwen3-0.6B", revision="v1"))
    with pytest.raises(FileNotFoundError, match="hf download some/tokenizer"):
        compose(ModelSpec(backbone=SHAPE, tokenizer="some/tokenizer"))


def test_a_chat_template_file_is_used(tmp_path, tokenizer_folder):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    _, processor = compose(spec(tokenizer_folder, vision=None, chat_template=str(tmp_path / "chat.jinja")))
    assert processor.decode(processor.prompt("hello").input_ids) == "[user]hello[assistant]"
    assert AutoTokenizer.from_pretrained(tokenizer_folder).chat_template != template
