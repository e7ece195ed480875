"""Vision encoders from open_clip (https://github.com/mlfoundations/open_clip): "open_clip:NAME[/PRETRAINED]".

`options` are fields of open_clip's `CLIPVisionCfg`, e.g. {layers: 2, width: 64, head_width: 32, patch_size: 16}. Towers
that open_clip itself takes from timm (SigLIP among them) are read as timm's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from dmllm.hub import fetch, find
from dmllm.models.vision.encoder import VisionConfig, VisionEncoder
from dmllm.models.vision.timm import patch_features, prune
from dmllm.registry import nearest

try:
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower
    from open_clip.transform import PreprocessCfg
    from open_clip.transformer import VisionTransformer
except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
    advice = "install it with: pip install open_clip_torch torchvision"
    raise ImportError(f"open_clip cannot be imported ({error}); {advice}") from error

WEIGHTS = "open_clip_model.safetensors|open_clip_pytorch_model.bin"


class OpenClipEncoder(VisionEncoder):
    """The image half of an open_clip model, without pooling and projection."""

    def __init__(self, config: VisionConfig, *, load_weights: bool):
        super().__init__(config)
        tower: Any = _load(config) if load_weights else _build_vision_tower(**config.options)
        self.layer = config.layer
        self.trunk = getattr(tower, "trunk", None) is not None
        if self.trunk:
            self.tower = tower.trunk
            if self.image_size != tuple(self.tower.default_cfg["input_size"][1:]):
                tower.set_input_size(self.image_size)
            self.hidden_size, self.grid = prune(self.tower, config)
            return
        self.tower = tower
        if not isinstance(tower, VisionTransformer) or tower.attn_pool is not None:
            raise ValueError(f"{config.name} is not a plain vision transformer; try the same name under 'timm:'.")
        if -config.layer > (layers := len(tower.transformer.resblocks)):
            raise ValueError(f"vision layer={config.layer}: {config.name} has {layers} layers.")
        # open_clip norms the patches unless the norm follows the pooling
        self.norm = config.layer == -1 and not tower.final_ln_after_pool
        tower.prune_intermediate_layers([layers + config.layer], prune_norm=not self.norm, prune_head=True)
        self.hidden_size = tower.transformer.width
        self.grid = (tower.grid_size[0], tower.grid_size[1])

    @staticmethod
    def resolve(config: VisionConfig) -> VisionConfig:
        """The tower's shape into `options`; normalisation from open_clip's table of pretrained models."""
        name, _, tag = config.model.partition("/")
        shape, published = dict(config.options), {}
        if "vision_cfg" not in shape:
            model = open_clip.get_model_config(name)
            if model is None:
                raise ValueError(f"open_clip has no model {name!r}; {nearest(name, open_clip.list_models())[:300]}")
            known = [*CLIPVisionCfg.__dataclass_fields__]
            if unknown := set(config.options) - set(known):
                raise ValueError(f"open_clip's tower has no option {min(unknown)!r}; {nearest(min(unknown), known)}")
            published = _published(name, tag) if tag else {}
            shape = {
                "embed_dim": model["embed_dim"],
                "vision_cfg": model["vision_cfg"] | {"timm_model_pretrained": False} | config.options,
                "quick_gelu": (published or model).get("quick_gelu", False),  # as the weights were trained
            }
        prepared = PreprocessCfg()
        vision = dict(shape["vision_cfg"])
        size = config.image_size or vision.get("image_size", 224)
        vision["image_size"] = list(size) if isinstance(size, tuple | list) else [size, size]
        return replace(
            config,
            image_size=tuple(vision["image_size"]),
            mean=config.mean or published.get("mean", prepared.mean),
            std=config.std or published.get("std", prepared.std),
            interpolation=config.interpolation or published.get("interpolation", prepared.interpolation),
            options=shape | {"vision_cfg": vision},
        )

    def features(self, pixels: Tensor) -> Tensor:
        """The tower's patch rows [T, rows * cols, D]."""
        if self.trunk:
            return patch_features(self.tower, pixels, self.layer)
        return self.tower.forward_intermediates(
            pixels, indices=[-1], normalize_intermediates=self.norm, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][0]

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute the tower's blocks in the backward pass."""
        self.tower.set_grad_checkpointing(enable)


def _load(config: VisionConfig) -> Any:
    """The image tower with the weights that the name's tag stands for."""
    name, _, tag = config.model.partition("/")
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"{config.name!r} does not say which weights: write 'open_clip:{name}/PRETRAINED' with one of "
            f"{', '.join(tags)}, or set vision.pretrained=false."
        )
    published = _published(name, tag)
    repository, _, file = published.get("hf_hub", "").rpartition("/")
    weights = published.get("file")
    if repository:
        entry = f"{file.rpartition('.')[0]}.safetensors|{file}" if file else WEIGHTS
        weights = find(fetch(repository, (entry,), revision=config.revision), entry)
    if weights is None:
        raise ValueError(f"open_clip has no hub repository for {config.model!r}; use another of its tags.")
    shape: dict[str, Any] = dict(config.options)
    return open_clip.create_model(name, pretrained=str(weights), **shape).visual


def _published(name: str, tag: str) -> dict[str, Any]:
    published = open_clip.get_pretrained_cfg(name, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"open_clip has no weights {tag!r} for {name}; {nearest(tag, tags) if tags else 'it has none.'}"
        )
    return published
