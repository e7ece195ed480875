"""Dream 7B and DiffuCoder: Qwen2's shape with full attention; the row before a position predicts it.

Source: Ye et al., arXiv:2508.15487; code DreamLM/Dream (modeling_dream.py, generation_utils.py).
"""

from __future__ import annotations

from typing import Any

from dmllm.families.family import Family, Fields, Rename, need, require, rope_theta

LAYER = "model.layers.{n}."
KEYS = (
    Rename("model.embed_tokens.weight", "backbone.embed_tokens.weight"),
    Rename("model.norm.weight", "backbone.norm.weight"),
    Rename("lm_head.weight", "backbone.lm_head.weight"),
    *(
        Rename(f"{LAYER}self_attn.{part}.{kind}", f"backbone.layers.{{n}}.self_attn.{part}.{kind}")
        for part in ("q_proj", "k_proj", "v_proj")
        for kind in ("weight", "bias")
    ),
    *(
        Rename(f"{LAYER}{part}.weight", f"backbone.layers.{{n}}.{part}.weight")
        for part in (
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    ),
)

EXAMPLE = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 320,
    "mask_token_id": 302,
    "bos_token_id": 300,
    "eos_token_id": 300,
    "pad_token_id": 300,
}


def backbone(config: Fields) -> dict[str, Any]:
    """The fields of `TransformerConfig` from those that Llama, Qwen2 and Qwen3 share."""
    require(config, hidden_act="silu", use_sliding_window=(False, None), mlp_bias=(False, None))
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {
        **{name: need(config, name) for name in names},
        "num_key_value_heads": config.get("num_key_value_heads") or need(config, "num_attention_heads"),
        "head_dim": config.get("head_dim"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope_theta(config),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    eos = need(config, "eos_token_id")
    return {
        "backbone": {**backbone(config), "qkv_bias": True},
        "mask_token_id": need(config, "mask_token_id"),
        "eos_token_id": eos,
        "pad_token_id": config.get("pad_token_id", eos),
        "visibility": "full",
        "shift": True,
    }


DREAM = Family(
    name="dream",
    title="Dream 7B base and instruct, DiffuCoder",
    source="arXiv:2508.15487; DreamLM/Dream",
    recognise=lambda config: str(config.get("model_type", "")).lower() == "dream" and "vision_config" not in config,
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq",),
    tokenizer="Qwen2Tokenizer",
    decode={"max_new_tokens": 128, "schedule": "time", "remasking": "entropy", "count_mask": True},
    verified="logits, generations, forwards: tests/families/test_dream.py; loss: tests/families/test_losses.py",
    quirks=(
        (
            "The rows of a batch share one quota, the mean of what is masked in them",
            "fixed",
            "a row gives the same tokens alone and in a batch; the same where rows have the same number of masks",
        ),
        (
            "A step may commit no token, and its call is made all the same",
            "schedule: time, the default here",
            "it is the authors' number of calls; schedule: even commits in every step",
        ),
        (
            "The tokenizer is code in the checkpoint",
            "fixed",
            "it is Qwen2's under another name, and is read as that",
        ),
    ),
    example=EXAMPLE,
)
