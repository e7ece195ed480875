"""What is learned: objectives by name. An entry is a pair (objective class, config class)."""

from __future__ import annotations

from typing import Any

from dmllm.config import keys_of, refuse_unknown
from dmllm.nn.visibility import ORDERED, check_layout
from dmllm.registry import Table
from dmllm.types import SpecialTokens

OBJECTIVES = Table(
    "objective",
    {
        "masked": "dmllm.objectives.masked:MASKED",
        "unified": "dmllm.objectives.unified:UNIFIED",
        "block": "dmllm.objectives.block:BLOCK",
        "autoregressive": "dmllm.objectives.autoregressive:AUTOREGRESSIVE",
        "mlm": "dmllm.objectives.mlm:MLM",
        "permutation": "dmllm.objectives.permutation:PERMUTATION",
        "uniform": "dmllm.objectives.uniform:UNIFORM",
        "score_entropy": "dmllm.objectives.score_entropy:SCORE_ENTROPY",
        "insertion": "dmllm.objectives.insertion:INSERTION",
        "continuous": "dmllm.objectives.continuous:CONTINUOUS",
    },
)


def build_objective(name: str | None, options: dict[str, Any], special: SpecialTokens, visibility: str) -> Any:
    """The objective called `name`, or the one by which a model of this visibility learns.

    Raises:
        ValueError: unknown name or option, or an objective that is not learned under this visibility.
    """
    name = name or fitting_objective(visibility)
    objective, config = OBJECTIVES.load(name)
    return objective(config_from(config, options, name), special, visibility)


def requirements(name: str | None, options: dict[str, Any], visibility: str) -> dict[str, Any]:
    """What a model of this visibility must be given before it can learn by the objective: the arguments of its `adapt`.

    Raises:
        ValueError: as `build_objective`.
    """
    name = name or fitting_objective(visibility)
    objective, config = OBJECTIVES.load(name)
    asked = getattr(objective, "requires", lambda config, visibility: {})
    return asked(config_from(config, options, name), visibility)


def fitting_objective(visibility: str) -> str:
    """permutation for a model that knows every order, block for one that denoises block after block, else masked."""
    if visibility == ORDERED:
        return "permutation"
    return "masked" if check_layout(visibility) is None else "block"


def config_from(config: type, options: dict[str, Any], name: str) -> Any:
    """A config dataclass from a mapping, unknown keys refused with the nearest known ones."""
    refuse_unknown(list(options), keys_of(config), f"the options of objective {name!r}")
    return config(**options)
