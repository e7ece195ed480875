"""LLaDA-MoE 7B-A1B: base and instruct. OLMoE's shape with full attention and no logit shift.

The router's softmax runs over all experts and the chosen weights are not divided by their sum. Neither config.json nor
generation defaults name the mask; in the tokenizer, which LLaDA2 shares, it is the third token after <|endoftext|>.

Source: Zhu et al., arXiv:2509.24389; code inclusionAI/LLaDA-MoE on the hub (modeling_lladamoe.py), decoded by
ML-GSAI/LLaDA's generate.py.
"""

from __future__ import annotations

from typing import Any

from dmllm.families.family import Family, Fields, Rename, Stack, need, require, rope_theta

LAYER = "model.layers.{n}."
OURS = "backbone.layers.{n}."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
KEYS = (
    Rename("model.embed_tokens.weight", "backbone.embed_tokens.weight"),
    Rename("model.norm.weight", "backbone.norm.weight"),
    Rename("lm_head.weight", "backbone.lm_head.weight"),
    *(
        Rename(f"{LAYER}{part}.weight", f"{OURS}{part}.weight")
        for part in (
            *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *(f"mlp.{name}" for name in PROJECTIONS),  # of layers without experts
            "input_layernorm",
            "post_attention_layernorm",
        )
    ),
    Rename(f"{LAYER}mlp.gate.weight", f"{OURS}mlp.router.weight"),
    *(Stack(f"{LAYER}mlp.experts.{{e}}.{name}.weight", f"{OURS}mlp.experts.{name}") for name in PROJECTIONS),
)


def mask_after(pad: int, vocab_size: int) -> int:
    """The mask token of the tokenizer of LLaDA-MoE and LLaDA2 (156892 -> 156895). Raises ValueError beyond the rows."""
    if pad + 3 >= vocab_size:
        raise ValueError(f"config.json lacks mask_token_id, and pad_token_id + 3 is beyond vocab_size={vocab_size}.")
    return pad + 3


def backbone(config: Fields) -> dict[str, Any]:
    """The fields of `TransformerConfig`."""
    require(
        config,
        hidden_act="silu",
        attention_bias=(False, None),
        clip_qkv=None,
        shared_expert_intermediate_size=None,
        moe_router_enable_expert_bias=(False, None),
        moe_router_score_function=("softmax", None),
        routed_scaling_factor=(1, None),
        router_num_group=(None, 1, -2),
        router_topk_group=(None, 1, -2),
    )
    layers, heads = need(config, "num_hidden_layers"), need(config, "num_attention_heads")
    kinds = need(config, "moe_layer_freq")
    if len(kinds) != layers or set(kinds) - {0, 1}:
        raise ValueError(f"config.json: moe_layer_freq={kinds!r} must say 0 or 1 for each of the {layers} layers.")
    rotary = int(need(config, "hidden_size") // heads * (config.get("partial_rotary_factor") or 1))
    return {
        **{name: need(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "intermediate_size": config.get("dense_intermediate_size"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_theta": rope_theta({**config, "partial_rotary_factor": None}),
        "rotary_dim": rotary,
        "qk_norm": bool(config.get("qk_layernorm")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "moe": {
            "num_experts": need(config, "num_experts"),
            "num_experts_per_tok": need(config, "num_experts_per_tok"),
            "moe_intermediate_size": need(config, "expert_intermediate_size"),
            "dense_layers": [layer for layer, kind in enumerate(kinds) if kind == 0],
        },
    }


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    shape, eos = backbone(config), need(config, "eos_token_id")
    pad = eos if config.get("pad_token_id") is None else config["pad_token_id"]
    mask = config.get("mask_token_id")
    return {
        "backbone": shape,
        "mask_token_id": mask_after(pad, shape["vocab_size"]) if mask is None else mask,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "visibility": "full",
    }


LLADA_MOE = Family(
    name="llada_moe",
    title="LLaDA-MoE 7B-A1B base and instruct",
    source="arXiv:2509.24389; inclusionAI/LLaDA-MoE",
    recognise=lambda config: (
        config.get("model_type") in ("lladamoe", "llada_moe", "llada") and "expert_intermediate_size" in config
    ),
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq",),
    decode={"max_new_tokens": 128, "block_length": 32, "count_mask": True},
    verified="logits, generations, forwards: tests/families/test_llada_moe.py",
    quirks=(
        (
            "norm_topk_prob of config.json is never read",
            "it is not read here either",
            "the weights of the chosen experts are those of the softmax over all, as trained",
        ),
    ),
    example={
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "lladamoe",
        "vocab_size": 264,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "dense_intermediate_size": 64,
        "expert_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_layer_freq": [1, 1],
        "qk_layernorm": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "tie_word_embeddings": False,
    },
)
