"""`import dmllm` is cheap and needs no vision library; after it, in any order, transformers' Auto classes know us."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import dmllm
from dmllm.checkpoints import folder
from dmllm.checkpoints.compose import ModelSpec, compose
from dmllm.checkpoints.tokenizer import train_tokenizer
from dmllm.models.vision import VisionConfig

USE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_grad_enabled(False)
path, other = sys.argv[1:]
config = AutoConfig.from_pretrained(path)
assert type(config).__name__ == "DmllmConfig", config
processor = AutoProcessor.from_pretrained(path)
messages = [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
expected = torch.load(path + "/expected.pt")
for auto in (AutoModel, AutoModelForImageTextToText):
    model = auto.from_pretrained(path, dtype=torch.float32).eval()
    assert type(model).__name__ == "MultimodalModel", model
    rows = model.encode_images(torch.full((1, 3, *model.vision.image_size), 100, dtype=torch.uint8))
    assert torch.equal(rows, expected["image"]), "image features changed"
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, expected["logits"]), "logits changed"
assert type(AutoModel.from_config(config)).__name__ == "MultimodalModel"

shape = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(other)  # what is not ours loads as before
assert type(AutoConfig.from_pretrained(other)) is LlamaConfig
assert type(AutoModelForCausalLM.from_pretrained(other)) is LlamaForCausalLM
"""
CHEAP = """
import sys, time
start = time.perf_counter()
import dmllm
ours = time.perf_counter() - start
loaded = {"timm", "open_clip", "torchvision", "transformers.modeling_utils"} & set(sys.modules)
start = time.perf_counter()
import torch
print(ours / (time.perf_counter() - start), loaded)
"""


def run(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny model whose tower has buffers that are not in the file (rotary tables)."""
    place = tmp_path_factory.mktemp("auto")
    (place / "text.txt").write_text("how many red circles?\n" * 20)
    tokenizer = train_tokenizer([place / "text.txt"], vocab_size=280, out=place / "tokenizer")
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
    tower = VisionConfig(name="timm:vit_small_patch16_dinov3", pretrained=False, image_size=32, options=options)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model, processor = compose(ModelSpec(backbone=shape, vision=tower, tokenizer=str(tokenizer)))
    model.eval()
    folder.save(place / "model", model, processor)
    with torch.no_grad():
        expected = {
            "image": model.encode_images(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)),
            "logits": model(processor.prompt("how many?").input_ids[None]).logits,
        }
    torch.save(expected, place / "model" / "expected.pt")
    return str(place / "model")


@pytest.mark.parametrize(
    "imports", ["import dmllm, transformers", "from transformers import AutoModel, AutoProcessor\nimport dmllm"]
)
def test_auto_classes_load_our_checkpoints_in_any_order_of_imports_and_others_as_before(checkpoint, imports, tmp_path):
    run(imports + USE, checkpoint, str(tmp_path))


@pytest.mark.parametrize("first", ["dmllm.models.multimodal", "dmllm.data.processor"])
def test_any_of_our_modules_can_be_the_first_import(first):
    run(f"import {first}\nfrom transformers import AutoModel, AutoProcessor")


def test_import_is_cheap_beside_torch_and_needs_no_vision_library():
    ratio, loaded = run(CHEAP).split(maxsplit=1)
    assert loaded.strip() == "set()"
    assert float(ratio) < 0.5


def test_the_front_door_has_what_it_names():
    assert set(dmllm.__all__) == {"Pipeline", "Reply", "__version__", "load"}
    assert callable(dmllm.load)
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        dmllm.generate  # noqa: B018
