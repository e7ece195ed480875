"""What a published line of models is to this framework: data, from which one loader does the rest.

A family says how to tell its `config.json`, what of ours that configuration describes, what its weights are called, and
how the authors ask it. Loading is strict both ways: a field with a value that our parts do not compute is refused by
name, and so is a weight too few, too many or of the wrong shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmllm.image_vocabulary import ImageVocabulary

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Rename:
    """One published weight is one of ours. `{n}`, `{e}` stand for numbers: "h.{n}.w" <-> "layers.{n}.weight"."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class Split:
    """One published weight holds several of ours, one below the other, of `rows` rows each (from our configuration).

    `transposed`: it is a stack of matrices whose rows are the columns of ours, unless the shape says that they are not
    (square ones are not); and is written so.
    """

    theirs: str
    ours: tuple[str, ...]
    rows: Callable[[Fields], tuple[int, ...]]
    transposed: bool = False


@dataclass(frozen=True)
class Columns(Split):
    """One published matrix holds several of ours side by side, stored input by output as GPT-2's are."""


@dataclass(frozen=True)
class Stack:
    """Published weights numbered by `{e}` are one of ours with a dimension more in front."""

    theirs: str
    ours: str


Key = Rename | Split | Stack


@dataclass(frozen=True, kw_only=True)
class Native:
    """A model that transformers itself has, and how it is called as ours are."""

    model: str
    """Name of the class, in transformers."""
    adapter: str
    """"module:attribute" of what is called with that model, the family's name, the published config.json and what the
    checkpoint calls the weights (nothing for a random model)."""
    optional: str = ""
    """Regular expression of weights that may be left out of a checkpoint, all or none."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One published line of models."""

    name: str
    title: str
    """The models, as people call them."""
    source: str
    """Paper, and the code whose behaviour this reproduces."""
    recognise: Callable[[Fields], bool]
    """Whether a published config.json is of this family."""
    config: Callable[[Fields], dict[str, Any]]
    """Published config.json -> fields of `DmllmConfig`. Raises ValueError for what our parts do not compute."""
    keys: tuple[Key, ...]
    """Published names of weights <-> ours, each of ours once; or more often, where checkpoints differ in what they call
    it: then any of them is read and a checkpoint's own are written back, the first where there was none."""
    native: Native | None = None
    """Where transformers computes the model; `config` and `keys` are then not asked."""
    ignored: tuple[str, ...] = ()
    """Published weights that are computed, not learned; regular expressions. They are not written back."""
    computed: Callable[[Fields], dict[str, Tensor]] | None = None
    """Published config.json -> tensors that follow from it: a checkpoint's must be these, and they are written back."""
    beside: tuple[str, ...] = ()
    """JSON files that may stand beside config.json; each is read as a field of it, named without ".json"."""
    chat_template: str | None = None
    """jinja; None is that of the folder's tokenizer."""
    tokenizer: str | None = None
    """The class of transformers that reads its vocab.json and merges.txt, where a checkpoint names one of its own."""
    processor: Fields = field(default_factory=dict)
    """Fields of `ProcessorConfig`, tiling included, that the authors' preprocessing amounts to."""
    decode: Fields = field(default_factory=dict)
    """The authors' decode settings, fields of `DecodeConfig`."""
    start: bool = False
    """Whether it has not learned to denoise: then it gets a mask token, unless config.json (`mask_token_id`) or its
    tokenizer has one."""
    decode_of: Callable[[Fields], dict[str, Any]] | None = None
    """Published config.json -> those of them that depend on it."""
    drawing: Fields = field(default_factory=dict)
    """The authors' settings of a picture: those of `drawing.SETTINGS`, guidance, edit_guidance,
    image_guidance and size in pixels."""
    image_vocabulary: Callable[[Fields], ImageVocabulary | None] | None = None
    """Published config.json -> where the codes of an image tokenizer lie in the vocabulary; None: nowhere."""
    verified: str = ""
    """What was compared with the authors' code, and by which test."""
    quirks: tuple[tuple[str, str, str], ...] = ()
    """Where the authors' code does not do what it means: (what it does, "fixed" or the option that gives it, why)."""
    example: Fields = field(default_factory=dict)
    """A tiny published config.json, for random models: two or three layers, ids beyond those of 256 bytes."""

    def decode_defaults(self, config: Fields) -> dict[str, Any]:
        """The authors' decode settings for a published config.json."""
        drawing = {"drawing": dict(self.drawing)} if self.drawing else {}
        return {**self.decode, **(self.decode_of(config) if self.decode_of else {}), **drawing}

    def computed_weights(self, config: Fields) -> dict[str, Tensor]:
        """The tensors that follow from a published config.json, under their published names."""
        return self.computed(config) if self.computed else {}


def require(config: Fields, **expected: Any) -> None:
    """Raise ValueError for the first field that is there with another value: our parts would compute something else."""
    for name, wanted in expected.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"config.json: {name}={config[name]!r} is not supported; {' or '.join(map(repr, allowed))} is."
            )


def check_fields(config: Fields) -> None:
    """Raise ValueError for what no family computes, also where its authors' code would pass it by: weights stored as
    codes, attention in windows, stretched rotary positions."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if quantised := part.get("quantization_config"):
            kind = quantised.get("quant_method", "quantised")
            raise ValueError(
                f"config.json: quantization_config says that the weights are stored as {kind} codes, which are not "
                "read; take the checkpoint that they were made from."
            )
        if part.get("use_sliding_window") and part.get("sliding_window") is not None:
            raise ValueError(
                f"config.json: use_sliding_window=True with sliding_window={part['sliding_window']} is not supported; "
                "use_sliding_window=False is."
            )
        if windows := sorted({str(kind) for kind in part.get("layer_types") or ()} - {"full_attention"}):
            raise ValueError(f"config.json: layer_types has {', '.join(windows)}; only full_attention is supported.")
        for name in ("rope_scaling", "rope_parameters"):
            rope = part.get(name) or {}
            if rope.get("rope_type", rope.get("type")) not in (None, "default", "mrope"):
                raise ValueError(f"config.json: {name}={dict(rope)} is not supported; null is, and rope_type default.")


def rope_theta(config: Fields) -> float:
    """The base of the rotary wavelengths, from rope_theta or, as transformers 5 writes it, rope_parameters.

    Raises:
        ValueError: there is none, or two; or positions are stretched, or turn a part of the features.
    """
    require(config, partial_rotary_factor=(1.0, None))
    plain = {"rope_type", "type", "rope_theta"}
    bases = {config["rope_theta"]} if config.get("rope_theta") is not None else set()
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        if rope.keys() - plain or rope.get("rope_type", rope.get("type")) not in (None, "default"):
            raise ValueError(f"config.json: {name}={dict(rope)} is not supported; None is, and rope_type default.")
        if rope.get("rope_theta") is not None:
            bases.add(rope["rope_theta"])
    if len(bases) > 1:
        raise ValueError(f"config.json says several rope_theta: {', '.join(map(str, sorted(bases)))}; keep one.")
    if not bases:
        raise ValueError("config.json lacks rope_theta.")
    return bases.pop()


def need(config: Fields, name: str, *others: str) -> Any:
    """The first of these fields that is there and not null. Raises ValueError if none is."""
    for key in (name, *others):
        if config.get(key) is not None:
            return config[key]
    raise ValueError(f"config.json lacks {name}{''.join(f' (or {other})' for other in others)}.")


# Weights, one at a time


def matches(key: Key, name: str) -> bool:
    """Whether a published weight of this name is what the key speaks of."""
    return _pattern(key.theirs).fullmatch(name) is not None


def to_ours(keys: tuple[Key, ...], name: str, tensor: Tensor, ours: Fields) -> Iterator[tuple[str, int | None, Tensor]]:
    """What one published weight is in ours: (name, place in a stack or None, values); nothing if it has no place."""
    for key in keys:
        found = _pattern(key.theirs).fullmatch(name)
        if found is None:
            continue
        numbers = found.groupdict()
        tensor = tensor.mT.contiguous() if isinstance(key, Columns) else tensor
        if isinstance(key, Rename):
            yield _fill(key.ours, numbers), None, tensor
        elif isinstance(key, Split):
            rows, side = key.rows(ours), -2 if key.transposed else 0
            if key.transposed and tensor.shape[side] != sum(rows):
                tensor = tensor.mT
            if sum(rows) != tensor.shape[side]:
                raise ValueError(
                    f"{name} has {tensor.shape[side]} rows; the configuration says {'+'.join(map(str, rows))}."
                )
            for part, values in zip(key.ours, tensor.split(rows, side), strict=True):
                values = values.contiguous() if key.transposed else values
                yield _fill(part, numbers), None, values
        else:
            yield _fill(key.ours, numbers), int(numbers["e"]), tensor
        return


def to_theirs(keys: tuple[Key, ...], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our weights under their published names. Raises ValueError for one that has none."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        for key in keys:
            places = key.ours if isinstance(key, Split) else (key.ours,)
            matches = [(i, m) for i, part in enumerate(places) if (m := _pattern(part).fullmatch(name))]
            if not matches:
                continue
            place, found = matches[0]
            numbers = found.groupdict()
            if isinstance(key, Rename):
                yield _fill(key.theirs, numbers), tensor
            elif isinstance(key, Stack):
                for number, one in enumerate(tensor):
                    yield _fill(key.theirs, {**numbers, "e": str(number)}), one
            else:
                held = parts.setdefault(_fill(key.theirs, numbers), {})
                held[place] = tensor
                if len(held) == len(places):
                    whole = torch.cat([held[i] for i in range(len(places))], -2 if key.transposed else 0)
                    turned = isinstance(key, Columns) or (key.transposed and whole.shape[-1] != whole.shape[-2])
                    yield _fill(key.theirs, numbers), whole.mT if turned else whole
            break
        else:
            raise ValueError(f"{name} has no published name in this family.")


def whole_of(keys: tuple[Key, ...], part: str) -> str:
    """The published name of the weight that holds `part`, one of ours, together with others."""
    for key in keys:
        for ours in key.ours if isinstance(key, Split) else ():
            if found := _pattern(ours).fullmatch(part):
                return _fill(key.theirs, found.groupdict())
    raise ValueError(f"{part} is no part of a published weight.")


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", escaped))


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: numbers[found.group(1)], template)
