"""Published checkpoints, read and written through their family's tables, one weight at a time.

Reading goes shard by shard into a model without storage, so that memory holds one copy of the weights and one shard's
mapped pages. Nothing of a checkpoint is executed. What is missing, left over or wrongly shaped is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor

from dmllm.checkpoints.causes import of_shape
from dmllm.checkpoints.native import write_native
from dmllm.checkpoints.weights import refuse_keys, save_shards, shown, weight_files
from dmllm.config import to_dict
from dmllm.families import FAMILIES, Family
from dmllm.families.family import Key, check_fields, matches, to_ours, to_theirs, whole_of
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel

TIED = {"backbone.lm_head.weight": "backbone.embed_tokens.weight"}  # where tie_word_embeddings


def read_published(
    folder: Path, family: Family, config: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype | None
) -> MultimodalModel:
    """The model of a published checkpoint, ready for evaluation.

    Raises:
        ValueError: a field that our parts do not compute, or a weight too few, too many or of another shape; named.
        FileNotFoundError: a shard is missing.
    """
    try:
        ours = config_of(family, config)
        check_fields(config)
        with init_empty_weights(include_buffers=False):
            model = MultimodalModel(ours)
    except ValueError as error:
        raise ValueError(f"{folder} ({family.title}): {error}") from None
    model.tie_weights()  # without storage each weight is one by itself
    filling = _Filling(model, family, folder, device, dtype)
    files = weight_files(folder)
    for file in shown(files, f"loading {folder.name}"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                filling.take(name, shard.get_tensor(name))
    filling.finish()
    ours.published_names = filling.chosen_names()
    placed: Any = model  # its buffers too
    return placed.to(device).eval()


def config_of(family: Family, published: Mapping[str, Any]) -> DmllmConfig:
    """What a family's config.json is in ours. Its `image_vocabulary`, which no author writes, is over the family's."""
    theirs = {key: value for key, value in published.items() if key != "image_vocabulary"}
    images = published.get("image_vocabulary") or (family.image_vocabulary and family.image_vocabulary(theirs))
    return DmllmConfig(**family.config(theirs), family=family.name, published=theirs, image_vocabulary=images or None)


class _Filling:
    """Parameters and stored buffers that get their values in any order."""

    def __init__(
        self, model: MultimodalModel, family: Family, folder: Path, device: torch.device, dtype: torch.dtype | None
    ):
        self.model, self.family, self.folder, self.device, self.dtype = model, family, folder, device, dtype
        self.wanted = stored_weights(model)
        self.computed = family.computed_weights(model.config.published or {})
        self.missing: dict[str, set[int] | None] = dict.fromkeys(self.wanted)
        self.unexpected: list[str] = []
        self.used: set[str] = set()  # templates of names
        self.copies: dict[str, tuple[str, Tensor]] = {}  # tied weights that are stored once more

    def take(self, name: str, tensor: Tensor) -> None:
        """Put one published weight where it belongs."""
        if any(re.fullmatch(pattern, name) for pattern in self.family.ignored):
            return
        if name in self.computed:
            expected = self.computed[name]
            if expected.shape != tensor.shape or not expected.allclose(tensor.float(), rtol=1e-2):
                raise ValueError(f"{self.folder} ({self.family.title}): {name} is not what config.json makes it.")
            return
        try:
            self.used |= {key.theirs for key in self.family.keys if matches(key, name)}
            parts = list(to_ours(self.family.keys, name, tensor, self.model.config.backbone))
        except ValueError as error:
            raise ValueError(f"{self.folder} ({self.family.title}): {error}") from None
        if parts and (original := TIED.get(parts[0][0])) and self.model.config.tie_word_embeddings:
            self.copies[name] = original, parts[0][2]
            return
        if not parts or any(ours not in self.wanted for ours, _, _ in parts):
            self.unexpected.append(name)
            return
        for ours, place, values in parts:
            self._put(ours, place, values, name)

    def _put(self, ours: str, place: int | None, values: Tensor, name: str) -> None:
        wanted = self.wanted[ours]
        if place is not None and self.missing.get(ours, set()) is None:
            self.missing[ours] = set(range(wanted.shape[0]))
        left = self.missing.get(ours, set())
        if left is not None and place not in left:  # beyond the stack, or given before under another name
            self.unexpected.append(name)
            return
        shape = wanted.shape if place is None else wanted.shape[1:]
        if values.shape != shape:
            raise ValueError(
                f"{self.folder} ({self.family.title}): {name} is {list(values.shape)}, but config.json makes it "
                f"{list(shape)} ({ours}). {of_shape(name)}"
            )
        values = values.to(device=self.device, dtype=self.dtype or values.dtype)
        if place is None:
            _assign(self.model, ours, values)
            self.missing.pop(ours, None)
            return
        if wanted.device.type == "meta":
            _assign(self.model, ours, torch.empty(wanted.shape, dtype=values.dtype, device=self.device))
            self.wanted[ours] = self.model.get_parameter(ours)
        self.wanted[ours].data[place] = values
        assert left is not None
        left.discard(place)
        if not left:
            self.missing.pop(ours)

    def finish(self) -> None:
        """Raise ValueError unless everything was there and had a place, in the names of the checkpoint."""
        lacking = {theirs for name, places in self.missing.items() for theirs in self._published_names(name, places)}
        refuse_keys(lacking, self.unexpected, self.folder, f"{self.family.title} with this config.json")
        for name, (original, copy) in self.copies.items():
            tensor = self.model.get_parameter(original)
            if copy.shape != tensor.shape or not (tensor.is_meta or torch.equal(copy.to(tensor), tensor)):
                raise ValueError(
                    f"{self.folder} ({self.family.title}): {name} is not the embedding, which config.json says it is; "
                    "if they differ on purpose, write tie_word_embeddings: false there."
                )
        self.model.tie_weights()

    def _published_names(self, ours: str, places: set[int] | None) -> list[str]:
        """What the checkpoint calls one of ours, or some places of a stack."""
        keys = _in_order(self.family, self.chosen_names())
        try:
            names = [theirs for theirs, _ in to_theirs(keys, {ours: self.wanted[ours]})]
        except ValueError:
            return [f"(ours: {ours})"]
        if not names:
            return [whole_of(keys, ours)]
        return names if places is None else [names[place] for place in sorted(places)]

    def chosen_names(self) -> list[str]:
        """The templates met here of what a family has more than one name for, or a checkpoint though it is tied."""
        names = [key.ours for key in self.family.keys]
        chosen = (key for key in self.family.keys if names.count(key.ours) > 1 or key.theirs in self.copies)
        return sorted(key.theirs for key in chosen if key.theirs in self.used)


def stored_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are stored with them, under our names; tied weights once."""
    stored = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {**dict(model.named_parameters()), **buffers}


def _in_order(family: Family, chosen: Collection[str]) -> tuple[Key, ...]:
    """The family's keys; where weights have several names, the first, second, ... of all first, as those chosen are."""
    ours = [key.ours for key in family.keys]
    ordinal = {key.theirs: ours[:number].count(key.ours) for number, key in enumerate(family.keys)}
    liked = {ordinal[key.theirs] for key in family.keys if key.theirs in chosen and ours.count(key.ours) > 1}
    return tuple(sorted(family.keys, key=lambda key: ordinal[key.theirs] not in liked))


def _assign(model: torch.nn.Module, name: str, values: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in dict(module.named_buffers(recurse=False)):
        setattr(module, leaf, values)
        return
    learned = getattr(module, leaf).requires_grad and values.is_floating_point()
    setattr(module, leaf, torch.nn.Parameter(values, requires_grad=learned))


def write_published(model: MultimodalModel, folder: str | Path) -> Path:
    """The model as its authors' checkpoint: their names, their config.json. Undoes `read_published`, to the bit.

    Raises:
        ValueError: the model did not come from a published checkpoint.
    """
    if hasattr(model, "stored_names"):
        return write_native(model, folder)
    return write_weights(cast(DmllmConfig, model.config), stored_weights(model), folder)


def write_weights(config: DmllmConfig, weights: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Weights under our names as their authors' checkpoint, of the types they have. Raises as `write_published`."""
    if config.family is None or config.published is None:
        raise ValueError("Only a model that came from a published checkpoint can be written as one; this one did not.")
    family: Family = FAMILIES.load(config.family)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = _in_order(family, config.published_names)
    for copy, original in TIED.items():  # stored once more, if the checkpoint had it so
        if config.tie_word_embeddings and any(k.ours == copy and k.theirs in config.published_names for k in keys):
            weights = {**weights, copy: weights[original]}
    theirs = dict(to_theirs(keys, {name: tensor.detach() for name, tensor in weights.items()}))
    save_shards(theirs | family.computed_weights(config.published), folder)
    fields = to_dict(config.published)
    beside = {name: fields.pop(Path(name).stem) for name in family.beside if Path(name).stem in fields}
    for name, values in {"config.json": fields, **beside}.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder
