"""Projectors: patch features of the vision encoder -> rows of the backbone's stream.

    linear         one matrix                                             (LLaVA, arXiv:2304.08485)
    mlp2x_gelu     linear, GELU, linear                                   (LLaVA-1.5, arXiv:2310.03744)
    mlp2x_silu     linear, SiLU, linear                                   (Dimple, arXiv:2505.16990)
    identity       nothing, behind a tower that projects by itself        (Qwen2.5-VL, arXiv:2502.13923)
    pool           neighbouring patches averaged or resized, before or behind a projection (LaViDa, arXiv:2505.16839)
    pixel_shuffle  neighbouring patches laid side by side, then project   (InternVL, arXiv:2404.16821)
    resampler      learned queries read the patches by cross-attention    (Flamingo's Perceiver, arXiv:2204.14198)

Each has `grid`, the (rows, cols) that one tile takes in the stream, row by row.
Shapes: T tiles, rows x cols patches of width `in_features` -> rows' x cols' of width `out_features`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmllm.nn.gelu import SteadyGELU
from dmllm.registry import Table
from dmllm.tiling import Resize

PROJECTORS = Table(
    "projector",
    {
        "linear": "dmllm.models.projectors:Linear",
        "mlp2x_gelu": "dmllm.models.projectors:Mlp",
        "mlp2x_silu": "dmllm.models.projectors:SiluMlp",
        "identity": "dmllm.models.projectors:Identity",
        "pool": "dmllm.models.projectors:Pool",
        "pixel_shuffle": "dmllm.models.projectors:PixelShuffle",
        "resampler": "dmllm.models.projectors:Resampler",
    },
)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Which projector, and its own settings."""

    name: str = "mlp2x_gelu"
    """A name of PROJECTORS, or "package.module:attribute"."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that projector, e.g. {factor: 2, mode: bilinear} for pool."""


def build_projector(
    config: ProjectorConfig, *, in_features: int, out_features: int, grid: tuple[int, int]
) -> nn.Module:
    """The projector for patches of width `in_features` on `grid`. Raises ValueError for a setting it does not have."""
    projector = PROJECTORS.load(config.name)
    try:
        return projector(in_features, out_features, tuple(grid), **config.options)
    except TypeError as error:
        raise ValueError(f"projector {config.name!r} refuses options={config.options}: {error}.") from None


class Linear(nn.Linear):
    """One matrix with bias."""

    def __init__(self, in_features: int, out_features: int, grid: tuple[int, int]):
        super().__init__(in_features, out_features)
        self.grid = grid


class Mlp(nn.Sequential):
    """Linear, GELU, linear; the hidden width is `out_features`. Keys are LLaVA's: 0 and 2.

    Args:
        gelu_parts: the number of threads whose rounding the GELU has (`nn.gelu`); None: those there are.
    """

    activation: type[nn.Module] = nn.GELU

    def __init__(self, in_features: int, out_features: int, grid: tuple[int, int], gelu_parts: int | None = None):
        first, last = nn.Linear(in_features, out_features), nn.Linear(out_features, out_features)
        super().__init__(first, SteadyGELU(parts=gelu_parts) if gelu_parts else self.activation(), last)
        self.grid = grid


class SiluMlp(Mlp):
    """The same with SiLU."""

    activation = nn.SiLU


class Identity(nn.Identity):
    """The tower's features as they are."""

    def __init__(self, in_features: int, out_features: int, grid: tuple[int, int]):
        super().__init__()
        if in_features != out_features:
            raise ValueError(f"projector 'identity': features of width {in_features} for a stream of {out_features}.")
        self.grid = grid


class Pool(nn.Module):
    """Fewer patches. A side that `factor` does not divide is rounded up (27 -> 14).

    Args:
        factor: patches per output row along each side.
        mode: "average" or "max" over each factor x factor window, or "bilinear" resizing.
        then: the projection, "mlp2x_gelu" or "linear".
        projected: pool what is projected already, as LLaVA's code does, in place of the patches.
        whole: average, max: leave out the windows that stand over the edge (27 -> 13).
        gelu_parts: of the projection, see `Mlp`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: tuple[int, int],
        factor: int = 2,
        mode: str = "average",
        then: str = "mlp2x_gelu",
        projected: bool = False,
        whole: bool = False,
        gelu_parts: int | None = None,
    ):
        super().__init__()
        if mode not in ("average", "max", "bilinear"):
            raise ValueError(f"pool mode={mode!r} is not one of: max, average, bilinear.")
        _check_factor("pool", factor)
        if whole and (mode == "bilinear" or min(grid) < factor):
            raise ValueError(f"pool whole=True: mode={mode!r} must have a whole window of {factor} patches a side.")
        self.patches, self.factor, self.mode, self.projected, self.whole = grid, factor, mode, projected, whole
        rows, cols = grid
        self.grid = (rows // factor, cols // factor) if whole else (-(-rows // factor), -(-cols // factor))
        options = {"gelu_parts": gelu_parts} if gelu_parts and then == "mlp2x_gelu" else {}
        self.project = _projection(then, in_features, out_features, self.grid, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.project(x)) if self.projected else self.project(self.pool(x))

    def pool(self, x: Tensor) -> Tensor:
        """Patches [T, rows * cols, D] -> [T, rows' * cols', D]."""
        image = x.transpose(1, 2).unflatten(2, self.patches)  # [T, D, rows, cols]
        if self.mode == "average":
            pooled = F.avg_pool2d(image, self.factor, ceil_mode=not self.whole, count_include_pad=False)
        elif self.mode == "max":
            pooled = F.max_pool2d(image, self.factor, ceil_mode=not self.whole)
        else:
            pooled = F.interpolate(image, size=self.grid, mode="bilinear", align_corners=False)
        return pooled.flatten(2).transpose(1, 2)


class PixelShuffle(nn.Module):
    """Each factor x factor square of patches becomes one row of factor^2 times the width, then a projection.

    Args:
        factor: patches per output row along each side; must divide both sides of the grid.
        then: the projection, "mlp2x_gelu" or "linear".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: tuple[int, int],
        factor: int = 2,
        then: str = "mlp2x_gelu",
    ):
        super().__init__()
        _check_factor("pixel_shuffle", factor)
        if grid[0] % factor or grid[1] % factor:
            raise ValueError(
                f"pixel_shuffle factor={factor} does not divide the {grid[0]} x {grid[1]} patches; use a factor that "
                "does, another vision.image_size, or 'pool', which rounds up."
            )
        self.patches, self.factor = grid, factor
        self.grid = (grid[0] // factor, grid[1] // factor)
        self.project = _projection(then, in_features * factor**2, out_features, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        (rows, cols), f = self.grid, self.factor
        squares = x.unflatten(1, (rows, f, cols, f)).transpose(2, 3)  # [T, rows', cols', f, f, D]
        return self.project(squares.flatten(3).flatten(1, 2))


class Resampler(nn.Module):
    """Learned queries that read the patches: a fixed number of rows, whatever the patch grid.

    Args:
        num_queries: rows per tile; laid out as a square if it is one, else as one line.
        depth: blocks of cross-attention and feed-forward.
        num_heads: attention heads; None gives heads of width 64 (one, where `out_features` is smaller).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: tuple[int, int],
        num_queries: int = 64,
        depth: int = 2,
        num_heads: int | None = None,
    ):
        super().__init__()
        heads = num_heads or max(out_features // 64, 1)
        if num_queries < 1 or depth < 1 or out_features % heads:
            raise ValueError(
                f"resampler num_queries={num_queries} and depth={depth} must be at least 1, and num_heads={heads} must "
                f"divide the width {out_features} of the stream."
            )
        side = isqrt(num_queries)
        self.grid = (side, side) if side**2 == num_queries else (1, num_queries)
        self.project = nn.Linear(in_features, out_features)
        self.queries = nn.Parameter(torch.randn(num_queries, out_features) * 0.02)
        self.positions = nn.Parameter(torch.randn(grid[0] * grid[1], out_features) * 0.02)
        self.blocks = nn.ModuleList(_Reader(out_features, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(out_features)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.project(x) + self.positions  # [T, rows * cols, D]
        rows = self.queries.expand(x.shape[0], -1, -1)  # [T, num_queries, D]
        for block in self.blocks:
            rows = block(rows, patches)
        return self.norm(rows)


class _Reader(nn.Module):
    """Queries read the patches and themselves, then a feed-forward; both added to the stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_rows, self.norm_patches, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, rows: Tensor, patches: Tensor) -> Tensor:
        normed = self.norm_rows(rows)
        seen = torch.cat([self.norm_patches(patches), normed], dim=1)
        q = self.q(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [T, heads, num_queries, D / heads]
        k, v = self.kv(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        rows = rows + self.out(read)
        return rows + self.mlp(self.norm_mlp(rows))


def resize_maps(features: Tensor, resizes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Image rows [T * N, D] of which some images' maps are made smaller (`tiling.Resize`), in the place they had.

    Args:
        resizes: [R, 9] int64 on the CPU, by their first tile.
        grid: (rows, columns) of one tile, N in all.
    """
    parts, done = [], 0
    for numbers in resizes.tolist():
        r = Resize(*numbers)
        first, count = r.tile * grid[0] * grid[1], r.down * r.across * grid[0] * grid[1]
        tiles = features[first : first + count].view(r.down, r.across, *grid, -1)
        whole = tiles.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # [D, down * rows, across * columns]
        kept = whole[None, :, r.top : r.bottom, r.left : r.right]
        small = F.interpolate(kept, size=(r.height, r.width), mode="bilinear", align_corners=False)
        rows = small[0].flatten(1).T  # [height * width, D]
        parts += [features[done:first], rows, features[first + len(rows) : first + count]]
        done = first + count
    return torch.cat([*parts, features[done:]])


def _projection(name: str, in_features: int, out_features: int, grid: tuple[int, int], **options: Any) -> nn.Module:
    if name not in ("linear", "mlp2x_gelu"):
        raise ValueError(f"then={name!r} is not one of: linear, mlp2x_gelu.")
    return PROJECTORS.load(name)(in_features, out_features, grid, **options)


def _check_factor(name: str, factor: int) -> None:
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"{name} factor={factor} must be a whole number of at least 1; 1 keeps every patch.")
