"""Vision encoders from timm (https://github.com/huggingface/pytorch-image-models): any model with spatial features.

`options` are timm's own arguments, e.g. {img_size: [64, 64], patch_size: 8, embed_dim: 192, depth: 4, num_heads: 3}.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmllm.hub import fetch, find
from dmllm.models.vision.encoder import VisionConfig, VisionEncoder
from dmllm.registry import nearest

try:
    import timm
except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
    raise ImportError(f"timm cannot be imported ({error}); install it with: pip install timm torchvision") from error

WEIGHTS = "model.safetensors|pytorch_model.bin"


class TimmEncoder(VisionEncoder):
    """A timm model without its head."""

    def __init__(self, config: VisionConfig, *, load_weights: bool):
        super().__init__(config)
        self.tower: Any = create(config, load_weights)
        self.layer = config.layer
        self.hidden_size, self.grid = prune(self.tower, config)
        self._fused = [m for m in self.tower.modules() if getattr(m, "fused_attn", False) is True]

    @staticmethod
    def resolve(config: VisionConfig) -> VisionConfig:
        """Size and normalisation from timm's table of pretrained configurations."""
        published = _published(config.model)
        options = dict(config.options)
        size = options.pop("img_size", None)
        size = (size, size) if isinstance(size, int) else size and tuple(size)
        if size and config.image_size and size != config.image_size:
            raise ValueError(f"image_size={config.image_size} and options.img_size={size} differ; give one of them.")
        return replace(
            config,
            image_size=config.image_size or size or tuple(published.input_size[1:]),
            mean=config.mean or published.mean,
            std=config.std or published.std,
            interpolation=config.interpolation or published.interpolation,
            options=options,
        )

    def features(self, pixels: Tensor) -> Tensor:
        """The tower's patch rows [T, rows * cols, D]."""
        # on a CPU the fused kernel's backward takes several times as long as plain matrix products
        for attention in self._fused:
            attention.fused_attn = pixels.device.type != "cpu" or not torch.is_grad_enabled()
        return patch_features(self.tower, pixels, self.layer)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Raises ValueError for a model that timm cannot checkpoint."""
        try:
            self.tower.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):
            raise ValueError(
                f"timm's {type(self.tower).__name__} has no gradient checkpointing; leave it off."
            ) from None


def create(config: VisionConfig, load_weights: bool) -> Any:
    """The timm model at its input size, with published weights or random ones."""
    published = _published(config.model)
    arguments: dict[str, Any] = dict(config.options)
    if published.fixed_input_size or config.image_size != tuple(published.input_size[1:]):
        arguments["img_size"] = config.image_size
    if load_weights:
        arguments["pretrained_cfg_overlay"] = {"file": str(_weights(config, published))}
    try:
        return timm.create_model(config.model, pretrained=load_weights, num_classes=0, **arguments)
    except TypeError as error:
        if "img_size" in str(error) and "img_size" not in config.options:  # a convolutional model: any size will do
            arguments.pop("img_size")
            return timm.create_model(config.model, pretrained=load_weights, num_classes=0, **arguments)
        raise ValueError(f"timm refuses options={config.options} for {config.model!r}: {error}.") from None


def prune(tower: Any, config: VisionConfig) -> tuple[int, tuple[int, int]]:
    """Remove what comes after `config.layer`; the width of that layer and its (rows, cols)."""
    levels = tower.feature_info if isinstance(tower.feature_info, list) else tower.feature_info.info
    if -config.layer > len(levels):
        raise ValueError(f"vision layer={config.layer}: {config.model} has {len(levels)}; use -{len(levels)} .. -1.")
    level = levels[config.layer]
    rows, cols = (-(-side // level["reduction"]) for side in config.size)
    if hasattr(tower, "prune_intermediate_layers"):
        tower.prune_intermediate_layers([len(levels) + config.layer], prune_norm=config.layer < -1, prune_head=True)
    elif config.layer < -1:
        raise ValueError(f"timm gives {config.model} no intermediate layers; use vision layer=-1.")
    return (tower.num_features if config.layer == -1 else level["num_chs"]), (rows, cols)


def patch_features(tower: Any, pixels: Tensor, layer: int) -> Tensor:
    """The last features of a pruned tower, prefix tokens dropped: [T, rows * cols, D]."""
    if layer < -1:
        return tower.forward_intermediates(pixels, indices=[-1], intermediates_only=True)[0].flatten(2).transpose(1, 2)
    features = tower.forward_features(pixels)
    if features.ndim == 3:
        return features[:, getattr(tower, "num_prefix_tokens", 0) :]
    if getattr(tower, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)


def _published(name: str) -> Any:
    if ":" in name or not timm.is_model(name):
        advice = nearest(name.partition(".")[0], timm.list_models()) if ":" not in name else "give a registered name"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {advice[:300]}")
    architecture, _, tag = name.partition(".")
    if tag and name not in _tags(name):
        raise ValueError(f"timm has no weights {tag!r} for {architecture}; known are: {', '.join(_tags(name))}.")
    return timm.get_pretrained_cfg(name)


def _tags(name: str) -> list[str]:
    return timm.list_pretrained(name.partition(".")[0] + ".*")


def _weights(config: VisionConfig, published: Any) -> Path:
    if not published.hf_hub_id:
        raise ValueError(
            f"timm publishes no weights on the hub for {config.model!r}; set vision.pretrained=false"
            + (f" or name one of: {', '.join(_tags(config.model))}." if _tags(config.model) else ".")
        )
    entry = published.hf_hub_filename or WEIGHTS
    path = find(fetch(published.hf_hub_id, (entry,), revision=config.revision), entry)
    assert path is not None
    return path
