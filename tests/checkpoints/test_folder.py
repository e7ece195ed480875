"""A checkpoint comes back as it was saved, is replaced as a whole or not at all, and is read strictly."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from dmllm.checkpoints import folder
from dmllm.checkpoints.card import describe
from dmllm.checkpoints.compose import compose
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.models.vision import VisionConfig
from tests.checkpoints.conftest import SHAPE, spec

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def same(first, second) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_what_is_saved_comes_back(tmp_path, composed):
    model, processor = composed
    folder.save(tmp_path / "model", model, processor)
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = folder.load(tmp_path / "model")
    assert same(loaded.model, model)
    assert not loaded.model.training
    assert loaded.generation == {"max_new_tokens": 8}
    assert loaded.processor.config == processor.config
    assert loaded.processor.special == processor.special == loaded.model.config.special
    assert loaded.processor.chat_template == processor.chat_template
    assert folder.load_processor(tmp_path / "model").config == processor.config


HUGGING_FACE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
}
TOWERS = {
    "timm-rotary": {
        "name": "timm:vit_small_patch16_dinov3",  # its rotary tables are not in the file
        "image_size": 32,
        "options": {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
    },
    "open_clip": {
        "name": "open_clip:ViT-B-32",
        "options": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    },
    **{
        kind: {"name": "hf:tower", "layer": -2, "options": {"model_type": kind, **HUGGING_FACE, **size}}
        for kind, size in {
            "siglip_vision_model": {"image_size": 32},
            "siglip2_vision_model": {"num_patches": 16},
            "clip_vision_model": {"image_size": 32},
            "dinov2": {"image_size": 32},
        }.items()
    },
}


@pytest.mark.parametrize("kind", list(TOWERS))
def test_every_librarys_tower_comes_back_with_the_same_features(tmp_path, tokenizer_folder, kind):
    half = (0.5, 0.5, 0.5)
    tower = VisionConfig(pretrained=False, mean=half, std=half, **TOWERS[kind])
    model, processor = compose(spec(tokenizer_folder, vision=tower))
    folder.save(tmp_path / "model", model, processor)
    again = folder.load(tmp_path / "model").model
    assert same(again, model)
    pixels = torch.randint(0, 256, (1, 3, *model.vision.image_size), dtype=torch.uint8)
    assert torch.equal(again.encode_images(pixels), model.eval().encode_images(pixels))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_can_be_stored_in_half_precision_and_used_in_full(tmp_path, tokenizer_folder, tied):
    model, processor = compose(spec(tokenizer_folder, backbone={**SHAPE, "tie_word_embeddings": tied}))
    folder.save(tmp_path / "model", model, processor, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    assert ("backbone.lm_head.weight" in stored) != tied
    assert model.dtype == torch.float32
    on_cpu, as_asked = folder.load(tmp_path / "model"), folder.load(tmp_path / "model", dtype=torch.bfloat16)
    assert (on_cpu.model.dtype, as_asked.model.dtype) == (torch.float32, torch.bfloat16)
    assert same(on_cpu.model, model.bfloat16().float())
    if tied:
        assert on_cpu.model.backbone.lm_head.weight is on_cpu.model.backbone.embed_tokens.weight


def test_shards_come_back_as_one(tmp_path, composed, monkeypatch):
    model, processor = composed
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    processor.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert same(folder.load(tmp_path / "model").model, model)
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="has no model-00002-of"):
        folder.load(tmp_path / "model")


def test_decode_defaults_are_readable_by_transformers(tmp_path, composed):
    folder.save(tmp_path / "model", *composed, generation={"max_new_tokens": 32, "threshold": 0.9, "temperature": 0.0})
    assert folder.load(tmp_path / "model").generation == {"max_new_tokens": 32, "threshold": 0.9, "temperature": 0.0}
    assert GenerationConfig.from_pretrained(tmp_path / "model").max_new_tokens == 32
    loaded = folder.load(tmp_path / "model")
    rebuilt = type(loaded.model)(loaded.model.config)
    rebuilt.load_state_dict(loaded.model.state_dict())
    folder.save(tmp_path / "again", rebuilt, loaded.processor)
    assert folder.load(tmp_path / "again").generation == loaded.generation
    assert folder.DECODE not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_model_without_a_tokenizer_is_a_checkpoint_too(tmp_path, composed):
    folder.save(tmp_path / "model", composed[0])
    assert folder.load(tmp_path / "model").processor is None
    with pytest.raises(ValueError, match="without a tokenizer"):
        folder.load_processor(tmp_path / "model")


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, composed, monkeypatch):
    model, processor = composed
    folder.save(tmp_path / "model", model, processor)
    before = folder.load(tmp_path / "model").model
    with torch.no_grad():
        model.backbone.norm.weight.add_(1)
    monkeypatch.setattr(folder, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.save(tmp_path / "model", model, processor)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same(folder.load(tmp_path / "model").model, before)
    monkeypatch.undo()
    folder.save(tmp_path / "model", model, processor)
    assert same(folder.load(tmp_path / "model").model, model)


def test_a_folder_of_other_files_is_never_replaced(tmp_path, composed):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no checkpoint to be replaced"):
        folder.save(tmp_path, *composed)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_named(tmp_path, composed, damage):
    folder.save(tmp_path / "model", *composed)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    if damage == "missing":
        del weights["backbone.norm.weight"]
    elif damage == "unexpected":
        weights["backbone.extra.weight"] = torch.zeros(1)
    else:
        weights["backbone.norm.weight"] = torch.zeros(7)
    save_file(weights, path, metadata={"format": "pt"})
    message = {
        "missing": "lacks backbone.norm.weight",
        "unexpected": "unexpected backbone.extra.weight",
        "shape": r"unexpected backbone.norm.weight \(\[7\] for \[32\]\)",
    }
    with pytest.raises(ValueError, match=message[damage]):
        folder.load(tmp_path / "model")


def test_another_kind_of_model_is_refused_with_what_it_is_good_for(tmp_path, composed):
    folder.save(tmp_path / "model", *composed)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"type 'llama', not 'dmllm'.*backbone: "):
        folder.load(tmp_path / "model")


def test_names_are_folders_then_packaged_models_then_hub_names(tmp_path, composed, monkeypatch):
    folder.save(tmp_path / "assets" / "models" / "tiny", *composed)
    monkeypatch.setattr(folder, "files", lambda _: tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert same(folder.load("tiny").model, composed[0])
    with pytest.raises(FileNotFoundError, match=r"neither a folder .* \(there are: tiny\)"):
        folder.load("tinny")
    with pytest.raises(FileNotFoundError, match="hf download someone/model"):
        folder.load("someone/model")
    snapshot = tmp_path / "cache" / "models--someone--model" / "snapshots" / "abc"
    folder.save(snapshot, *composed)
    (snapshot.parents[1] / "refs").mkdir()
    for name in ("main", "v1"):
        (snapshot.parents[1] / "refs" / name).write_text("abc")
    assert same(folder.load("someone/model").model, composed[0])
    assert same(folder.load("someone/model", revision="v1").model, composed[0])
    with pytest.raises(FileNotFoundError, match="--revision v2"):
        folder.load("someone/model", revision="v2")


def test_the_card_says_what_the_model_is_and_what_its_owner_adds(tmp_path, composed):
    model, processor = composed
    folder.save(tmp_path / "tiny", model, processor, card="Trained on 10 pictures.")
    card = (tmp_path / "tiny" / "README.md").read_text()
    for words in ("# tiny", "2 layers, width 32", "timm:vit_tiny_patch16_224", "16 x 16 pixels", "max_new_tokens=8"):
        assert words in card
    assert card.endswith("\nTrained on 10 pictures.\n")
    text_only, processor = compose(spec(processor.tokenizer.name_or_path, vision=None))
    folder.save(tmp_path / "text", text_only, processor)
    assert "image" not in (tmp_path / "text" / "README.md").read_text().split("| part")[1]


def test_no_code_of_a_checkpoint_is_executed(tmp_path, composed):
    folder.save(tmp_path / "model", *composed)
    config = tmp_path / "model" / "config.json"
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": names}))
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('executed')")
    assert same(folder.load(tmp_path / "model").model, composed[0])


def test_info_says_what_a_model_undoes_and_what_it_can_keep() -> None:
    def said(**fields: Any) -> dict[str, str]:
        shape = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        backbone = {**shape, "time_conditioning": fields.pop("timed", False)}
        return describe(MultimodalModel(DmllmConfig(backbone=backbone, **fields)), None)

    assert said()["cache"].startswith("approximate")
    assert said(visibility="prefix")["cache"].startswith("exact")
    assert said(visibility="prefix", timed=True)["cache"].startswith("none")
    assert said(visibility="block:4", timed=True)["cache"].startswith("exact")
    words = said(process="uniform", timed=True, heads={"next_sentence": {}})
    assert words["cache"].startswith("none")
    assert words["process"] == "uniform, told the time"
    assert words["heads"] == "next_sentence"
    assert "row before" in said(visibility="causal", shift=True)["visibility"]
