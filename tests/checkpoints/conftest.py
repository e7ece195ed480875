"""Tiny parts on disk: a tokenizer, a language model of transformers, a multimodal model of ours."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dmllm.checkpoints.compose import ModelSpec, compose
from dmllm.checkpoints.tokenizer import train_tokenizer
from dmllm.models.vision import VisionConfig

TEXT = "how many red circles are left of the blue square?\n" * 20
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {
    "name": "timm:vit_tiny_patch16_224",
    "pretrained": False,
    "options": {"img_size": [16, 16], "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3},
}
CAUSAL = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"bos_token_id": None, "eos_token_id": None}),
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT)
    return train_tokenizer([folder / "text.txt"], vocab_size=300, out=folder / "out")


def spec(tokenizer_folder, **changes) -> ModelSpec:
    parts = {"backbone": SHAPE, "vision": VisionConfig(**VISION), "tokenizer": str(tokenizer_folder)}
    return ModelSpec(**{**parts, **changes})


@pytest.fixture
def composed(tokenizer_folder):
    torch.manual_seed(0)
    model, processor = compose(spec(tokenizer_folder, tiling={"row_break": True}, generation={"max_new_tokens": 8}))
    return model.eval(), processor


def language_model(path, tokenizer_folder, kind: str, vocab_size: int = 280):
    """A causal language model whose tokenizer knows neither mask nor image token, nor a chat template."""
    torch.manual_seed(0)
    config_class, model_class, changes = CAUSAL[kind]
    shape = {**SHAPE, "intermediate_size": 48, "vocab_size": vocab_size, **changes}
    model = model_class(config_class(**shape, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})).eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1: make each tell
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    plain = type(tokenizer)(tokenizer_object=_without_specials(tokenizer), eos_token="a")
    plain.save_pretrained(path)
    return model


def _without_specials(tokenizer):
    """A byte-level tokenizer of the 256 bytes alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return plain
