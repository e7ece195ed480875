"""A random model of any family, in its authors' format, is loaded and asked like theirs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import dmllm
from dmllm.checkpoints.example import GROWTH, write_example
from dmllm.families import FAMILIES, family_of


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_an_example_is_recognised_as_of_its_family_and_loads(tmp_path, name, size):
    path = write_example(name, tmp_path / "out", size=size)
    assert family_of(json.loads((path / "config.json").read_text())).name == name  # type: ignore[union-attr]
    model = dmllm.load(str(path), device="cpu").model
    assert model.config.family == name
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (count < 2e6) if size == "tiny" else (count < 1e8)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_example_has_logits(tmp_path, name):
    pipeline = dmllm.load(str(write_example(name, tmp_path / "out")), device="cpu")
    logits = pipeline.logits(torch.arange(12)[None])
    assert logits.shape[:2] == (1, 12)
    assert not logits.isnan().any()


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_an_example_with_room_for_bytes_can_be_asked(tmp_path, name):
    pipeline = dmllm.load(str(write_example(name, tmp_path / "out")), device="cpu")
    reply = pipeline.chat("Grüße?", max_new_tokens=8, steps=4, eos_token_id=[])
    assert (len(reply.ids), reply.num_forwards) == (8, 4)
    tokenizer = pipeline.processor.tokenizer
    assert tokenizer.decode(tokenizer("Grüße, 日本").input_ids) == "Grüße, 日本"
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (302, 300)


def test_the_seed_decides_the_weights(tmp_path):
    one, two, three = (
        load_file(write_example("dream", tmp_path / f"{i}", seed=seed) / "model.safetensors")
        for i, seed in enumerate([1, 1, 2])
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], three[name])


def test_small_has_more_layers_and_heads_of_the_same_width(tmp_path):
    config = json.loads((write_example("llada", tmp_path / "out", size="small") / "config.json").read_text())
    tiny = FAMILIES.load("llada").example
    assert config["n_layers"] == GROWTH * tiny["n_layers"]
    assert config["d_model"] // config["n_heads"] == tiny["d_model"] // tiny["n_heads"]
    assert config["vocab_size"] == tiny["vocab_size"]


def test_a_size_of_ones_own_is_a_yaml_of_config_fields(tmp_path):
    (tmp_path / "size.yaml").write_text("{n_layers: 5, vocab_size: 200, embedding_size: 200, mask_token_id: 199}")
    path = write_example("llada", tmp_path / "out", size=str(tmp_path / "size.yaml"))
    assert json.loads((path / "config.json").read_text())["n_layers"] == 5
    assert not (path / "tokenizer.json").exists()  # 256 bytes have no room in it


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean dream"):
        write_example("drem", tmp_path / "out")
    with pytest.raises(ValueError, match=r"size='huge' is not one of tiny, small"):
        write_example("dream", tmp_path / "out", size="huge")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="holds files already"):
        write_example("dream", tmp_path)
