"""Images as they are found (paths, bytes, data URLs, PIL images) -> RGB pixels -> uint8 tiles.

Everything that a picture file may be ends in one of two ways: an RGB image that looks as the file shows it (turned as
its EXIF says, transparent parts on white, 16-bit grey scaled to 8 bits), or a ValueError that names the source. Sizes
are read from the header first, so that a decompression bomb is refused before it is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dmllm.tiling import Plan, TilingConfig

MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112  # the EXIF tag

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_DATA_URL = re.compile(r"data:(?P<type>[\w.+/-]*)(?:;[\w=.+-]+)*?(?P<base64>;base64)?,", re.ASCII)


def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image from a path, bytes, a data URL, a PIL image, or Hugging Face's {"bytes", "path"}.

    Raises:
        ValueError: not an image, truncated, more than `max_pixels` pixels, or of a form without a fixed range.
    """
    name = describe(source)
    try:
        image = _open(source, name)
        if image.width * image.height > max_pixels:
            raise _Refused(
                f"{name}: {image.width}x{image.height} pixels are more than the allowed {max_pixels}; shrink it first."
            )
        image.load()
        return _to_rgb(image, name)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no such file, seen from {Path.cwd()}.") from None
    except Exception as error:  # damaged files make the decoders raise whatever they stumble on
        raise ValueError(f"{name}: not a readable image: {error or type(error).__name__}") from None


def cut_tiles(image: Image.Image, plan: Plan, config: TilingConfig) -> Tensor:
    """The plan's tiles of an RGB image, in the plan's order: uint8 [T, 3, H, W]."""
    height, width = config.tile_size
    fill = config.fill or ((127, 127, 127) if config.mode == "pad" else (0, 0, 0))
    tiles = []
    for view in plan.views:
        picture = resized(image, view.size, config.interpolation)
        if view.canvas != view.size:
            canvas = Image.new("RGB", (view.canvas[1], view.canvas[0]), fill)
            canvas.paste(picture, (view.offset[1], view.offset[0]))
            picture = canvas
        picture = resized(picture, view.final, config.interpolation)
        down, across = view.final[0] // height, view.final[1] // width
        pixels = np.asarray(picture).reshape(down, height, across, width, 3)
        tiles.append(pixels.transpose(0, 2, 4, 1, 3).reshape(down * across, 3, height, width))
    stacked = tiles[0] if len(tiles) == 1 else np.concatenate(tiles)
    return torch.from_numpy(np.array(stacked, dtype=np.uint8, order="C"))


def describe(source: Any) -> str:
    """How an image source is called in messages: its path, or what it is."""
    if isinstance(source, str) and source.startswith("data:"):
        return f"data URL of {len(source)} characters"
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source)} bytes"
    if isinstance(source, dict):
        return str(source.get("path") or describe(source.get("bytes")))
    return getattr(source, "filename", "") or type(source).__name__


class _Refused(Exception):
    """Carries a finished message past the handler for damaged files."""


def _open(source: Any, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str) and source.startswith("data:"):
        source = _decode_data_url(source, name)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise _Refused(f"{name}: web addresses are not fetched; download the image and give its path or its bytes.")
    if isinstance(source, bytes | bytearray | memoryview):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str | os.PathLike):
        return Image.open(source)
    raise _Refused(f"An image is a path, bytes, a data URL or a PIL image, not {type(source).__name__}.")


def _decode_data_url(url: str, name: str) -> bytes:
    match = _DATA_URL.match(url)
    if match is None or not match["base64"]:
        raise _Refused(f"{name}: only base64 data URLs are read, 'data:image/png;base64,...'.")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except binascii.Error as error:
        raise _Refused(f"{name}: its base64 text is damaged: {error}.") from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if "exif" in image.info or image.format in ("TIFF", "MPO"):
        image = _turned(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _grey_to_rgb(np.asarray(image).astype(np.int64), name)
    if image.mode == "F":
        raise _Refused(f"{name}: floating-point pixels have no fixed range; save it with 8 bits per channel.")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _turned(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the orientation; the pixels are sound
        return image


def _grey_to_rgb(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
        raise _Refused(f"{name}: 32-bit pixels outside 0..65535 have no fixed range; save it with 8 or 16 bits.")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")


def resized(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """The picture at `size` (height, width)."""
    height, width = size
    if image.size == (width, height):
        return image
    if (resample := _RESAMPLING.get(interpolation)) is not None:
        return image.resize((width, height), resample)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    found = F.interpolate(pixels, size, mode=interpolation.removeprefix("torch_"), antialias=True)
    return Image.fromarray(found[0].permute(1, 2, 0).contiguous().numpy())
