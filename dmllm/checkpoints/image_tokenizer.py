"""Folders of image tokenizers: config.json and model.safetensors, read strictly, written beside their place, renamed.

Folders of Show-o's MAGVITv2 and of diffusers' VQModel are read as they are, whatever they call their weights.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from dmllm.checkpoints.weights import read_weights, refuse_keys, save_shards
from dmllm.hub import fetch
from dmllm.models.image_tokenizers import IMAGE_TOKENIZERS, PUBLISHED, ImageTokenizer, build_image_tokenizer
from dmllm.registry import nearest

CONFIG = "config.json"
NAMES = ("model", "diffusion_pytorch_model", "pytorch_model")
WEIGHTS = "|".join(f"{name}.safetensors{ending}" for name in NAMES for ending in ("", ".index.json"))


def load_image_tokenizer(
    path_or_name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> ImageTokenizer:
    """Read a folder or a hub name, for evaluation.

    Args:
        path_or_name: may also be the folder above one called vqvae, as Lumina-DiMOO and Meissonic publish theirs.
        device: where it goes; None is the CPU.
        dtype: of the weights, whatever the file's.

    Raises:
        FileNotFoundError: there is no such folder or name, or it lacks a file; says what to type.
        ValueError: it is no image tokenizer, or weights are missing, unexpected or of the wrong shape; named.
        ImportError: a library that it needs is missing; says what to install.
    """
    inner = Path(path_or_name) / "vqvae"
    folder = fetch(str(inner if inner.is_dir() else path_or_name), (CONFIG, WEIGHTS), revision=revision)
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    name = str(fields.pop("model_type", None) or fields.get("_class_name"))
    name = PUBLISHED.get(name, name)
    if name not in IMAGE_TOKENIZERS and ":" not in name:
        raise ValueError(
            f"{folder / CONFIG} is of {name!r}, which is no image tokenizer; "
            f"{nearest(name, [*IMAGE_TOKENIZERS, *PUBLISHED])}"
        )
    tokenizer = build_image_tokenizer(name, fields)
    _put(tokenizer, read_weights(folder, names=WEIGHTS), folder)
    return tokenizer.to(device=device, dtype=dtype).eval()


def save_image_tokenizer(tokenizer: ImageTokenizer, path: str | Path) -> Path:
    """Write the folder; one that is there is replaced at the end, so a reader never sees half of it.

    Raises:
        ValueError: `path` is a folder that holds something other than an image tokenizer.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise ValueError(f"{path} holds files but no {CONFIG}, so it is not replaced; name another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    save_shards(tokenizer.state_dict(), new)
    config = json.dumps({"model_type": name_of(tokenizer), **tokenizer.fields()}, indent=2)
    (new / CONFIG).write_text(config + "\n", encoding="utf-8")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    return path


def name_of(tokenizer: ImageTokenizer) -> str:
    """Its name in the table, or its path."""
    target = f"{type(tokenizer).__module__}:{type(tokenizer).__name__}"
    return next((name for name, entry in IMAGE_TOKENIZERS.items() if entry == target), target)


def _put(tokenizer: ImageTokenizer, weights: dict[str, Tensor], folder: Path) -> None:
    wanted = tokenizer.state_dict()
    wrong = [
        f"{name} ({list(weights[name].shape)} for {list(tensor.shape)})"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    refuse_keys(
        wanted.keys() - weights.keys(),
        [*(weights.keys() - wanted.keys()), *wrong],
        folder,
        f"the image tokenizer of its {CONFIG}",
    )
    tokenizer.load_state_dict(weights)
