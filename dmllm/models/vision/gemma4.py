"""How Gemma 4's tower is shown pictures: at their own shape and as large as fits, in squares that each become one row.

    picture -- resized --> squares of pooling_kernel_size x pooling_kernel_size patches -- tower, pooling --> rows

Source: transformers, models/gemma4 (Gemma4ImageProcessorPil, Gemma4VisionModel); Pillow resizes here as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmllm.tiling import TilingConfig

MOST_ROWS = (70, 140, 280, 560, 1120)  # that a picture may become, of which the processor names one
DEFAULT_ROWS = 280
PREPROCESSING = {"do_resize": True, "do_rescale": True, "do_convert_rgb": True, "resample": 3}
IDENTITY = {"rescale_factor": 1 / 255, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}


def tiling_of(said: Mapping[str, Any], patch_size: int, pooling_kernel_size: int) -> TilingConfig:
    """How pictures are cut for a tower of these sizes; ids may be made with any other of MOST_ROWS.

    Args:
        said: what the checkpoint's processor says, by the names of transformers' image processor.

    Raises:
        ValueError: it prepares pictures in another way, or for another tower; names the field.
    """
    wanted = {**PREPROCESSING, "patch_size": patch_size, "pooling_kernel_size": pooling_kernel_size}
    wanted |= {name: IDENTITY[name] for name in IDENTITY if name == "rescale_factor" or said.get("do_normalize")}
    for name, value in wanted.items():
        if said.get(name) is not None and said[name] != value:
            raise ValueError(f"Pictures with {name}={said[name]!r} are not supported; {value!r} is.")
    rows, side = said.get("max_soft_tokens") or DEFAULT_ROWS, patch_size * pooling_kernel_size
    if rows not in MOST_ROWS:
        raise ValueError(f"max_soft_tokens={rows!r} is not supported; {', '.join(map(str, MOST_ROWS))} are.")
    return TilingConfig(
        mode="native",
        tile_size=(side, side),
        grid=(1, 1),
        min_pixels=1,
        max_pixels=rows * side**2,
        enlarge=True,
        other_max_pixels=tuple(most * side**2 for most in MOST_ROWS if most != rows),
    )


def patches_of(tiles: Tensor, rows: int, columns: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """One picture's patches in row-major order: values [P, 3 patch_size^2] in [0, 1], places (x, y) [P, 2].

    Args:
        tiles: [rows * columns, 3, H, W] uint8.
    """
    down, across = tiles.shape[-2] // patch_size, tiles.shape[-1] // patch_size
    cut = tiles.view(rows, columns, 3, down, patch_size, across, patch_size).permute(0, 3, 1, 5, 4, 6, 2)
    y, x = torch.meshgrid(
        torch.arange(rows * down, device=tiles.device),
        torch.arange(columns * across, device=tiles.device),
        indexing="ij",
    )
    return cut.reshape(y.numel(), -1).float() / 255, torch.stack([x, y], -1).view(-1, 2)
