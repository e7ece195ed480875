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
        "llada": "dmllm.families.llada:LLADA",
        "dream": "dmllm.families.dream:DREAM",
    },
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family whose config.json this is; None if it is of none."""
    for name in FAMILIES:
        family: Family = FAMILIES.load(name)
        if family.recognise(config):
            return family
    return None
