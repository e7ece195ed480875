"""Vision encoders from transformers: SigLIP, SigLIP 2, CLIP, DINO and other towers of square patches.

The name is a hub name or a folder, of the tower alone or of a model that contains one. `options` are fields of the
tower's configuration; with `model_type` among them they are the whole configuration, and no file is read. Among them
may be `attn_implementation`: how attention is computed while the weights are float32 (eager rounds as LLaVA does), and
`gelu_parts`: the number of threads whose rounding a tanh GELU has (`nn.gelu`).

Normalisation comes from the model's `preprocessor_config.json`. SigLIP 2 towers of flexible resolution (NaFlex) are fed
one fixed grid, by default the square of their own number of patches.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from dmllm.hub import fetch, find
from dmllm.models.vision.encoder import VisionConfig, VisionEncoder
from dmllm.nn.gelu import SteadyGELU
from dmllm.registry import nearest

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json|processor_config.json"
WEIGHTS = "model.safetensors|model.safetensors.index.json|pytorch_model.bin|pytorch_model.bin.index.json"
SHARDS = ("*.safetensors", "pytorch_model*.bin")
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic")  # in the order of PIL's numbers, which the files hold
TRIMMED = ("siglip_vision_model", "siglip2_vision_model", "clip_vision_model")  # encoder.layers, then post_layernorm
ATTENTION, PARTS = "attn_implementation", "gelu_parts"
OWN = (ATTENTION, PARTS)  # options that are no fields of the tower's configuration
HALF = (0.5, 0.5, 0.5)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALISATION = {"siglip_vision_model": (HALF, HALF), "siglip2_vision_model": (HALF, HALF), "clip_vision_model": CLIP}


class HuggingFaceEncoder(VisionEncoder):
    """A transformers vision tower without its pooling head."""

    def __init__(self, config: VisionConfig, *, load_weights: bool):
        super().__init__(config)
        shape = _shape(config)
        if -config.layer > shape.num_hidden_layers:
            raise ValueError(f"vision layer={config.layer}: {config.name} has {shape.num_hidden_layers} layers.")
        self.tower: Any = _load(config, shape) if load_weights else _class(shape)(shape)
        self.float32_attention = config.options.get(ATTENTION)
        if config.options.get(PARTS) and shape.hidden_act == "gelu_pytorch_tanh":
            for module in self.tower.modules():
                if hasattr(module, "activation_fn"):
                    module.activation_fn = SteadyGELU("tanh", config.options[PARTS])
        self.patch, self.flexible = _side(shape.patch_size), _is_flexible(shape)
        self.hidden_size = shape.hidden_size
        self.grid = (self.image_size[0] // self.patch, self.image_size[1] // self.patch)
        self.stored = config.layer if config.layer < -1 else None  # which of the stored hidden states is read
        if shape.model_type in TRIMMED:
            self.stored = None
            self.tower.encoder.layers = self.tower.encoder.layers[: shape.num_hidden_layers + 1 + config.layer]
            if config.layer < -1 or shape.model_type == "clip_vision_model":  # CLIP's norm is the class token's alone
                self.tower.post_layernorm = nn.Identity()
        resized = self.image_size != (_side(getattr(shape, "image_size", 0)),) * 2
        asks = "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters
        self.arguments = {"interpolate_pos_encoding": True} if resized and asks else {}

    @staticmethod
    def resolve(config: VisionConfig) -> VisionConfig:
        """The tower's whole configuration into `options`; normalisation from the preprocessor's file."""
        prepared: dict[str, Any] = {}
        if "model_type" in config.options:
            shape = _shape(config)
        else:
            folder = fetch(config.model, (CONFIG,), also=(*PREPROCESSOR.split("|"),), revision=config.revision)
            shape = AutoConfig.from_pretrained(folder)
            shape = getattr(shape, "vision_config", shape)
            for key, value in config.options.items():
                if key in OWN:
                    continue
                if not hasattr(shape, key):
                    raise ValueError(f"{config.name} has no option {key!r}; {nearest(key, list(_fields(shape)))}")
                setattr(shape, key, value)
            prepared = _preprocessor(folder)
        if not getattr(shape, "patch_size", None) or not getattr(shape, "num_hidden_layers", None):
            raise ValueError(f"{config.name} ({shape.model_type}) is not a tower of square patches; try 'timm:NAME'.")
        if shape.model_type.startswith("siglip"):
            shape.vision_use_head = False
        side = isqrt(shape.num_patches) * _side(shape.patch_size) if _is_flexible(shape) else _side(shape.image_size)
        mean, std = NORMALISATION.get(shape.model_type, (None, None))
        mean = config.mean or prepared.get("image_mean") or mean
        std = config.std or prepared.get("image_std") or std
        if mean is None or std is None:
            raise ValueError(f"{config.name} has no preprocessor_config.json: set vision.mean and vision.std.")
        return replace(
            config,
            image_size=config.image_size or (side, side),
            mean=mean,
            std=std,
            interpolation=config.interpolation or RESAMPLING[prepared.get("resample", 3)],
            options=_fields(shape) | {k: v for k, v in config.options.items() if k in OWN},
        )

    def features(self, pixels: Tensor) -> Tensor:
        """The tower's patch rows [T, rows * cols, D]; prefix tokens come first and are cut."""
        if self.float32_attention is not None:
            form = self.float32_attention if pixels.dtype == torch.float32 else "sdpa"
            if self.tower.config._attn_implementation != form:
                self.tower.set_attn_implementation(form)
        arguments: dict[str, Any] = dict(self.arguments)
        if self.flexible:
            arguments |= self._packed(len(pixels), pixels.device)
            pixels = self._patches(pixels)
        if self.stored is None:
            hidden = self.tower(pixel_values=pixels, **arguments).last_hidden_state
        else:
            hidden = self.tower(pixel_values=pixels, output_hidden_states=True, **arguments).hidden_states[self.stored]
        return hidden[:, hidden.shape[1] - self.grid[0] * self.grid[1] :]

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Raises ValueError for a tower that transformers cannot checkpoint."""
        if enable:
            self.tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif self.tower.supports_gradient_checkpointing:
            self.tower.gradient_checkpointing_disable()

    def _patches(self, pixels: Tensor) -> Tensor:
        """[T, 3, H, W] -> [T, rows * cols, P * P * 3], each patch row by row, channels last."""
        (rows, cols), p = self.grid, self.patch
        squares = pixels[..., : rows * p, : cols * p].unflatten(3, (cols, p)).unflatten(2, (rows, p))
        return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _packed(self, tiles: int, device: torch.device) -> dict[str, Tensor]:
        """What a flexible tower asks besides: no patch is padding, and every tile has our grid (on the CPU)."""
        rows, cols = self.grid
        return {
            "pixel_attention_mask": torch.ones(tiles, rows * cols, dtype=torch.int64, device=device),
            "spatial_shapes": torch.tensor([[rows, cols]]).expand(tiles, 2),
        }


def _shape(config: VisionConfig) -> PreTrainedConfig:
    """The tower's configuration out of resolved options."""
    options = {key: value for key, value in config.options.items() if key not in OWN}
    kind = options.pop("model_type")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        raise ValueError(f"vision model_type={kind!r} is not known; {nearest(kind, [*NORMALISATION])}")
    return CONFIG_MAPPING[kind](**options)


def _class(shape: PreTrainedConfig) -> Any:
    return MODEL_MAPPING[type(shape)]


def _fields(shape: PreTrainedConfig) -> dict[str, Any]:
    """What is particular to this kind of tower, defaults included, so that a later default changes nothing."""
    common = PreTrainedConfig().to_dict().keys()
    own = {key: value for key, value in shape.to_dict().items() if key not in common and not key.startswith("_")}
    return {"model_type": shape.model_type, **own}


def _load(config: VisionConfig, shape: PreTrainedConfig) -> nn.Module:
    """The tower with its published weights, in the default dtype."""
    folder = fetch(config.model, (WEIGHTS,), also=(CONFIG, *PREPROCESSOR.split("|"), *SHARDS), revision=config.revision)
    tower, report = _class(shape).from_pretrained(
        folder, config=shape, dtype=torch.get_default_dtype(), output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder} lacks weights of {type(tower).__name__}: {', '.join(missing[:8])} ({len(missing)} in all)."
        )
    return tower


def _preprocessor(folder: Path) -> dict[str, Any]:
    """The image part of the preprocessor's file, empty where there is none."""
    path = find(folder, PREPROCESSOR)
    values = json.loads(path.read_text(encoding="utf-8")) if path else {}
    return values.get("image_processor", values)


def _is_flexible(shape: PreTrainedConfig) -> bool:
    return shape.model_type == "siglip2_vision_model"


def _side(size: Any) -> int:
    """A side in pixels from a number or an equal pair."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(
            f"only square patches and pictures are read from transformers towers, not {size}; try 'timm:NAME'."
        )
    return sides.pop()
