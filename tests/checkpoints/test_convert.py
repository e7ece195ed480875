"""Converting changes a checkpoint's format, and what its rows see; never what it computes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmllm
from dmllm.checkpoints import folder
from dmllm.checkpoints.convert import convert
from dmllm.checkpoints.example import write_example
from dmllm.families import FAMILIES
from tests.checkpoints.conftest import CAUSAL, language_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [40, 40, 3, 99, 0, 0, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5]])
MASK = torch.tensor([[1] * 8, [1] * 4 + [0] * 4, [0] * 3 + [1] * 5])


@pytest.mark.parametrize("kind", list(CAUSAL))
def test_under_causal_visibility_a_converted_model_has_exactly_the_sources_logits(tmp_path, tokenizer_folder, kind):
    """One place on, since logits here score the token at their place; also with padding on either side."""
    source = language_model(tmp_path / "source", tokenizer_folder, kind)
    convert(str(tmp_path / "source"), tmp_path / "out", to="causal")
    pipeline = dmllm.load(str(tmp_path / "out"), device="cpu")
    ours = pipeline.logits(IDS, MASK)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = source(IDS, attention_mask=MASK, position_ids=positions).logits
    for row, real in enumerate(MASK.bool()):
        a, b = ours[row, real][:, :256], theirs[row, real][:, :256]  # the source's tokens
        torch.testing.assert_close(a[1:], b[:-1], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(a[0], b[0], atol=2e-5, rtol=1e-5)  # nothing is before the first: its own row


def test_without_shift_each_row_predicts_its_own_token(tmp_path, tokenizer_folder):
    source = language_model(tmp_path / "source", tokenizer_folder, "qwen3")
    convert(str(tmp_path / "source"), tmp_path / "out", to="causal", shift=False)
    ours = dmllm.load(str(tmp_path / "out"), device="cpu").logits(IDS[:1])
    torch.testing.assert_close(ours[..., :256], source(IDS[:1]).logits[..., :256], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("to", "visibility"), [("masked", "full"), ("block:4", "block:4")])
def test_a_causal_language_model_becomes_a_start_for_denoising(tmp_path, tokenizer_folder, to, visibility):
    """With a mask token of its own; block:N decodes block by block."""
    language_model(tmp_path / "source", tokenizer_folder, "qwen2")
    convert(str(tmp_path / "source"), tmp_path / "out", to=to)
    pipeline = dmllm.load(str(tmp_path / "out"), device="cpu")
    config = pipeline.model.config
    assert (config.visibility, config.shift) == (visibility, True)
    assert config.mask_token_id >= 256
    assert pipeline.decode_config().block_length == (4 if to == "block:4" else None)
    assert len(pipeline.chat("hi", max_new_tokens=8, eos_token_id=[]).ids) == 8


def test_a_row_of_a_block_model_sees_its_block_and_those_before(tmp_path, tokenizer_folder):
    language_model(tmp_path / "source", tokenizer_folder, "llama")
    convert(str(tmp_path / "source"), tmp_path / "out", to="block:4", shift=False)
    pipeline = dmllm.load(str(tmp_path / "out"), device="cpu")
    ids = IDS[:1]
    other = ids.clone()
    other[0, 6] = 77
    changed = (pipeline.logits(ids) != pipeline.logits(other)).any(-1)[0]
    assert changed.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("name", list(FAMILIES))
def test_published_to_ours_to_published_is_the_same_to_the_bit(tmp_path, name):
    """The config.json too, and the types of weights where a file has several."""
    there = write_example(name, tmp_path / "there")
    weights = load_file(there / "model.safetensors")
    kinds = sorted({re.sub(r"\d+", "", key) for key in weights})
    for key, tensor in weights.items():
        if kinds.index(re.sub(r"\d+", "", key)) % 2 and not FAMILIES.load(name).computed:
            weights[key] = tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
    save_file(weights, there / "model.safetensors", metadata={"format": "pt"})
    convert(str(there), tmp_path / "ours")
    back = convert(str(tmp_path / "ours"), tmp_path / "back", to="published")
    again = load_file(back / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(again[key].dtype == weights[key].dtype and torch.equal(again[key], weights[key]) for key in weights)
    assert json.loads((back / "config.json").read_text()) == json.loads((there / "config.json").read_text())


def test_a_converted_folder_answers_as_the_published_one(tmp_path):
    there = write_example("llada", tmp_path / "there")
    convert(str(there), tmp_path / "ours")
    options = {"max_new_tokens": 16, "steps": 8, "block_length": 8, "eos_token_id": []}
    one, two = (dmllm.load(str(p), device="cpu").chat("so?", **options) for p in (there, tmp_path / "ours"))
    assert (one.ids, one.num_forwards) == (two.ids, two.num_forwards)
    assert folder.load(tmp_path / "ours").generation == dict(FAMILIES.load("llada").decode)


@pytest.mark.parametrize(
    ("kind", "to", "message"),
    [
        ("llada", "published", "is no dmllm folder; only one that came from a published checkpoint goes back"),
        ("llada", "block:4", r"'llada'\) is no causal language model .*llama, mistral, qwen2, qwen3"),
        ("llada", "maskd", "to='maskd' is not one of dmllm, published, masked, or block:N"),
        ("ours", "dmllm", "is a dmllm folder already; its authors' format is: --to published"),
        ("qwen2", "dmllm", "is a causal language model, which can become a start: --to masked or --to block:32"),
    ],
)
def test_what_cannot_be_converted_is_told_what_can(tmp_path, tokenizer_folder, kind, to, message):
    source = str(tmp_path / "source")
    if kind == "qwen2":
        language_model(source, tokenizer_folder, "qwen2")
    elif kind == "ours":
        source = "dmllm-tiny"
    else:
        write_example(kind, source)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to=to)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="holds files already; name another folder"):
        convert(source, tmp_path / "full", to=to)
