"""Weights in safetensors files, read strictly: what is missing or unexpected is named, never skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmllm.checkpoints import causes
from dmllm.hub import find, pickle_advice

WEIGHTS = "model.safetensors|model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of a file that is written
LARGE = 10**9  # bytes from which reading is shown on a terminal


def read_weights(
    folder: Path, *, prefix: str = "", dtype: torch.dtype | None = None, names: str = WEIGHTS
) -> dict[str, Tensor]:
    """Every tensor whose name starts with `prefix`, under its name without it, from one file or from shards.

    Args:
        names: what the file may be called, or the index of its shards, the preferred one first.

    Raises:
        FileNotFoundError: the folder holds no safetensors, or lacks one of its shards.
    """
    weights = {}
    for file in weight_files(folder, names):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                if name.startswith(prefix):
                    weights[name.removeprefix(prefix)] = shard.get_tensor(name).to(dtype=dtype)
    return weights


def weight_files(folder: Path, names: str = WEIGHTS) -> list[Path]:
    """The safetensors files of a folder: one, or its shards.

    Raises:
        FileNotFoundError: there is none, or a shard is missing; says what to do where there are only pickles.
    """
    first = find(folder, names)
    if first is None:
        wanted = names.replace("|", " or ")
        raise FileNotFoundError(f"The folder {folder} has no {wanted}.{pickle_advice(folder)}")
    if first.suffix != ".json":
        return [first]
    shards = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in shards:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"The folder {folder} lacks {name}, which {first.name} lists.")
    return [folder / name for name in shards]


def shown(files: Sequence[Path], what: str) -> Iterator[Path]:
    """The files one after another, with a bar of the bytes done on stderr where they are many and it is a terminal."""
    sizes = [file.stat().st_size for file in files]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    hidden = sum(sizes) < LARGE or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=sum(sizes))
        for file, size in zip(files, sizes, strict=True):
            yield file
            progress.advance(task, size)


def save_shards(weights: Mapping[str, Tensor], folder: Path, *, size: int = SHARD) -> None:
    """Write model.safetensors, or shards of at most `size` bytes (or one weight) with their index."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in weights.items():
        if shards[-1] and held + tensor.nbytes > size:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        # Parts of one tensor would be refused as shared memory, so each is written from a copy of its own.
        part = {name: weights[name].cpu().contiguous().clone() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def refuse_keys(missing: Iterable[str], unexpected: Iterable[str], where: str | Path, what: str) -> None:
    """Raise ValueError that names the weights `where` lacks for `what`, those that `what` has no place for, and why."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    found = (("lacks", missing), ("has unexpected", unexpected))
    said = [f"{title} {', '.join(keys[:8])} ({len(keys)} in all)" for title, keys in found if keys]
    if said:
        cause = causes.of_names(missing, unexpected)
        raise ValueError(f"{where} does not fit {what}: it {' and '.join(said)}. {cause}")
