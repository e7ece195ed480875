"""A published checkpoint is read strictly, one shard at a time, without running anything it brings."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from dmllm.checkpoints import folder
from dmllm.checkpoints import weights as weights_module
from dmllm.checkpoints.example import write_example
from dmllm.checkpoints.published import write_published
from dmllm.checkpoints.weights import save_shards

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.transformer.blocks.1.attn_norm.weight"
IDS = torch.arange(10)[None]


@pytest.fixture
def llada(tmp_path):
    return write_example("llada", tmp_path / "llada")


def change(path: Path, edit) -> None:
    weights = load_file(path / WEIGHTS)
    edit(weights)
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})


def in_shards(path: Path, size: int = 100_000) -> list[Path]:
    weights = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    save_shards(weights, path, size=size)
    return sorted(path.glob("model-*.safetensors"))


def logits(path: Path, **options) -> torch.Tensor:
    return folder.load(path, **options).model(IDS).logits


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(NORM), rf"LLaDA 8B.*it lacks {NORM} \(1 in all\)"),
        (lambda w: w.update(extra=torch.ones(2)), r"has unexpected extra \(1 in all\)"),
        (lambda w: w.update({NORM: torch.ones(65)}), rf"{NORM} is \[65\], but config.json makes it \[64\]"),
        (lambda w: w.update({NORM[:-6] + "wait": w.pop(NORM)}), rf"lacks {NORM} .* unexpected .*attn_norm.wait"),
    ],
    ids=["missing", "unexpected", "of another shape", "of another name"],
)
def test_a_weight_that_does_not_fit_is_named_as_its_authors_call_it(llada, edit, message):
    change(llada, edit)
    with pytest.raises(ValueError, match=message):
        folder.load(llada)


def test_a_config_of_another_size_is_refused_before_anything_is_computed(llada):
    config = json.loads((llada / "config.json").read_text())
    (llada / "config.json").write_text(json.dumps(config | {"n_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks model.transformer.blocks.2.attn_norm.weight, .* \(9 in all\)"):
        folder.load(llada)
    (llada / "config.json").write_text(json.dumps(config | {"alibi": True}))
    with pytest.raises(ValueError, match="alibi=True is not supported; False is"):
        folder.load(llada)


def test_shards_are_the_same_model_as_one_file(llada):
    whole = logits(llada)
    assert len(in_shards(llada)) > 3
    assert torch.equal(logits(llada), whole)


def test_a_shard_that_is_missing_is_named(llada):
    shards = in_shards(llada)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {shards[1].name}"):
        folder.load(llada)


def test_shards_that_are_written_hold_every_weight_once_and_no_more_than_asked(llada):
    weights = load_file(llada / WEIGHTS)
    shards = in_shards(llada)
    index = json.loads((llada / INDEX).read_text())
    found = {name: (shard.name, tensor) for shard in shards for name, tensor in load_file(shard).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert all(torch.equal(found[name][1], tensor) for name, tensor in weights.items())
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 100_000 for shard in shards)


def test_pickles_are_refused_with_advice(llada):
    torch.save(load_file(llada / WEIGHTS), llada / "pytorch_model.bin")
    (llada / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.*as safetensors"):
        folder.load(llada)


def test_types_and_devices_are_those_asked_for(llada):
    change(llada, lambda w: w.update({name: tensor.bfloat16() for name, tensor in w.items()}))
    assert folder.load(llada).model.dtype == torch.float32  # on a CPU
    assert folder.load(llada, dtype="auto").model.dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert {p.dtype for p in folder.load(llada, dtype=dtype).model.parameters()} == {dtype}
    model = folder.load(llada, device="meta").model
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_code_in_a_checkpoint_is_never_run(llada, tmp_path, capfd):
    """Not for configuration, model or tokenizer, and nobody is asked whether it may be."""
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    (llada / "evil.py").write_text(evil)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor")
    config = json.loads((llada / "config.json").read_text()) | {"auto_map": dict.fromkeys(classes, "evil.Evil")}
    (llada / "config.json").write_text(json.dumps(config))
    own = json.loads((llada / "tokenizer_config.json").read_text())
    own |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (llada / "tokenizer_config.json").write_text(json.dumps(own))
    loaded = folder.load(llada)
    assert loaded.processor is not None
    assert loaded.processor.decode(loaded.processor.tokenizer("so it is").input_ids) == "so it is"
    (llada / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer is code, which is never run"):
        folder.load(llada)
    assert not (tmp_path / "ran").exists()
    assert "run the custom code" not in "".join(capfd.readouterr())


def test_a_tokenizer_of_the_authors_own_class_is_read_by_the_class_it_is(tmp_path):
    """Dream's is Qwen2's under another name, with vocab.json and merges.txt."""
    dream = write_example("dream", tmp_path / "dream")
    vocabulary = json.loads((dream / "tokenizer.json").read_text())["model"]["vocab"]
    (dream / "tokenizer.json").unlink()
    (dream / "vocab.json").write_text(json.dumps(vocabulary))
    (dream / "merges.txt").write_text("#version: 0.2\n")
    own = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.Dream", None]}}
    (dream / "tokenizer_config.json").write_text(json.dumps(own))
    loaded = folder.load(dream)
    assert loaded.processor is not None
    assert loaded.processor.decode(loaded.processor.tokenizer("a picture, 12").input_ids) == "a picture, 12"
    folder.save(tmp_path / "ours", loaded.model, loaded.processor)
    assert "auto_map" not in (tmp_path / "ours" / "tokenizer_config.json").read_text()


def test_only_what_came_from_a_published_checkpoint_is_written_as_one(tmp_path):
    with pytest.raises(ValueError, match="Only a model that came from a published checkpoint"):
        write_published(folder.load("dmllm-tiny").model, tmp_path / "out")


def test_reading_much_is_shown_on_a_terminal_only(llada, capsys, monkeypatch):
    folder.load(llada)
    monkeypatch.setattr(weights_module, "LARGE", 1)
    folder.load(llada)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(weights_module, "Console", partial(Console, force_terminal=True))
    folder.load(llada)
    assert "loading llada" in capsys.readouterr().err


MEASURE = """
import re, sys, torch
from pathlib import Path
from dmllm.checkpoints import folder
path, dtype = sys.argv[1:]
# Not resource.getrusage: its peak is inherited from the process that started this one.
held = lambda name: int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = held("VmRSS")
model = folder.load(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).model
assert all(float(parameter.detach()[..., -1].sum()) > 0 for parameter in model.parameters())  # really there
print(held("VmHWM") - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_reading_takes_one_copy_of_the_weights_and_one_shard(tmp_path, dtype, record_property):
    """2 GB of bfloat16 in shards of 250 MB, as it is and as float32."""
    path = write_example("llada", tmp_path / "large")
    config = json.loads((path / "config.json").read_text())
    config |= {"d_model": 2048, "n_heads": 16, "n_kv_heads": 16, "n_layers": 20, "mlp_hidden_size": 5632}
    (path / "config.json").write_text(json.dumps(config))
    sizes = {64: 2048, 96: 5632, 320: 320}
    first = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    weights = {}
    for name, tensor in first.items():
        large = torch.ones([sizes[size] for size in tensor.shape], dtype=torch.bfloat16)
        layers = range(20) if ".blocks.0." in name else [1] if ".blocks.1." in name else [0]
        weights |= {name.replace(".blocks.0.", f".blocks.{n}."): large for n in layers}
    shard = 250 * 10**6
    save_shards(weights, path, size=shard)
    size = sum(tensor.nbytes for tensor in weights.values())
    assert size > 2e9
    del weights, first
    command = [sys.executable, "-c", MEASURE, str(path), dtype]
    peak, copy = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert copy == size * (1 if dtype == "auto" else 2)
    record_property("peak over one copy", peak / copy)
    print(f"\n{dtype}: {copy / 1e9:.2f} GB of weights, peak {peak / 1e9:.2f} GB, {peak / copy:.2f} copies")  # noqa: T201
    assert peak < copy + 1.2 * shard
