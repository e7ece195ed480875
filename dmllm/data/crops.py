"""Pictures of any size -> pixels of the size that an image tokenizer takes: covered, and cut."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmllm.data.images import resized


def crop(
    image: Image.Image, size: tuple[int, int], *, at: tuple[float, float] = (0.5, 0.5), interpolation: str = "bicubic"
) -> Tensor:
    """The picture made so small or large that it just covers `size`, and cut to it: uint8 [3, H, W].

    With the default `at` this is what torchvision's Resize and CenterCrop make of a square, as Show-o and MMaDA
    prepare pictures.

    Args:
        image: RGB.
        size: (height, width) in pixels.
        at: where the cut is, down and across, each between 0 (top, left) and 1.
        interpolation: nearest, bilinear, bicubic or lanczos.
    """
    height, width = size
    if image.height * width <= image.width * height:  # the height is what is scarce
        covering = height, max(int(height * image.width / image.height), width)
    else:
        covering = max(int(width * image.height / image.width), height), width
    picture = resized(image, covering, interpolation)
    top, left = (round((have - want) * share) for have, want, share in zip(covering, size, at, strict=True))
    return pixels_of(picture.crop((left, top, left + width, top + height)))


def squash(image: Image.Image, size: tuple[int, int], *, interpolation: str = "bicubic") -> Tensor:
    """The whole picture at `size` (height, width), whatever becomes of its shape: uint8 [3, H, W]."""
    return pixels_of(resized(image, size, interpolation))


def pixels_of(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an RGB picture."""
    return torch.from_numpy(np.array(image, dtype=np.uint8).transpose(2, 0, 1).copy())
