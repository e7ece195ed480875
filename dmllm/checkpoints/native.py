"""Published checkpoints whose model transformers itself has: read by it, as strictly, and written back to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from dmllm.checkpoints.weights import refuse_keys, save_shards, weight_files
from dmllm.config import to_dict
from dmllm.families import FAMILIES, Family
from dmllm.registry import Table

ADAPTERS = Table("adapter", {})


def read_native(
    folder: Path, family: Family, config: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype | None
) -> Any:
    """The model of a published checkpoint behind the family's adapter, ready for evaluation.

    Raises:
        ValueError: this transformers does not have the model, or a weight is missing, unexpected or of another shape.
        FileNotFoundError: a shard is missing.
    """
    native, kind = family.native, _class(family)
    assert native is not None
    inner, report = kind.from_pretrained(
        folder,
        config=kind.config_class.from_dict(_own(family, config)),
        dtype=dtype or "auto",
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
        attn_implementation="eager" if device.type == "cpu" else None,  # which rounds as the recorded runs did
        generation_config=kind.generation_config_class(),  # decode settings are the pipeline's
    )
    wrong = [f"{name} ({list(stored)} for {list(wanted)})" for name, stored, wanted in report["mismatched_keys"]]
    missing, names = set(report["missing_keys"]), _stored_names(folder)
    if native.optional and not any(re.fullmatch(native.optional, name) for name in names):
        missing = {name for name in missing if not re.fullmatch(native.optional, name)}
    what = f"{family.title} with this config.json"
    refuse_keys(missing, [*report["unexpected_keys"], *wrong], folder, what)
    model = ADAPTERS.load(native.adapter)(inner.to(device), family.name, config, names)
    return model.eval()


def draw_native(family: Family, config: Mapping[str, Any]) -> Any:
    """A model of this config.json with random weights, from torch's global generator. Raises as `read_native`."""
    kind = _class(family)
    assert family.native is not None
    inner = kind(kind.config_class.from_dict(_own(family, config)))
    return ADAPTERS.load(family.native.adapter)(inner, family.name, config).eval()


def save_native(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Weights under the names that they were read by, and the config.json of our own format, which holds theirs."""
    weights = model.inner.state_dict()
    if dtype is not None:
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    names = [name for name in model.stored_names if name in weights]
    folder.mkdir(parents=True, exist_ok=True)
    if names and len(names) == len(model.stored_names):
        save_shards({name: weights[name] for name in names}, folder)
    else:  # none were read, or transformers has renamed or stacked some and undoes that
        model.inner.save_pretrained(folder, state_dict=weights)
    model.config.save_pretrained(folder)


def write_native(model: Any, folder: str | Path) -> Path:
    """The inverse of `read_native`, to the bit: the weights under the names that they were read by."""
    folder = Path(folder)
    save_native(model, folder)
    family: Family = FAMILIES.load(model.config.family)
    fields = to_dict(model.config.published)
    beside = {name: fields[Path(name).stem] for name in family.beside if Path(name).stem in fields}
    for name, values in {"config.json": _own(family, fields), **beside}.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def _own(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json itself, without the files that stood beside it."""
    return {name: value for name, value in config.items() if f"{name}.json" not in family.beside}


def _class(family: Family) -> Any:
    assert family.native is not None
    kind = getattr(transformers, family.native.model, None)
    if kind is None:
        raise ValueError(
            f"{family.title} needs a transformers that has {family.native.model}; this is transformers "
            f"{transformers.__version__}. Type: pip install --upgrade transformers"
        )
    return kind


def _stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            names |= set(shard.keys())
    return names
