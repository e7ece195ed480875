"""`pytest --device cuda tests/families`: the recorded cases on an accelerator, in float32, held to the same numbers.

What a test loads through the pipeline is put there, and what the pipeline returns is brought back. A test that hands
CPU tensors to the model itself is skipped, and says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dmllm import pipeline


class OnDevice(pipeline.Pipeline):
    """A pipeline on an accelerator whose results lie on the CPU."""

    def logits(self, *args: Any, **options: Any) -> Any:
        return super().logits(*args, **options).cpu()

    def score(self, *args: Any, **options: Any) -> Any:
        return super().score(*args, **options).cpu()

    def generate(self, *args: Any, **options: Any) -> Any:
        out = super().generate(*args, **options)
        trajectory = [
            replace(
                step, **{name: value.cpu() for name, value in vars(step).items() if isinstance(value, torch.Tensor)}
            )
            for step in out.trajectory
        ]
        return replace(out, sequences=out.sequences.cpu(), num_forwards=out.num_forwards.cpu(), trajectory=trajectory)


def use(device: str) -> None:
    """From here on `dmllm.pipeline.load` loads to `device`, whatever it is asked for."""
    original = pipeline.load

    def load(path: str, **options: Any) -> Any:
        loaded = original(path, **{**options, "device": device})
        loaded.__class__ = OnDevice
        return loaded

    pipeline.load = load


def pytest_runtest_setup() -> None:
    """What a training run has set for its own speed does not outlast it."""
    torch.set_float32_matmul_precision("highest")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Any:
    """A test that passes by the pipeline says nothing about the device: skipped, with what torch said."""
    try:
        return (yield)
    except RuntimeError as error:
        if "on the same device" in str(error):
            pytest.skip(f"hands tensors to the model itself: {str(error)[:80]}")
        raise
