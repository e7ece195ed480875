"""A random model of any family, in its published format: to try pipelines, servers and converters without weights.

It is the family's tiny `example` config.json, or that with more width and depth, or one's own; the weights are drawn
and written under the authors' names. Where the vocabulary has room for the 256 bytes, a byte-level tokenizer is written
too, so that the model can be asked; it answers noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dmllm.checkpoints.native import draw_native
from dmllm.checkpoints.published import config_of, write_published
from dmllm.checkpoints.tokenizer import byte_tokenizer
from dmllm.config import read_yaml
from dmllm.families import FAMILIES, Family
from dmllm.models.multimodal import MultimodalModel

GROWTH = 4  # of every width, of the number of heads and of layers, from tiny to small; heads stay as wide
WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "hidden_dim", "cond_dim", "mm_hidden_size", "out_hidden_size"),
    *("intermediate_size", "mlp_hidden_size", "moe_intermediate_size"),
    *("dense_intermediate_size", "expert_intermediate_size", "shared_expert_intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "n_heads", "n_head", "n_kv_heads"),
)
DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "n_blocks")


def write_example(family_name: str, out: str | Path, *, size: str = "tiny", seed: int = 0) -> Path:
    """Write the folder: config.json, model.safetensors and, where it has room, a tokenizer.

    Args:
        family_name: a name of `FAMILIES`.
        size: tiny; small (4 times the width and depth); or a YAML of config.json fields that replace tiny's.
        seed: of the weights.

    Raises:
        ValueError: unknown family or size, or fields that our parts do not compute; named.
        FileExistsError: the folder holds files.
    """
    family: Family = FAMILIES.load(family_name)
    if not family.example:
        raise ValueError(f"The family {family_name} has no example to start from.")
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files already; name another folder.")
    fields = _fields(family, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = draw_native(family, fields) if family.native else _drawn(family, fields)
    write_published(model, folder)
    tokenizer = byte_tokenizer(model.config.special, len(model.get_input_embeddings().weight))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def _drawn(family: Family, fields: Mapping[str, Any]) -> MultimodalModel:
    model = MultimodalModel(config_of(family, fields))
    model.initialise()
    with torch.no_grad():  # what begins as nothing (a DiT's last matrix) would answer nothing
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=0.02)
    return model


def _fields(family: Family, size: str) -> dict[str, Any]:
    if size == "tiny":
        return dict(family.example)
    if size == "small":
        return _grown(family.example)
    if size.endswith((".yaml", ".yml")):
        return {**family.example, **read_yaml(Path(size))}
    raise ValueError(f"size={size!r} is not one of tiny, small, or the path of a .yaml with fields of config.json.")


def _grown(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with more width and depth, those of parts too; what is listed layer by layer is repeated."""
    layers = next((fields[name] for name in DEPTHS if name in fields), None)
    grown: dict[str, Any] = {}
    for name, value in fields.items():
        layered = isinstance(value, list) and len(value) == layers and name != "architectures"
        grows = layered or (type(value) is int and name in (*WIDTHS, *DEPTHS))
        grown[name] = _grown(value) if isinstance(value, Mapping) else value * GROWTH if grows else value
    return grown
