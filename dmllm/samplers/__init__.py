"""How a canvas is denoised: processes by name, each a `Process`, or what makes one of a vocabulary and options."""

from typing import Any

from dmllm.registry import Table
from dmllm.samplers.process import Process

PROCESSES = Table(
    "process",
    {
        "absorbing": "dmllm.samplers.absorbing:ABSORBING",
        "insertion": "dmllm.samplers.insertion:INSERTION",
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
