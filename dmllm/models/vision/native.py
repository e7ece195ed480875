"""Vision encoders of native resolution: Qwen2-VL's, Qwen2.5-VL's and Qwen3-VL's, from transformers.

A picture keeps its shape: it is cut into tiles of merge x merge patches (28 x 28 or 32 x 32 pixels), as many as it has,
and the tower, which sees the patches of all pictures of a batch one after another and keeps the pictures apart, merges
each tile into one row. So a tile here is what elsewhere is a patch: the stream gets one row for each.

`options` are the fields of the tower's configuration, `model_type` ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") among them.
Sources: arXiv:2409.12191 (Qwen2-VL), arXiv:2502.13923 (Qwen2.5-VL: windows, SwiGLU, RMSNorm), arXiv:2511.21631
(Qwen3-VL: learned positions, and what several layers say goes into the first layers behind).
Shapes: T tiles of N pictures, S pixels a tile's side, D features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from dmllm.models.vision.encoder import VisionConfig, VisionEncoder
from dmllm.registry import nearest

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOWERS: dict[str, tuple[Any, Any, str]] = {  # tower, configuration, which of its fields is the width of a row
    "qwen2_vl": (Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig, "hidden_size"),
    "qwen2_5_vl": (Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig, "out_hidden_size"),
    "qwen3_vl": (Qwen3VLVisionModel, Qwen3VLVisionConfig, "out_hidden_size"),
}


class NativeEncoder(VisionEncoder):
    """A tower that takes pictures of any size in whole tiles, with its merger."""

    grid = (1, 1)
    tiling = {"mode": "native"}

    def __init__(self, config: VisionConfig, *, load_weights: bool):
        super().__init__(config)
        if load_weights:
            raise ValueError(f"{config.name} starts from random weights; say so with vision.pretrained: false.")
        if config.layer != -1:
            raise ValueError(f"vision layer={config.layer}: {config.name} is read after its merger, which is layer -1.")
        kind, shape = _shape(config)
        tower, _, width = TOWERS[kind]
        self.tower: Any = tower(shape)
        self.deepstack = len(getattr(shape, "deepstack_visual_indexes", ()))
        self.hidden_size: int = getattr(shape, width) * (1 + self.deepstack)
        self.merge, self.patch, self.frames = shape.spatial_merge_size, shape.patch_size, shape.temporal_patch_size

    @staticmethod
    def resolve(config: VisionConfig) -> VisionConfig:
        """`config` with all fields of the tower's configuration, the size of a tile, and CLIP's normalisation."""
        kind, shape = _shape(config)
        side = shape.patch_size * shape.spatial_merge_size
        if config.image_size not in (None, (side, side)):
            raise ValueError(
                f"vision.image_size={config.image_size}: {config.name} takes tiles of {side}; leave it out."
            )
        return replace(
            config,
            image_size=(side, side),
            mean=config.mean or MEAN,
            std=config.std or STD,
            interpolation=config.interpolation or "bicubic",
            options={"model_type": kind, **{name: getattr(shape, name) for name in shape.__annotations__}},
        )

    def forward(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """uint8 tiles [T, 3, S, S] -> rows [T, 1, D].

        Args:
            image_grids: [N, 3], each picture's frames, rows and columns of tiles, which follow each other row by row.

        Raises:
            ValueError: the pixels are not such tiles, or the grids do not tell of as many.
        """
        given = 0 if image_grids is None else int(image_grids.prod(1).sum())
        if pixel_values.dtype != torch.uint8 or tuple(pixel_values.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} {list(pixel_values.shape)}; this encoder takes uint8 tiles "
                f"[T, 3, {self.image_size[0]}, {self.image_size[1]}] of pictures resized to whole tiles."
            )
        if image_grids is None or given != len(pixel_values):
            raise ValueError(
                f"image_grids tell of {given} tiles for pixel_values of {len(pixel_values)}; give [N, 3] with the "
                "frames, rows and columns of tiles of each picture."
            )
        return self.features(self.normalise(pixel_values), image_grids)[:, None]

    def features(self, pixels: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """Normalised tiles [T, 3, S, S] of pictures of these grids -> merged rows [T, D].

        Those of a tower with DeepStack (Qwen3-VL) hold what each of its chosen layers says, behind the last one's.
        """
        assert image_grids is not None, "forward says so"
        patches = self.patches(pixels)
        grids = image_grids.to(patches.device) * torch.tensor([1, self.merge, self.merge], device=patches.device)
        output = self.tower(patches, grid_thw=grids)
        if not self.deepstack:
            return output.pooler_output
        return torch.cat([output.pooler_output, *output.deepstack_features], -1)

    def patches(self, pixels: Tensor) -> Tensor:
        """Normalised tiles [T, 3, S, S] -> patches as the tower takes them [T * merge^2, 3 * frames * P * P].

        Each patch is its channels, each channel the picture once for every frame of a temporal patch.
        """
        squares = pixels.unflatten(3, (self.merge, self.patch)).unflatten(2, (self.merge, self.patch))
        squares = squares.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # [T * merge^2, 3, P, P]
        return squares[:, :, None].expand(-1, -1, self.frames, -1, -1).flatten(1)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """As every encoder's."""
        if enable:
            self.tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.tower.gradient_checkpointing_disable()


def _shape(config: VisionConfig) -> tuple[str, Any]:
    """The kind of tower and its configuration out of the options."""
    options = dict(config.options)
    kind = options.pop("model_type", None)
    if kind not in TOWERS:
        raise ValueError(f"vision.options.model_type={kind!r} of {config.name}; {nearest(str(kind), list(TOWERS))}")
    shape = TOWERS[kind][1]
    for name in options:
        if name not in shape.__annotations__:
            raise ValueError(f"{config.name} has no option {name!r}; {nearest(name, list(shape.__annotations__))}")
    return kind, shape(**options)
