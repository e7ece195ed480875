"""How a canvas is denoised: processes by name, each a `Process`, or what makes one of a vocabulary and options."""

from typing import Any

from dmllm.registry import Table
from dmllm.samplers.process import Process

PROCESSES = Table(
    "process",
    {
        "absorbing": "dmllm.samplers.absorbing:ABSORBING",
        "uniform": "dmllm.samplers.uniform:uniform",
        "insertion": "dmllm.samplers.insertion:process",
        "gaussian": "dmllm.samplers.gaussian:GAUSSIAN",
    },
)


def process_of(model: Any) -> Process:
    """What a model undoes, as its config says: `process`, and `process_options` for one that takes any.

    Raises:
        ValueError: an unknown name.
    """
    config = model.config
    found = PROCESSES.load(config.process)
    return found if isinstance(found, Process) else found(model.vocabulary, **config.process_options)


def check_masks(model: Any, what: str) -> None:
    """Raises ValueError where `what`, which hides tokens behind masks, would say nothing of the model."""
    if not process_of(model).masks:
        raise ValueError(
            f"{what} hides tokens behind masks, and this model undoes something else (process="
            f"{model.config.process!r} in its config.json); ask it by chat() or generate()."
        )
