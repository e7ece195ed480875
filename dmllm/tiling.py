"""How an image becomes tiles and stream rows, from its width and height alone: pure arithmetic, no pixels.

    resize   one tile, the aspect ratio ignored
    pad      one tile, the image centred on a canvas of the tile's shape (LLaVA's expand2square), then resized
    anyres   a base tile (the whole image, resized) and the image at its best-fitting pinpoint resolution, centred and
             cut into tiles in row-major order (LLaVA-NeXT's any-resolution)
    native   the image at (about) its own size and shape, in as many tiles as it has, each of which is one stream row

Source: LLaVA-NeXT `mm_utils.py` (select_best_resolution, resize_and_pad_image, expand2square) and `llava_arch.py`
(unpad_image, image_newline); LLaVA-OneVision's "anyres_max_N", arXiv:2408.03326, section 3.2; Qwen2-VL's smart_resize
and get_rope_index, arXiv:2409.12191, section 2.1; transformers' get_aspect_ratio_preserving_size of Gemma 4.
Conventions: sizes are (height, width); a slot is a row of the image's features, tile * rows * columns + row of the
tile; ROW_BREAK stands for the learned end-of-row vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from dmllm.types import ROW_BREAK

Size = tuple[int, int]  # (height, width)
Grid = tuple[int, int, int]  # (frames, rows, columns)

LARGEST_CANVAS = 64_000_000  # pixels; a longer, thinner image is shrunk before it is padded
LONGEST_PADDED_SIDE = 4096  # pixels, of an image shrunk for that reason
LARGEST_ASPECT = 200  # the longer side over the shorter, of an image at its own shape
TOLERATED = 1.1  # times the largest side that a feature map may have before it is resized


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """How an image is cut for a vision encoder that takes tiles of one size."""

    mode: Literal["resize", "pad", "anyres", "native"] = "resize"
    """resize: one tile, aspect ignored; pad: one tile, aspect kept; anyres: a base tile and a grid of tiles; native: as
    many tiles as the image has."""
    tile_size: Size = (0, 0)
    """Height and width of a tile in pixels; (0, 0) is filled in from the vision encoder when a model is composed."""
    grid: Size = (0, 0)
    """Stream rows of one tile after the projector, as (rows, columns); (0, 0) is filled in likewise."""
    pinpoints: tuple[Size, ...] = ()
    """anyres: the resolutions to choose from, (height, width) in pixels, each a multiple of the tile size."""
    row_break: bool = False
    """A learned end-of-row vector after every feature row of the tiled part (anyres), or after the single tile."""
    unpad: bool = True
    """anyres: leave out the feature rows and columns that come from padding."""
    max_tiles: int | None = None
    """anyres: more feature rows than 1.1^2 times those of this many tiles are resized to about as many; None: kept."""
    min_pixels: int = 56 * 56
    """native: smaller images are enlarged to at least this many pixels."""
    max_pixels: int = 28 * 28 * 1280
    """native: larger images are shrunk to at most this many pixels."""
    enlarge: bool = False
    """native: whether every smaller image is enlarged to as many as fit in `max_pixels` (Gemma 4)."""
    other_max_pixels: tuple[int, ...] = ()
    """native: other values of `max_pixels`, of which one holds where ids have as many image tokens as it makes rows."""
    several: Literal["same", "pad"] = "same"
    """How each of several images of one request is cut: as one alone, or as one padded tile each."""
    fill: tuple[int, int, int] | None = None
    """Red, green, blue of the padding, 0-255; None: the encoder's mean (127) for pad, black for anyres, as LLaVA."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "torch_bilinear", "torch_bicubic"] = "bicubic"
    """How pixels are resized: by Pillow, or by torch as torchvision and transformers' "fast" processors do it, which
    rounds otherwise (a few pixels differ, by one or two of 255)."""

    def __post_init__(self) -> None:
        for name in ("tile_size", "grid"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "pinpoints", tuple(tuple(p) for p in self.pinpoints))
        object.__setattr__(self, "other_max_pixels", tuple(self.other_max_pixels))
        if self.fill is not None:
            object.__setattr__(self, "fill", tuple(self.fill))
        if self.mode not in ("resize", "pad", "anyres", "native"):
            raise ValueError(f"tiling mode={self.mode!r} is not known; use resize, pad, anyres or native.")
        if self.mode == "native" and self.grid not in ((0, 0), (1, 1)):
            raise ValueError(f"mode='native' makes one stream row of each tile, not {self.grid}; leave grid out.")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} must be at least 1 and at most {self.max_pixels=}.")
        if self.several not in ("same", "pad"):
            raise ValueError(f"tiling several={self.several!r} is not known; use same or pad.")
        if self.max_tiles is not None and (self.mode != "anyres" or self.max_tiles < 1):
            raise ValueError(f"max_tiles={self.max_tiles} with mode={self.mode!r}: at least 1, and only with anyres.")
        if (self.mode == "anyres") != bool(self.pinpoints):
            raise ValueError(
                f"mode={self.mode!r} with pinpoints={self.pinpoints}: pinpoints belong to mode='anyres', which needs "
                "them, for example [[384, 768], [768, 384], [768, 768]]."
            )
        height, width = self.tile_size
        for h, w in self.pinpoints if height and width else ():
            if h % height or w % width or h < 1 or w < 1:
                raise ValueError(f"pinpoint ({h}, {w}) is not a multiple of the tile size ({height}, {width}).")

    @property
    def rows_per_tile(self) -> int:
        """Rows of image features that one tile yields."""
        return self.grid[0] * self.grid[1]

    def of(self, images: int) -> TilingConfig:
        """How each of so many images of one request is cut."""
        if images < 2 or self.several == "same":
            return self
        return replace(self, mode="pad", pinpoints=(), max_tiles=None)

    def making(self, rows: int, sizes: Sequence[Size]) -> TilingConfig:
        """The first of this and its `other_max_pixels` that makes so many stream rows of images of these sizes; this
        where none does."""
        choices = (self, *(replace(self, max_pixels=most) for most in self.other_max_pixels))
        made = (sum(len(plan(width, height, own).slots) for height, width in sizes) for own in choices)
        return next((own for own, number in zip(choices, made, strict=True) if number == rows), self)


@dataclass(frozen=True, kw_only=True)
class View:
    """One picture of the image that is cut into tiles: resize to `size`, paste on `canvas`, resize to `final`, cut."""

    size: Size  # the image is resized to this
    canvas: Size  # and pasted on a canvas of this size
    offset: Size  # with its corner at (top, left)
    final: Size  # the canvas is resized to this: a whole number of tiles


class Resize(NamedTuple):
    """A feature map that is made smaller, bilinearly, and then takes the place of its first tiles' rows."""

    tile: int  # the map's first tile
    down: int  # tiles of the map
    across: int
    top: int  # the part that is kept of it, in feature rows and columns
    bottom: int
    left: int
    right: int
    height: int  # what that becomes
    width: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an image of one size becomes."""

    views: tuple[View, ...]
    slots: tuple[int, ...]  # one entry a stream row: tile * rows_per_tile + row of the tile, or ROW_BREAK
    num_tiles: int
    grid: Grid | None = None  # native: the tiles as frames x rows x columns
    resize: Resize | None = None  # what happens to the features before the slots name them


@lru_cache(maxsize=4096)
def plan(width: int, height: int, config: TilingConfig) -> Plan:
    """The tiles and stream rows of an image of `width` x `height` pixels.

    Raises:
        ValueError: an empty image, or a configuration whose tile size or grid was never filled in.
    """
    if width < 1 or height < 1:
        raise ValueError(f"An image of {width}x{height} pixels has nothing to show.")
    if min(*config.tile_size, *config.grid) < 1:
        raise ValueError(
            f"tile_size={config.tile_size} and grid={config.grid} must be set: the vision encoder's image size and "
            "the (rows, columns) that its projector leaves of one tile."
        )
    if config.mode == "anyres":
        return _anyres(width, height, config)
    if config.mode == "native":
        size = native_size(width, height, config)
        grid = (1, size[0] // config.tile_size[0], size[1] // config.tile_size[1])
        whole = View(size=size, canvas=size, offset=(0, 0), final=size)
        tiles = grid[1] * grid[2]
        return Plan(views=(whole,), slots=tuple(range(tiles * config.rows_per_tile)), num_tiles=tiles, grid=grid)
    tile = config.tile_size
    one = View(size=tile, canvas=tile, offset=(0, 0), final=tile)
    if config.mode == "pad":
        one = _padded(width, height, tile)
    slots = [*range(config.rows_per_tile), *([ROW_BREAK] if config.row_break else [])]
    return Plan(views=(one,), slots=tuple(slots), num_tiles=1)


def select_best_resolution(width: int, height: int, pinpoints: tuple[Size, ...]) -> Size:
    """The pinpoint that shows the most pixels of the image, then wastes the fewest; the first of equals."""
    best: Size = pinpoints[0]
    best_effective, least_wasted = -1, math.inf
    for h, w in pinpoints:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = h * w - effective
        if effective > best_effective or (effective == best_effective and wasted < least_wasted):
            best, best_effective, least_wasted = (h, w), effective, wasted
    return best


def unpadded(width: int, height: int, rows: int, columns: int, patch_aspect: float = 1.0) -> tuple[range, range]:
    """The feature rows and columns of a centred image that do not come from padding.

    patch_aspect: width / height of the pixels under one feature; 1 for square patches, where this is LLaVA's rule.
    """
    if width / height > columns / rows * patch_aspect:
        kept = max(1, int(height * (columns / width) * patch_aspect))
        cut = max(0, (rows - kept) // 2)
        return range(cut, rows - cut), range(columns)
    kept = max(1, int(width * (rows / height) / patch_aspect))
    cut = max(0, (columns - kept) // 2)
    return range(rows), range(cut, columns - cut)


def native_size(width: int, height: int, config: TilingConfig) -> Size:
    """The nearest whole numbers of tiles, within `min_pixels` and `max_pixels`, that keep the shape (smart_resize); or
    with `enlarge` the largest ones.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if config.enlarge:
        return _largest(width, height, config)
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise ValueError(f"An image of {width}x{height} pixels is more than {LARGEST_ASPECT} times as long as wide.")
    sides = tuple(zip((height, width), config.tile_size, strict=True))
    rounded = [round(side / tile) * tile for side, tile in sides]
    if math.prod(rounded) > config.max_pixels:
        scale = math.sqrt(height * width / config.max_pixels)
        rounded = [max(tile, math.floor(side / scale / tile) * tile) for side, tile in sides]
    elif math.prod(rounded) < config.min_pixels:
        scale = math.sqrt(config.min_pixels / (height * width))
        rounded = [math.ceil(side * scale / tile) * tile for side, tile in sides]
    return rounded[0], rounded[1]


def axis_positions(segments: Sequence[int | Grid], start: int = 0) -> np.ndarray:
    """Positions in time, height and width [3, L] of text (its number of rows) and images (their grids) in turn.

    A token of text stands at one number on all three axes. An image's rows stand at the number behind what precedes,
    plus their frame, row and column; what follows goes on behind the largest of these.
    """
    parts = [np.zeros((3, 0), dtype=np.int64)]
    for segment in segments:
        if isinstance(segment, int):
            steps, taken = np.arange(segment)[None].repeat(3, 0), segment
        else:
            steps, taken = np.indices(segment).reshape(3, -1), max(segment)
        parts.append(start + steps)
        start += taken
    return np.concatenate(parts, 1)


def _largest(width: int, height: int, config: TilingConfig) -> Size:
    """Rounded down to whole tiles; an image too thin for one row or column of them has one, as long as it may be."""
    tile_h, tile_w = config.tile_size
    scale = math.sqrt(config.max_pixels / (height * width))
    down, across = math.floor(scale * height / tile_h), math.floor(scale * width / tile_w)
    most = config.max_pixels // (tile_h * tile_w)
    if not down:
        down, across = 1, min(width // height, most)
    elif not across:
        down, across = min(height // width, most), 1
    return down * tile_h, across * tile_w


def _padded(width: int, height: int, tile: Size) -> View:
    canvas_h = max(height, math.ceil(width * tile[0] / tile[1]))
    canvas_w = max(width, math.ceil(height * tile[1] / tile[0]))
    if canvas_h * canvas_w > LARGEST_CANVAS:
        scale = LONGEST_PADDED_SIDE / max(canvas_h, canvas_w)
        canvas_h, canvas_w = max(1, int(canvas_h * scale)), max(1, int(canvas_w * scale))
        width, height = min(canvas_w, max(1, int(width * scale))), min(canvas_h, max(1, int(height * scale)))
    offset = ((canvas_h - height) // 2, (canvas_w - width) // 2)
    return View(size=(height, width), canvas=(canvas_h, canvas_w), offset=offset, final=tile)


def _anyres(width: int, height: int, config: TilingConfig) -> Plan:
    tile_h, tile_w = config.tile_size
    target_h, target_w = select_best_resolution(width, height, config.pinpoints)
    scale_w, scale_h = target_w / width, target_h / height
    if scale_w < scale_h:
        fit = (min(math.ceil(height * scale_w), target_h), target_w)
    else:
        fit = (target_h, min(math.ceil(width * scale_h), target_w))
    offset = ((target_h - fit[0]) // 2, (target_w - fit[1]) // 2)
    target = (target_h, target_w)
    views = (
        View(size=config.tile_size, canvas=config.tile_size, offset=(0, 0), final=config.tile_size),
        View(size=fit, canvas=target, offset=offset, final=target),
    )
    rows, columns = config.grid
    tiles_down, tiles_across = target_h // tile_h, target_w // tile_w
    map_rows, map_columns = range(tiles_down * rows), range(tiles_across * columns)
    if config.unpad:
        aspect = (tile_w * rows) / (tile_h * columns)
        map_rows, map_columns = unpadded(width, height, len(map_rows), len(map_columns), aspect)
    resize = _resize(map_rows, map_columns, (tiles_down, tiles_across), config)
    slots = list(range(rows * columns))
    for y in map_rows if resize is None else range(resize.height):
        if resize is None:
            first = (1 + (y // rows) * tiles_across) * rows * columns + (y % rows) * columns
            slots += [first + (x // columns) * rows * columns + x % columns for x in map_columns]
        else:
            first = resize.tile * rows * columns + y * resize.width
            slots += range(first, first + resize.width)
        if config.row_break:
            slots.append(ROW_BREAK)
    return Plan(views=views, slots=tuple(slots), num_tiles=1 + tiles_down * tiles_across, resize=resize)


def _resize(map_rows: range, map_columns: range, tiles: Size, config: TilingConfig) -> Resize | None:
    """What `max_tiles` makes of a map of which these rows and columns are kept; None where it is small enough."""
    height, width = len(map_rows), len(map_columns)
    times = math.sqrt(height * width / (config.max_tiles * config.rows_per_tile)) if config.max_tiles else 0.0
    if times <= TOLERATED:
        return None
    kept = (map_rows.start, map_rows.stop, map_columns.start, map_columns.stop)
    return Resize(1, *tiles, *kept, max(1, int(height // times)), max(1, int(width // times)))
