"""Backbones by name. An entry is a pair (module class, config class)."""

from __future__ import annotations

from dmllm.registry import Table

BACKBONES = Table(
    "backbone",
    {
        "transformer": "dmllm.models.backbones.transformer:TRANSFORMER",
        "dit": "dmllm.models.backbones.dit:DIT",
        "gpt2": "dmllm.models.backbones.gpt2:GPT2",
    },
)
