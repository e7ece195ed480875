"""Checkpoints recorded from the authors' code, tests/golden/<family>, and copies of them with something changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmllm.checkpoints.published import write_published
from dmllm.objectives.masked import Noised
from dmllm.pipeline import load
from dmllm.types import IGNORE, TEXT, Batch

GOLDEN = Path(__file__).parent.parent / "golden"


class Recorded:
    """One family's folder, what went into the authors' code and what came out."""

    def __init__(self, family: str):
        self.folder = GOLDEN / family
        self.inputs = load_file(self.folder / "inputs.safetensors")
        self.expected = load_file(self.folder / "expected.safetensors")
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.weights = load_file(self.folder / "model.safetensors")

    def load(self):
        return load(str(self.folder), device="cpu")

    def changed(self, out: Path, weights: dict[str, Tensor] | None = None, **config: Any):
        """The pipeline of a copy with other fields of config.json (None: without it), or other weights."""
        fields = {name: value for name, value in {**self.config, **config}.items() if value is not None}
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text(json.dumps(fields))
        save_file(self.weights if weights is None else weights, out / "model.safetensors")
        return load(str(out), device="cpu")


def assert_written_back(pipe: Any, recorded: Recorded, out: Path) -> None:
    """Loaded and written, a checkpoint is the same: names, bits, config.json."""
    written = load_file(write_published(pipe.model, out) / "model.safetensors")
    assert set(written) == set(recorded.weights)
    for name, tensor in recorded.weights.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    assert json.loads((out / "config.json").read_text()) == recorded.config


def corrupted(objective: Any, noisy: Tensor, clean: Tensor, time: Tensor, *, scored: Tensor) -> Noised:
    """A corruption as recorded, laid out, weighted and counted by the objective: what is hidden of what is `scored`.

    `noisy`, `clean` [B, L] ids; `time` broadcasts to them. What is hidden though not scored is hidden all the same.
    """
    batch = Batch(
        input_ids=torch.where(scored, clean, noisy),
        labels=torch.where(scored, clean, IGNORE),
        image_slots=torch.full_like(clean, TEXT),
        documents=torch.zeros_like(clean),
        positions=torch.arange(clean.shape[1]).expand_as(clean),
    )
    hidden = (noisy == objective.special.mask) & scored
    return objective.corrupt(batch, hidden, time.expand(clean.shape))


@torch.no_grad()
def mean(objective: Any, model: Any, noised: Noised) -> float:
    loss = objective.loss(model, noised)["masked"]
    return float(loss.total / loss.count)
