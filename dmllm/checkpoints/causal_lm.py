"""Autoregressive language models of transformers as backbones: Llama, Mistral, Qwen2, Qwen3 and GPT-2 shapes.

The blocks of all but the last are our `Transformer`'s, and their names too, below "model."; what differs is in the two
tables here. GPT-2's are those of the family that was made from it. A setting that our blocks do not have is refused, so
that what is loaded computes what the original computed.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from dmllm.checkpoints.weights import read_weights, refuse_keys
from dmllm.config import to_dict
from dmllm.families import diffugpt
from dmllm.families.family import to_ours
from dmllm.models.backbones import BACKBONES
from dmllm.models.backbones.transformer import TransformerConfig
from dmllm.nn.rope import Stretch

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {"type": "gpt2"},
}
COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
)
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
}


def from_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Shape (a backbone's fields and type) and float32 weights of a causal language model's folder, under our names.

    Raises:
        ValueError: another architecture, a setting our blocks do not have, or a weight too few or too many; named.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in KINDS:
        raise ValueError(f"backbone {folder}: model_type={config.model_type!r} is not one of {', '.join(KINDS)}.")
    if config.model_type == "gpt2":
        shape, weights = _gpt2(config, folder)
    else:
        shape = _shape(config, folder)
        weights = {
            name.removeprefix("model."): tensor
            for name, tensor in read_weights(folder, dtype=torch.float32).items()
            if not name.endswith("rotary_emb.inv_freq")  # computed, though old files hold it
        }
    if shape["tie_word_embeddings"] and "embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    own = dict(shape)
    module, shape_class = BACKBONES.load(own.pop("type"))
    with torch.device("meta"):
        expected = module(shape_class(**own)).state_dict()
    refuse_keys(expected.keys() - weights.keys(), weights.keys() - expected.keys(), folder, config.model_type)
    return shape, weights


def _shape(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    for name, value in REQUIRED.items():
        if (found := getattr(config, name, value)) != value:
            raise ValueError(f"backbone {folder}: {name}={found!r} is not supported; only {value!r} is.")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"backbone {folder}: rope_parameters={rope} are not supported; only rope_type 'default' and 'llama3' are."
        )
    shape = TransformerConfig(
        **{name: getattr(config, name) for name in COPIED},
        head_dim=getattr(config, "head_dim", None),
        rope_theta=rope.get("rope_theta", TransformerConfig.rope_theta),
        rope_scaling=Stretch(**{f.name: rope[f.name] for f in fields(Stretch)}) if kind == "llama3" else None,
        **KINDS[config.model_type],
    )
    return {"type": "transformer", **to_dict(shape)}


def _gpt2(config: PreTrainedConfig, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPT-2's, whose old files name weights without "transformer." and hold the causal mask."""
    try:
        shape = diffugpt.backbone(config.to_dict())
    except ValueError as error:
        raise ValueError(f"backbone {folder}: {error}") from None
    weights = {}
    for name, tensor in read_weights(folder, dtype=torch.float32).items():
        known = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if any(re.fullmatch(pattern, known) for pattern in diffugpt.DIFFUGPT.ignored):
            continue
        parts = [(ours, values) for ours, _, values in to_ours(diffugpt.KEYS, known, tensor, shape)] or [(name, tensor)]
        weights |= {ours.removeprefix("backbone."): values for ours, values in parts}
    return shape, weights
