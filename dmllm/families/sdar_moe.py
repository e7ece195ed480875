"""SDAR 30B-A3B: SDAR with experts, in Qwen3-MoE's shape.

The router's softmax runs over all experts; whether the chosen weights are divided by their sum is `norm_topk_prob`.
Blocks, decoding and their names are those of the dense models (`families.sdar`).

Source: Cheng et al., arXiv:2510.06303; code JetAstra/SDAR (generate.py) and the hub's modeling_sdar_moe.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmllm.families import sdar
from dmllm.families.family import Fields, Rename, Stack, need

LAYER, OURS = "model.layers.{n}.mlp.", "backbone.layers.{n}.mlp."
KEYS = (
    *sdar.SDAR.keys,
    Rename(f"{LAYER}gate.weight", f"{OURS}router.weight"),
    *(
        Stack(f"{LAYER}experts.{{e}}.{name}.weight", f"{OURS}experts.{name}")
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
)


def experts(config: Fields) -> dict[str, Any]:
    """The fields of `MoEConfig` from those of Qwen3-MoE."""
    every, dense = config.get("decoder_sparse_step") or 1, set(config.get("mlp_only_layers") or ())
    layers = range(need(config, "num_hidden_layers"))
    return {
        "num_experts": need(config, "num_experts"),
        "num_experts_per_tok": need(config, "num_experts_per_tok"),
        "moe_intermediate_size": need(config, "moe_intermediate_size"),
        "norm_topk_prob": bool(config.get("norm_topk_prob")),
        "dense_layers": [layer for layer in layers if layer in dense or (layer + 1) % every],
    }


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    ours = sdar.to_dmllm(config)
    return {**ours, "backbone": {**ours["backbone"], "moe": experts(config)}}


SDAR_MOE = replace(
    sdar.SDAR,
    name="sdar_moe",
    title="SDAR 30B-A3B chat and Sci",
    recognise=lambda config: (
        str(config.get("model_type", "")).lower() in ("sdar_moe", "sdarmoe", "sdar")
        and "num_experts" in config
        and "vision_config" not in config
    ),
    config=to_dmllm,
    keys=KEYS,
    verified="logits, generations, forwards: tests/families/test_sdar_moe.py",
    example={
        **sdar.SDAR.example,
        "architectures": ["SDARMoeForCausalLM"],
        "model_type": "sdar_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)
