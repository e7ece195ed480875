"""Weights in safetensors files, read strictly: what is missing or unexpected is named, never skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dmllm.hub import find

WEIGHTS = "model.safetensors|model.safetensors.index.json"


def read_weights(folder: Path, *, prefix: str = "", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor whose name starts with `prefix`, under its name without it, from one file or from shards.

    Raises:
        FileNotFoundError: the folder holds no safetensors, or lacks one of its shards.
    """
    first = find(folder, WEIGHTS)
    if first is None:
        raise FileNotFoundError(f"The folder {folder} has no {WEIGHTS.replace('|', ' or ')}.")
    files = [first]
    if first.suffix == ".json":
        files = [folder / f for f in sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))]
    weights = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"The folder {folder} lacks {file.name}, which {first.name} lists.")
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                if name.startswith(prefix):
                    weights[name.removeprefix(prefix)] = shard.get_tensor(name).to(dtype=dtype)
    return weights


def refuse_keys(missing: Iterable[str], unexpected: Iterable[str], where: str | Path, what: str) -> None:
    """Raise ValueError that names the weights `where` lacks for `what`, and those that `what` has no place for."""
    found = [(title, sorted(keys)) for title, keys in (("lacks", missing), ("has unexpected", unexpected))]
    said = [f"{title} {', '.join(keys[:8])} ({len(keys)} in all)" for title, keys in found if keys]
    if said:
        raise ValueError(f"{where} does not fit {what}: it {' and '.join(said)}.")
