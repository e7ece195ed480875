"""From one format to another: a published folder into ours, ours back into it, a causal language model into a start.

    published --> dmllm    the model and processor that `load` gives, with the weights as they are
    dmllm --> published    their names and their config.json again, to the bit; for what came from a published folder
    causal LM --> dmllm    the same blocks with another visibility and a mask token: it can be trained to denoise
                           (arXiv:2410.17891); with its vision tower, if it has one (Qwen2.5-VL, Qwen3-VL)

A language model that was trained on the next token predicts a position from the row before it, and goes on doing so
(`shift`): under causal visibility the converted model's aligned logits are the source's, moved by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dmllm.checkpoints import folder
from dmllm.checkpoints.causal_lm import KINDS
from dmllm.checkpoints.compose import ModelSpec, compose
from dmllm.checkpoints.native import write_native
from dmllm.checkpoints.published import stored_weights, write_weights
from dmllm.checkpoints.weights import read_weights, refuse_keys, weight_files
from dmllm.families import FAMILIES, family_of
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.nn.visibility import check_layout

FULL = "masked"  # what people call a model that denoises a canvas under full visibility
BLOCK, BLOCK_LENGTH = "block", 32  # without a length, that of LLaDA2 and Fast-dLLM v2
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
OURS = (folder.PROCESSOR, folder.GENERATION)  # files that a published folder does not have


def convert(
    source: str,
    out: str | Path,
    *,
    to: str = "dmllm",
    shift: bool = True,
    vision: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write `source` in another format and return the folder.

    Args:
        source: a folder, packaged name or hub name.
        to: dmllm or published; or, for a causal language model with or without vision, masked (every row sees every
            row), block (blocks of 32 tokens) or block:N.
        shift: for a causal language model, whether a token is predicted by the row before it, as it has learned.
        vision: for one without, the vision encoder that is put before it, e.g. timm:vit_small_patch16_224.
        revision: of a hub name.

    Raises:
        ValueError: `source` cannot become that; says what it can.
        FileExistsError: `out` holds files.
    """
    path, out = folder.resolve(source, revision=revision), Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files already; name another folder.")
    if to in ("dmllm", "published"):
        if vision is not None or not shift:
            raise ValueError(f"to={to!r} changes the format alone; --vision and --no-shift go with --to {FULL}.")
        return _to_dmllm(path, out) if to == "dmllm" else _to_published(path, out)
    visibility = "full" if to == FULL else f"{BLOCK}:{BLOCK_LENGTH}" if to == BLOCK else to
    try:
        check_layout(visibility)
    except ValueError:
        raise ValueError(
            f"to={to!r} is not one of dmllm, published, {FULL}, or block:N such as block:{BLOCK_LENGTH}."
        ) from None
    return _to_denoiser(path, out, visibility, shift, vision)


def _to_dmllm(path: Path, out: Path) -> Path:
    kind = folder.model_type(path)
    if kind == DmllmConfig.model_type:
        raise ValueError(f"{path} is a dmllm folder already; its authors' format is: --to published.")
    family = family_of(folder.read_json(path / folder.CONFIG))
    if family is None:
        can = (
            f"a causal language model, which can become a start: --to {FULL} or --to block:32" if kind in KINDS else ""
        )
        raise ValueError(f"{path} ({kind!r}) is {can or 'of no known family; `dmllm models` lists them'}.")
    loaded = folder.load(path, dtype="auto")
    folder.save(out, loaded.model, loaded.processor, generation=loaded.generation)
    if family.native is not None:
        _copy_weights(path, out)
    return out


def _copy_weights(path: Path, out: Path) -> None:
    """Where both formats have the same names: the files themselves, in which each weight keeps its type."""
    for file in out.glob("*.safetensors*"):
        file.unlink()
    for file in (*weight_files(path), *path.glob("model.safetensors.index.json")):
        shutil.copyfile(file, out / file.name)


def _to_published(path: Path, out: Path) -> Path:
    """Weight by weight from the file, so that each keeps its type."""
    if folder.model_type(path) != DmllmConfig.model_type:
        raise ValueError(f"{path} is no dmllm folder; only one that came from a published checkpoint goes back.")
    config = folder.read_config(path)
    if config.family is not None and FAMILIES.load(config.family).native is not None:
        write_native(folder.load(path, dtype="auto").model, out)
        _copy_weights(path, out)
    else:
        with torch.device("meta"):
            model = MultimodalModel(config)
        wanted, known = stored_weights(model).keys(), model.state_dict().keys()  # tied ones once, and under each name
        weights = read_weights(path)
        refuse_keys(wanted - weights.keys(), weights.keys() - known, path, f"the model of its {folder.CONFIG}")
        write_weights(config, {name: weights[name] for name in weights if name in wanted}, out)
    for pattern in folder.TOKENIZER_FILES:
        for file in path.glob(pattern):
            if not (out / file.name).exists() and file.name not in OURS and ".safetensors." not in file.name:
                shutil.copyfile(file, out / file.name)
    return out


def _to_denoiser(path: Path, out: Path, visibility: str, shift: bool, vision: str | None) -> Path:
    block = check_layout(visibility)
    generation: Mapping[str, Any] = {} if block is None else {"block_length": block}
    spec = ModelSpec(visibility=visibility, shift=shift, generation=dict(generation))
    if folder.model_type(path) in KINDS:
        spec = replace(spec, backbone=str(path), vision=vision)
    elif not _is_start(path):
        starts = [name for name in FAMILIES if FAMILIES.load(name).start]
        raise ValueError(
            f"{path} ({folder.model_type(path)!r}) is no causal language model of a kind that can be converted; "
            f"these can: {', '.join((*KINDS, *starts))}."
        )
    elif vision is not None:
        raise ValueError(f"{path} ({folder.model_type(path)!r}) has a vision tower already; leave --vision out.")
    else:
        spec = replace(spec, checkpoint=str(path))
    model, processor = compose(spec)
    return folder.save(out, model, processor, dtype=_stored_type(path) if vision is None else None)


def _is_start(path: Path) -> bool:
    """Whether it is of a published family that has not learned to denoise."""
    family = family_of(folder.read_json(path / folder.CONFIG))
    return family is not None and family.start


def _stored_type(path: Path) -> torch.dtype:
    """The type of all weights, or one that holds them."""
    found = set()
    for file in weight_files(path):
        with safe_open(file, framework="pt") as shard:
            found |= {shard.get_slice(name).get_dtype() for name in shard.keys()}  # noqa: SIM118 (not a mapping)
    return HALVES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32
