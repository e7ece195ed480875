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
    weights = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                if name.startswith(prefix):
                    weights[name.removeprefix(prefix)] = shard.get_tensor(name).to(dtype=dtype)
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or its shards.

    Raises:
        FileNotFoundError: there is none, or a shard is missing; says what to do where there are only pickles.
    """
    first = find(folder, WEIGHTS)
    if first is None:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        advice = (
            f" It has {pickles[0]}: a pickle can run code when it is read, so it is not; let its publisher, or "
            "transformers on a machine that trusts it, save it as safetensors (save_pretrained)."
            if pickles
            else ""
        )
        raise FileNotFoundError(f"The folder {folder} has no {WEIGHTS.replace('|', ' or ')}.{advice}")
    if first.suffix != ".json":
        return [first]
    names = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"The folder {folder} lacks {name}, which {first.name} lists.")
    return [folder / name for name in names]


def refuse_keys(missing: Iterable[str], unexpected: Iterable[str], where: str | Path, what: str) -> None:
    """Raise ValueError that names the weights `where` lacks for `what`, and those that `what` has no place for."""
    found = [(title, sorted(keys)) for title, keys in (("lacks", missing), ("has unexpected", unexpected))]
    said = [f"{title} {', '.join(keys[:8])} ({len(keys)} in all)" for title, keys in found if keys]
    if said:
        raise ValueError(f"{where} does not fit {what}: it {' and '.join(said)}.")
