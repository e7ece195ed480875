"""What every vision encoder is: uint8 pixels in, one row of features per patch out, left to right, top to bottom.

The libraries (timm, open_clip, transformers) bring the towers; an adapter says which of a tower's layers is read.
Class, register and other prefix tokens are dropped, and what the chosen layer does not need (later blocks, pooling
heads) is removed, so that it costs neither time nor memory and no parameter goes without a gradient.

Layers count from the end: -1 is the library's last features, final norm included where the library applies one to the
patches; -k is the output of the k-th block from the end, without final norm (LLaVA, LLaDA-V and LaViDa read -2).
Shapes: T images, H x W pixels, rows x cols patches, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Which tower, which of its layers, and how pictures are prepared for it."""

    name: str
    """Source and name: "timm:NAME", "open_clip:NAME[/PRETRAINED]" or "hf:NAME_OR_PATH"."""
    pretrained: bool = True
    """Whether a new model starts from the published weights; False is random initialisation."""
    layer: int = -1
    """Whose output is read: -1 the library's last features, -k the k-th block from the end without final norm."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; None is the one in the cache, else main."""
    image_size: int | tuple[int, int] | None = None
    """(height, width) in pixels, or the side of a square; None is the tower's own."""
    mean: tuple[float, float, float] | None = None
    """Channel means of pixels in [0, 1]; None is the tower's own."""
    std: tuple[float, float, float] | None = None
    """Channel deviations of pixels in [0, 1]; None is the tower's own."""
    interpolation: str | None = None
    """How pictures are resized: nearest, bilinear, bicubic or lanczos; None is the tower's own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Architecture overrides for the library, e.g. {embed_dim: 128, depth: 3, num_heads: 4} for a timm ViT."""

    def __post_init__(self) -> None:
        if ":" not in self.name:
            raise ValueError(
                f"vision name {self.name!r} has no source; write 'timm:{self.name}', 'open_clip:...' or 'hf:...'."
            )
        if self.layer >= 0:
            raise ValueError(f"vision layer={self.layer} must be negative: -1 is the last one, -2 the one before it.")
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        for name, value in (("image_size", size), ("mean", self.mean), ("std", self.std)):
            object.__setattr__(self, name, None if value is None else tuple(value))

    @property
    def source(self) -> str:
        """The library: what stands before the first colon."""
        return self.name.partition(":")[0]

    @property
    def size(self) -> tuple[int, int]:
        """`image_size` of a resolved configuration: (height, width)."""
        assert isinstance(self.image_size, tuple), self
        return self.image_size

    @property
    def model(self) -> str:
        """The name within the library: what stands after the first colon."""
        return self.name.partition(":")[2]


class VisionEncoder(nn.Module, ABC):
    """A tower with its own normalisation in front; each library's adapter fills in the three abstract methods."""

    hidden_size: int
    grid: tuple[int, int]
    deepstack: int = 0  # of the features of a row, the share behind the first 1 / (1 + n) is for the first n layers
    tiling: Mapping[str, Any] = {}  # fields of `TilingConfig` that follow from the encoder

    def __init__(self, config: VisionConfig):
        super().__init__()
        assert config.mean is not None, "build_vision resolves first"
        assert config.std is not None
        self.image_size = config.size
        self.mean, self.std, self.interpolation = config.mean, config.std, config.interpolation

    @staticmethod
    @abstractmethod
    def resolve(config: VisionConfig) -> VisionConfig:
        """`config` with nothing left to look up: it rebuilds the architecture without any file or network."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [T, 3, H, W] -> the chosen layer's patch features [T, rows * cols, D]."""

    @abstractmethod
    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute the tower's blocks in the backward pass instead of storing them."""

    def forward(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """uint8 [T, 3, H, W] -> [T, rows * cols, hidden_size] in the dtype of the tower's parameters.

        `image_grids` is for encoders of native resolution; the others see every tile for itself.
        """
        if pixel_values.dtype != torch.uint8 or tuple(pixel_values.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} {list(pixel_values.shape)}; this encoder takes uint8 "
                f"[T, 3, {self.image_size[0]}, {self.image_size[1]}]: resize first and leave the normalisation to it."
            )
        features = self.features(self.normalise(pixel_values))  # [T, rows * cols, D]
        assert features.shape[1:] == (self.grid[0] * self.grid[1], self.hidden_size), (features.shape, self.grid)
        return features

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """(x / 255 - mean) / std per channel. The constants are scalars, so that nothing is copied to the device."""
        channels = [(pixel_values[:, c].float() / 255 - self.mean[c]) / self.std[c] for c in range(3)]
        return torch.stack(channels, dim=1).to(next(self.parameters()).dtype)
