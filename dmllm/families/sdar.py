"""SDAR 1.7B to 8B: Qwen3's shape in blocks, each seeing itself and those before it; no logit shift.

generate.py calls `steps` of a block denoising_steps (`block_steps`), low_confidence_static `low_confidence` without a
threshold, low_confidence_dynamic `low_confidence` with one, and counts the calls that store keys (`store_calls`). Its
sequential takes no threshold. It draws at temperature 1; temperature 0 takes the most probable token.

Source: Cheng et al., arXiv:2510.06303; code JetAstra/SDAR (generate.py) and the hub's modeling_sdar.py.
"""

from __future__ import annotations

from typing import Any

from dmllm.families import dream
from dmllm.families.family import Family, Fields, need, require

MASK = 151669  # in the released vocabulary


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(config, attention_bias=(False, None))
    eos = need(config, "eos_token_id")
    pad = config.get("pad_token_id")
    return {
        "backbone": {**dream.backbone(config), "qk_norm": True},
        "mask_token_id": mask_token(config),
        "eos_token_id": eos,
        "pad_token_id": eos if pad is None else pad,
        "visibility": f"block:{config.get('block_size') or 4}",
    }


def mask_token(config: Fields) -> int:
    """The mask token (<|MASK|>): that of the released vocabulary, where config.json does not name one."""
    unnamed = config.get("mask_token_id") is None and need(config, "vocab_size") > MASK
    return MASK if unnamed else need(config, "mask_token_id")


def ends(config: Fields) -> dict[str, Any]:
    """What ends an answer, in the released vocabulary: the end of a turn (<|im_end|>) or of a text."""
    return {"eos_token_id": [151645, 151643]} if need(config, "vocab_size") > 151645 else {}


SDAR = Family(
    name="sdar",
    title="SDAR 1.7B, 4B, 8B",
    source="arXiv:2510.06303; JetAstra/SDAR",
    recognise=lambda config: (
        str(config.get("model_type", "")).lower() == "sdar"
        and "num_experts" not in config
        and "vision_config" not in config
    ),
    config=to_dmllm,
    keys=tuple(key for key in dream.KEYS if not key.theirs.endswith(".bias")),
    ignored=(r".*rotary_emb\.inv_freq",),
    tokenizer="Qwen2Tokenizer",
    decode={
        "max_new_tokens": 128,
        "schedule": "fixed",
        "threshold": 0.85,
        "count_mask": True,
        "store_calls": True,
        "eos_early_stop": False,
    },
    decode_of=ends,
    verified="logits, generations, forwards: tests/families/test_sdar.py; loss: tests/families/test_losses.py",
    quirks=(
        (
            "where a block begins with the prompt's last tokens and a call's quota is above what is open, top-k takes "
            "positions that are already known and overwrites them",
            "fixed: what is known stays",
            "which ones it takes depends on how top-k orders equal values",
        ),
    ),
    example={
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "block_size": 4,
        "mask_token_id": 260,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
    },
)
