"""LLaDA2.0 and 2.1, mini and flash: experts chosen in groups, rotary positions on half of each head, block diffusion.

The hub stores one weight for each expert, dFactory's training format one stack for all experts of a layer; either is
read, and written back as it was. config.json names neither the mask nor the block: the mask is the third token after
<|endoftext|>, and `generate` decodes blocks of 32, counted from the first token of the prompt.

Of generate's arguments, gen_length is `max_new_tokens` and steps is `block_steps` (at most gen_length // minimal_topk);
2.1's threshold, editing_threshold, max_post_steps and num_to_transfer have their names. It computes what stands before
a block anew in every call; here it is stored, which changes neither tokens nor the number of calls.

Source: arXiv:2512.15745; code inclusionAI/LLaDA2.0-mini on the hub (modeling_llada2_moe.py) and inclusionAI/dFactory.
"""

from __future__ import annotations

from typing import Any

from dmllm.families.family import Family, Fields, Rename, Split, Stack, need, require
from dmllm.families.llada_moe import PROJECTIONS, mask_after

LAYER = "model.layers.{n}."
OURS = "backbone.layers.{n}."
DFACTORY = "llada2_moe_veomni"


def qkv_rows(shape: Fields) -> tuple[int, int, int]:
    """Rows of the queries, keys and values in the fused projection."""
    queries, shared = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return queries, shared, shared


KEYS = (
    Rename("model.word_embeddings.weight", "backbone.embed_tokens.weight"),
    Rename("model.norm.weight", "backbone.norm.weight"),
    Rename("lm_head.weight", "backbone.lm_head.weight"),
    *(
        Split(
            f"{LAYER}attention.query_key_value.{kind}",
            tuple(f"{OURS}self_attn.{part}_proj.{kind}" for part in "qkv"),
            qkv_rows,
        )
        for kind in ("weight", "bias")
    ),
    *(
        Rename(f"{LAYER}{theirs}.weight", f"{OURS}{ours}.weight")
        for theirs, ours in (
            ("attention.dense", "self_attn.o_proj"),
            ("attention.query_layernorm", "self_attn.q_norm"),
            ("attention.key_layernorm", "self_attn.k_norm"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("mlp.gate", "mlp.router"),
            *((f"mlp.{name}", f"mlp.{name}") for name in PROJECTIONS),  # of layers without experts
            *((f"mlp.shared_experts.{name}", f"mlp.shared_expert.{name}") for name in PROJECTIONS),
        )
    ),
    Rename(f"{LAYER}mlp.gate.expert_bias", f"{OURS}mlp.router.bias"),
    *(Stack(f"{LAYER}mlp.experts.{{e}}.{name}.weight", f"{OURS}mlp.experts.{name}") for name in PROJECTIONS),
    *(Rename(f"{LAYER}mlp.experts.{name}", f"{OURS}mlp.experts.{name}") for name in PROJECTIONS),  # dFactory
)


def experts(config: Fields) -> dict[str, Any]:
    """The fields of `MoEConfig`. Where a field is absent, the authors' configuration class has these values too."""
    width, chosen = need(config, "moe_intermediate_size"), need(config, "num_experts_per_tok")
    return {
        "num_experts": need(config, "num_experts"),
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width * (config.get("num_shared_experts") or 0),
        "dense_layers": list(range(config.get("first_k_dense_replace", 0))),
        "score_function": "sigmoid",
        "norm_topk_prob": chosen > 1,
        "routed_scaling_factor": config.get("routed_scaling_factor", 2.5),
        "n_group": config.get("n_group", 8),
        "topk_group": config.get("topk_group", 4),
        "expert_bias": True,
    }


def backbone(config: Fields) -> dict[str, Any]:
    """The fields of `TransformerConfig`."""
    require(
        config,
        hidden_act="silu",
        rope_scaling=None,
        use_bias=False,
        use_rmsnorm=(True, None),
        use_sliding_window=(False, None),
        norm_head=(False, None),
        norm_softmax=(False, None),
        score_function=("sigmoid", None),
    )
    hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    head_dim = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or {}
    part = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 0.5))
    always = config.get("model_type") == DFACTORY  # its attention normalises without asking the field
    return {
        "vocab_size": need(config, "vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": need(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "intermediate_size": config.get("intermediate_size"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta", 10000.0),
        "rotary_dim": int(head_dim * part),
        "qk_norm": always or bool(config.get("use_qk_norm", True)),
        "qkv_bias": bool(config.get("use_qkv_bias")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "moe": experts(config),
    }


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    shape = backbone(config)
    eos, pad = config.get("eos_token_id"), config.get("pad_token_id")
    pad = need(config, "pad_token_id", "eos_token_id") if pad is None else pad
    mask = config.get("mask_token_id")
    return {
        "backbone": shape,
        "mask_token_id": mask_after(pad, shape["vocab_size"]) if mask is None else mask,
        "eos_token_id": pad if eos is None else eos,
        "pad_token_id": pad,
        "visibility": f"block:{config.get('block_length') or config.get('block_size') or 32}",
    }


LLADA2 = Family(
    name="llada2",
    title="LLaDA2.0 and 2.1, mini and flash",
    source="arXiv:2512.15745; inclusionAI/LLaDA2.0-mini, inclusionAI/dFactory",
    recognise=lambda config: (
        config.get("model_type") in ("llada2_moe", "llada21_moe", DFACTORY) and "vision_config" not in config
    ),
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq",),
    decode={
        "max_new_tokens": 512,
        "block_length": 32,
        "schedule": "fixed",
        "threshold": 0.95,
        "count_mask": True,
        "eos_early_stop": False,
    },
    verified="logits with block and with full visibility: tests/families/test_llada2.py; generations of 2.0, of 2.1 "
    "(editing), and their forwards: tests/families/test_llada2_decode.py",
    quirks=(
        (
            "norm_topk_prob, rotary_dim and moe_router_enable_expert_bias of config.json are never read",
            "they are not read here either",
            "weights are always normalised, partial_rotary_factor says what turns, and the bias is always there",
        ),
        (
            "given a mask of two dimensions, the model attends causally",
            "fixed: padding is padding, and what a row sees is its block and those before",
            "generate passes the mask of four dimensions, which says so",
        ),
        (
            "2.1's generate without eos_early_stop fills every block, and cuts the answer at its end then",
            "fixed: it stops behind the block that holds the end; eos_token_id=[] makes all calls",
            "the answer is the same",
        ),
    ),
    example={
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "rope_theta": 600000,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "pad_token_id": 257,
        "tie_word_embeddings": False,
    },
)
