"""How a GPU decodes, acted out on a CPU: fixed shapes, calls through tensors alone, and a host that learns late.

What a GPU adds, that calls are replayed, is tested where there is one (tests/test_pipeline.py).
"""

from __future__ import annotations

import pytest
import torch

import dmllm.samplers.absorbing
import dmllm.samplers.ahead
import dmllm.samplers.denoise
import dmllm.samplers.stream
from tests.samplers.test_approximate import POLICIES
from tests.samplers.test_approximate import SETTINGS as OF_WHOLE
from tests.samplers.test_blocks import SETTINGS as OF_BLOCKS
from tests.samplers.test_blocks import make, prompts, seeds

CASES = [
    *(("block:4", settings) for settings in OF_BLOCKS),
    *(("full", settings) for settings in OF_WHOLE),
    *(("prefix", settings) for settings in OF_WHOLE),
    *(("full", {"cache": policy, "max_new_tokens": 12, **s}) for policy in POLICIES[:3] for s in OF_WHOLE),
]


class Late:
    """A flag that arrives at once."""

    def __init__(self, value: torch.Tensor):
        self.value = value

    def read(self) -> bool:
        return bool(self.value)

    @staticmethod
    def send(value: torch.Tensor) -> Late:
        return Late(value)


class Replayed:
    """A graph that computes."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize(("visibility", "settings"), CASES, ids=str)
def test_a_gpus_loop_finds_the_tokens_of_a_cpus(visibility: str, settings: dict, shift: bool, monkeypatch) -> None:
    pipe = make(shift, visibility)
    plain = pipe.generate(*prompts(), generator=seeds(), **settings)
    monkeypatch.setattr(dmllm.samplers.stream, "is_static", lambda device: True)
    monkeypatch.setattr(dmllm.samplers.denoise, "is_static", lambda device: True)
    monkeypatch.setattr(dmllm.samplers.absorbing, "is_static", lambda device: True)
    monkeypatch.setattr(dmllm.samplers.stream, "Graphed", Replayed)
    monkeypatch.setattr(dmllm.samplers.ahead, "Flag", Late)
    static = pipe.generate(*prompts(), generator=seeds(), **settings)
    assert torch.equal(plain.sequences, static.sequences)
    assert torch.equal(plain.num_forwards, static.num_forwards)
    assert static.trajectory[-1].num_wasted == 1
    assert len(static.trajectory) == len(plain.trajectory)
