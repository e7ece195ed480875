"""Published models as data: one short file a family, one line in this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmllm.families.family import Family
from dmllm.registry import Table

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES = Table(
    "family",
    {
        "lumina_dimoo": "dmllm.families.lumina_dimoo:LUMINA_DIMOO",  # before LLaDA, whose model type it has
        "mmada": "dmllm.families.mmada:MMADA",
        "diffusion_gemma": "dmllm.families.diffusion_gemma:DIFFUSION_GEMMA",
        "llada_v": "dmllm.families.llada_v:LLADA_V",  # these too, and before Dream
        "lavida": "dmllm.families.lavida:LAVIDA",
        "lavida_dream": "dmllm.families.lavida:LAVIDA_DREAM",
        "llada": "dmllm.families.llada:LLADA",
        "llada_moe": "dmllm.families.llada_moe:LLADA_MOE",
        "llada2": "dmllm.families.llada2:LLADA2",
        "llada_ui": "dmllm.families.llada_ui:LLADA_UI",
        "dream": "dmllm.families.dream:DREAM",
        "dimple": "dmllm.families.dimple:DIMPLE",
        "dream_vl": "dmllm.families.dream_vl:DREAM_VL",
        "qwen2_5_vl": "dmllm.families.qwen2_5_vl:QWEN2_5_VL",
        "qwen3_vl": "dmllm.families.qwen3_vl:QWEN3_VL",
        "qwen3_vl_moe": "dmllm.families.qwen3_vl:QWEN3_VL_MOE",
        "sdar": "dmllm.families.sdar:SDAR",
        "sdar_moe": "dmllm.families.sdar_moe:SDAR_MOE",
        "sdar_vl": "dmllm.families.sdar_vl:SDAR_VL",
        "diffullama": "dmllm.families.diffullama:DIFFULLAMA",
        "diffugpt": "dmllm.families.diffugpt:DIFFUGPT",
        "fast_dllm_v2": "dmllm.families.fast_dllm_v2:FAST_DLLM_V2",
        "mdlm": "dmllm.families.mdlm:MDLM",
        "mdlm_hub": "dmllm.families.mdlm:MDLM_HUB",
        "bd3lm": "dmllm.families.bd3lm:BD3LM",
    },
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family whose config.json this is; None if it is of none."""
    for name in FAMILIES:
        family: Family = FAMILIES.load(name)
        if family.recognise(config):
            return family
    return None
