"""What every image tokenizer is: a picture in, a grid of codes out, and back.

An encoder turns pixels into a grid of latent vectors, a quantiser puts the nearest of `num_codes` vectors in the place
of each, a decoder draws the picture from them. Codes are 0 .. num_codes - 1; whoever owns the vocabulary adds where
they begin (`dmllm.image_vocabulary`).

Pictures are uint8 outside and floats in `pixel_range` inside. Gradients pass the quantiser straight: the vectors that
were chosen hand theirs on to those that were given.
Shapes: B pictures of H x W pixels, rows = H / stride, cols = W / stride, D features of a latent vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """What a quantiser chose."""

    latents: Tensor  # [B, D, rows, cols], the chosen vectors; their gradient goes to those they stand for
    codes: Tensor  # [B, rows, cols] int64
    losses: dict[str, Tensor] = field(default_factory=dict)  # scalars to be added up, coefficients included


class ImageTokenizer(nn.Module, ABC):
    """Pixels to codes and back; each kind fills in its configuration and the four abstract methods."""

    config: Any
    num_codes: int
    stride: int  # pixels of a code's side
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    rounds: bool = True  # False: a drawn value between two whole ones becomes the lower, as the authors have it

    @classmethod
    @abstractmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ImageTokenizer:
        """The tokenizer that a config.json describes, with random weights. Raises ValueError for what it is not."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """What `from_fields` makes the same tokenizer of: plain values."""

    @abstractmethod
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Pixels in `pixel_range`, [B, 3, H, W], to [B, D, rows, cols], not quantised."""

    @abstractmethod
    def quantise(self, latents: Tensor) -> Quantised:
        """Latent vectors [B, D, rows, cols] to the nearest that have a code."""

    @abstractmethod
    def from_codes(self, codes: Tensor) -> Tensor:
        """The vectors [B, D, rows, cols] of codes [B, rows, cols]."""

    @abstractmethod
    def to_pixels(self, latents: Tensor) -> Tensor:
        """Vectors that have a code, [B, D, rows, cols], to pixels [B, 3, H, W] around `pixel_range`, not clamped."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantised]:
        """The picture drawn again from its codes, for training. Pixels as of `to_latents`."""
        quantised = self.quantise(self.to_latents(pixels))
        return self.to_pixels(quantised.latents), quantised

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> codes [B, rows, cols] int64.

        Raises:
            ValueError: other than uint8 pictures, or sides that are no multiples of `stride`.
        """
        return self.quantise(self.to_latents(self.normalise(pixel_values))).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, rows, cols] -> uint8 [B, 3, rows * stride, cols * stride].

        Raises:
            ValueError: another shape, or codes outside 0 .. num_codes - 1.
        """
        if codes.ndim != 3:
            raise ValueError(
                f"codes are {list(codes.shape)}; decode takes [B, rows, cols]: of one square picture of N codes, type "
                "codes.view(1, round(N**0.5), -1)."
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise ValueError(
                f"codes lie in {int(codes.min())} .. {int(codes.max())}; allowed are 0 .. {self.num_codes - 1}: take "
                "away first where they begin in the vocabulary."
            )
        return self.denormalise(self.to_pixels(self.from_codes(codes)))

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> floats in `pixel_range`, in the dtype of the weights. Raises as `encode`."""
        shape = list(pixel_values.shape)
        if pixel_values.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"pixel_values are {pixel_values.dtype} {shape}; this tokenizer takes uint8 [B, 3, H, W].")
        if shape[2] % self.stride or shape[3] % self.stride:
            near = [max(round(side / self.stride), 1) * self.stride for side in shape[2:]]
            raise ValueError(
                f"Pictures of {shape[2]}x{shape[3]} pixels are no whole rows and columns of codes, each {self.stride} "
                f"pixels wide; resize or crop to {near[0]}x{near[1]}."
            )
        low, high = self.pixel_range
        weight = next(self.parameters())
        return (pixel_values.to(weight.device).float() / 255 * (high - low) + low).to(weight.dtype)

    def denormalise(self, pixels: Tensor) -> Tensor:
        """Floats around `pixel_range` -> uint8 of the same shape."""
        low, high = self.pixel_range
        values = ((pixels.float() - low) / (high - low)).clamp(0, 1) * 255
        return (values.round() if self.rounds else values).to(torch.uint8)
