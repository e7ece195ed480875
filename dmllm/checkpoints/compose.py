"""A model from its parts, as a training YAML names them; or a checkpoint that is continued.

    model: {backbone: Qwen/Qwen3-0.6B, vision: hf:google/siglip2-so400m-patch14-384, projector: mlp2x_gelu}
    model: {backbone: {hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4}, tokenizer: runs/tokenizer,
            vision: {name: timm:vit_tiny_patch16_224, pretrained: false, options: {...}}}
    model: {checkpoint: dmllm-tiny, processor: {turns: each, image_prefix: true}}

What is missing is added: special tokens to the tokenizer, rows to the vocabulary, tile size and grid to the tiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from dmllm.checkpoints import folder
from dmllm.checkpoints.causal_lm import from_transformers
from dmllm.checkpoints.drawing import to_draw
from dmllm.checkpoints.vocabulary import complete_tokenizer, grow, widen
from dmllm.checkpoints.weights import read_weights, refuse_keys
from dmllm.config import to_dict
from dmllm.data.processor import Processor, ProcessorConfig
from dmllm.hub import fetch
from dmllm.models.backbones import BACKBONES
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.models.projectors import ProjectorConfig
from dmllm.models.vision import VisionConfig, VisionEncoder, resolve_vision
from dmllm.nn.visibility import check_layout
from dmllm.registry import nearest
from dmllm.tiling import TilingConfig

TOKENIZER = "tokenizer.json|tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where a model comes from: `checkpoint`, or `backbone` with what goes around it."""

    checkpoint: str | None = None
    """A dmllm folder, packaged name or hub name to continue; the parts below are then its own. A causal one
    (Qwen2.5-VL, Qwen3-VL) gets a mask token."""
    backbone: str | dict[str, Any] | None = None
    """A folder or hub name (dmllm, or a Llama, Mistral, Qwen2, Qwen3 or GPT-2 language model), or the fields of
    `TransformerConfig` for random weights; without vocab_size it is the tokenizer's."""
    vision: str | VisionConfig | None = None
    """The vision encoder, by name or in full; null is a text-only model."""
    projector: str | ProjectorConfig = "mlp2x_gelu"
    """From patches to stream rows, by name or in full; not read without vision."""
    tokenizer: str | None = None
    """A folder or hub name; null is the backbone's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub name of checkpoint, backbone and tokenizer; vision has its own."""
    tiling: dict[str, Any] = field(default_factory=dict)
    """Fields of `TilingConfig`; tile size, grid and interpolation come from the encoder and projector if not given."""
    processor: dict[str, Any] = field(default_factory=dict)
    """Fields of `ProcessorConfig` other than tiling, e.g. {turns: each, image_prefix: true, max_length: 512}."""
    chat_template: str | None = None
    """A jinja file; null is the tokenizer's own, or that of `data.chat` if it has none."""
    visibility: str | None = None
    """Who sees whom: full (everything), prefix (the prompt does not see the answer), causal, or block:N (each block of
    N tokens sees itself and what is before it); null is full, or the checkpoint's."""
    shift: bool | None = None
    """Whether a token is predicted by the row before it, as a causal language model has learned; null is no, or the
    checkpoint's."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Decode defaults for checkpoints, fields of `DecodeConfig`, e.g. {max_new_tokens: 64, threshold: 0.9}."""
    drawing: dict[str, Any] = field(default_factory=dict)
    """Fields of `checkpoints.drawing.DrawingSpec` for a model that draws: {image_tokenizer: FOLDER, size: 64}; {} is
    none. One without codes in its vocabulary gets them."""
    vocab_multiple: int = 64
    """A vocabulary that has to grow gets a multiple of this many rows; 1 is no padding."""


def compose(spec: ModelSpec) -> tuple[MultimodalModel, Processor]:
    """The model in float32 and its processor. New weights are drawn from torch's global generator.

    Raises:
        ValueError: parts that exclude or do not fit each other, an unknown field, or weights that do not fit.
        FileNotFoundError: a folder or name is not to be had; says which file was wanted and how to get it.
    """
    if (spec.checkpoint is None) == (spec.backbone is None):
        raise ValueError("model: give one of checkpoint (a model to continue) and backbone (the start of a new one).")
    _refuse_unknown(spec.processor, [f.name for f in fields(ProcessorConfig) if f.name != "tiling"], "model.processor")
    _refuse_unknown(spec.tiling, [f.name for f in fields(TilingConfig)], "model.tiling")
    model, processor = _continue(spec) if spec.checkpoint is not None else _build(spec)
    if spec.drawing:
        processor = to_draw(model, processor, spec.drawing, spec.vocab_multiple)
        own = folder.decode_defaults(model)
        width, height = processor.pixels[::-1]
        folder.set_decode_defaults(model, {**own, "drawing": {**own.get("drawing", {}), "size": [width, height]}})
    return model, processor


def _continue(spec: ModelSpec) -> tuple[MultimodalModel, Processor]:
    """The checkpoint, with what the specification says otherwise about its use."""
    new = ModelSpec()
    for name in ("vision", "projector", "tokenizer"):
        if getattr(spec, name) != getattr(new, name):
            raise ValueError(
                f"model.{name} cannot be changed in the checkpoint {spec.checkpoint}; to build a new model around its "
                f"backbone, write model: {{backbone: {spec.checkpoint}, {name}: ...}}."
            )
    loaded = folder.load(str(spec.checkpoint), dtype=torch.float32, revision=spec.revision)
    model, before = loaded.model, loaded.processor
    if before is None:
        raise ValueError(
            f"The checkpoint {spec.checkpoint} has no tokenizer, so it cannot be trained on conversations."
        )
    if loaded.fresh:
        used = sorted({*before.tokenizer.get_vocab().values()} - {*loaded.fresh})
        widen(model, used=used, fresh=loaded.fresh, multiple=spec.vocab_multiple)
    tiling = before.config.tiling
    if spec.tiling:
        tiling = _tiling({**(to_dict(tiling) if tiling else {}), **spec.tiling}, model)
    config = replace(before.config, **spec.processor, tiling=tiling)
    generation = dict(loaded.generation)
    if spec.visibility is not None:
        check_layout(spec.visibility)
        if spec.visibility != model.config.visibility:
            generation.pop("block_length", None)
        model.config.visibility = spec.visibility
    if spec.shift is not None:
        model.config.shift = spec.shift
    folder.set_decode_defaults(model, {**generation, **spec.generation})
    return model, Processor(before.tokenizer, config, before.special, _template(spec) or before.chat_template)


def _build(spec: ModelSpec) -> tuple[MultimodalModel, Processor]:
    """A new model around a backbone."""
    vision = VisionConfig(name=spec.vision) if isinstance(spec.vision, str) else spec.vision
    projector = ProjectorConfig(name=spec.projector) if isinstance(spec.projector, str) else spec.projector
    start = _start(spec)
    tokenizer = _tokenizer(spec, start)
    tokenizer.chat_template = _template(spec) or tokenizer.chat_template
    used = sorted(tokenizer.get_vocab().values())
    special = complete_tokenizer(tokenizer, start.ids, wants_image=vision is not None)
    fresh = sorted(set(tokenizer.get_vocab().values()) - set(used))
    size = _rows(start, tokenizer, spec.vocab_multiple)
    config = DmllmConfig(
        backbone=_whole({**start.shape, "vocab_size": size}),
        vision=None if vision is None else to_dict(resolve_vision(vision)),
        projector=None if vision is None else to_dict(projector),
        mask_token_id=special.mask,
        eos_token_id=special.eos,
        pad_token_id=special.pad,
        image_token_id=special.image,
        visibility=spec.visibility or "full",
        row_break=bool(spec.tiling.get("row_break")),
        shift=bool(spec.shift),
    )
    model = MultimodalModel(config, load_vision_weights=True)
    model.initialise()
    if start.weights is not None:
        model.backbone.load_state_dict(grow(start.weights, used=used, fresh=fresh, size=size))
    folder.set_decode_defaults(model, spec.generation)
    processor = ProcessorConfig(**spec.processor, tiling=_tiling(spec.tiling, model))
    return model, Processor(tokenizer, processor, special)


@dataclass(frozen=True, kw_only=True)
class _Start:
    """A backbone before it has its vocabulary: fields of its configuration, and weights if it has learned."""

    shape: dict[str, Any]
    weights: dict[str, Tensor] | None = None
    ids: dict[str, int | None] = field(default_factory=dict)
    folder: Path | None = None


def _start(spec: ModelSpec) -> _Start:
    """The backbone as the specification names it."""
    if not isinstance(spec.backbone, str):
        return _Start(shape=dict(spec.backbone or {}))
    path = folder.resolve(spec.backbone, revision=spec.revision)
    if folder.model_type(path) != DmllmConfig.model_type:
        shape, weights = from_transformers(path)
        return _Start(shape=shape, weights=weights, folder=path)
    config = folder.read_config(path)
    weights = read_weights(path, prefix="backbone.", dtype=torch.float32)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    shape, (module, shape_class), _ = _parts(config.backbone)
    with torch.device("meta"):
        expected = module(shape_class(**shape)).state_dict().keys()
    refuse_keys(expected - weights.keys(), weights.keys() - expected, path, "the backbone of its config.json")
    return _Start(shape=config.backbone, weights=weights, ids=to_dict(config.special), folder=path)


def _whole(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's fields with all defaults written out, so that a later default changes no checkpoint."""
    given, (_, shape_class), kind = _parts(shape)
    _refuse_unknown(given, [f.name for f in fields(shape_class)], "model.backbone")
    return {"type": kind, **to_dict(shape_class(**given))}


def _parts(shape: Mapping[str, Any]) -> tuple[dict[str, Any], Any, str]:
    """A backbone's fields without its type, its (module, configuration) classes, and its type."""
    given = dict(shape)
    kind = given.pop("type", "transformer")
    return given, BACKBONES.load(kind), kind


def _tokenizer(spec: ModelSpec, start: _Start) -> Any:
    """The tokenizer of the specification, else of the backbone's folder."""
    if spec.tokenizer is not None:
        path = fetch(spec.tokenizer, (TOKENIZER,), also=folder.TOKENIZER_FILES, revision=spec.revision)
    elif start.folder is not None:
        path = fetch(str(start.folder), (TOKENIZER,))
    else:
        raise ValueError(
            "model.tokenizer: a backbone from scratch needs one; give a folder or hub name, or make one with: "
            "dmllm tokenizer train FILES --vocab-size 1024 --out runs/tokenizer"
        )
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _rows(start: _Start, tokenizer: Any, multiple: int) -> int:
    """Rows of vocabulary: as they are where the tokenizer fits, else a multiple that does."""
    needed = max(tokenizer.get_vocab().values()) + 1
    given = start.shape.get("vocab_size")
    if given is not None and needed <= given:
        return given
    if given is not None and start.weights is None:
        raise ValueError(f"model.backbone.vocab_size={given} is less than the tokenizer's {needed}; leave it out.")
    return -(-needed // multiple) * multiple


def _tiling(values: Mapping[str, Any], model: MultimodalModel) -> TilingConfig | None:
    """How pictures are cut for this model; what the parts determine is filled in, and not to be contradicted."""
    vision: VisionEncoder | None = model.vision
    if vision is None:
        if values:
            raise ValueError("model.tiling is given, but the model has no vision encoder; set model.vision too.")
        return None
    if values.get("row_break") and model.row_break is None:
        raise ValueError("model.tiling.row_break: this checkpoint has no row-break vector; leave it out.")
    own = {"tile_size": vision.image_size, "grid": model.image_grid, **vision.tiling}
    for name, value in own.items():
        given = values.get(name, value)
        if value not in (given, tuple(given)) and tuple(given) != (0, 0):
            raise ValueError(f"model.tiling.{name}={given}, but encoder and projector make it {value}; leave it out.")
    if values.get("mode") == "native" and "mode" not in own:
        raise ValueError("model.tiling.mode='native' needs an encoder of native resolution: model.vision: native:...")
    return TilingConfig(**{"interpolation": vision.interpolation, **values, **own})


def _template(spec: ModelSpec) -> str | None:
    """The text of the specification's chat template."""
    if spec.chat_template is None:
        return None
    path = Path(spec.chat_template)
    if not path.is_file():
        raise FileNotFoundError(f"model.chat_template: there is no file {path}; the working directory is {Path.cwd()}.")
    return path.read_text(encoding="utf-8")


def _refuse_unknown(given: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has no field {name!r}; {nearest(name, known)}")
