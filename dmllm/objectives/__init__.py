"""What is learned: objectives by name. An entry is a pair (objective class, config class)."""

from __future__ import annotations

from typing import Any

from dmllm.config import keys_of, refuse_unknown
from dmllm.registry import Table
from dmllm.types import SpecialTokens

OBJECTIVES = Table("objective", {"masked": "dmllm.objectives.masked:MASKED"})


def build_objective(name: str, options: dict[str, Any], special: SpecialTokens, visibility: str) -> Any:
    """The objective called `name`. Raises ValueError for an unknown name or option."""
    objective, config = OBJECTIVES.load(name)
    return objective(config_from(config, options, name), special, visibility)


def config_from(config: type, options: dict[str, Any], name: str) -> Any:
    """A config dataclass from a mapping, unknown keys refused with the nearest known ones."""
    refuse_unknown(list(options), keys_of(config), f"the options of objective {name!r}")
    return config(**options)
