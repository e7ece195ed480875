"""Image tokenizers by name: pictures as grids of codes, and back. A library is imported when its kind is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmllm.models.image_tokenizers.tokenizer import ImageTokenizer, Quantised
from dmllm.registry import Table

__all__ = ["IMAGE_TOKENIZERS", "PUBLISHED", "ImageTokenizer", "Quantised", "build_image_tokenizer"]

IMAGE_TOKENIZERS = Table(
    "image tokenizer",
    {
        "fsq": "dmllm.models.image_tokenizers.fsq:Fsq",
        "magvit_v2": "dmllm.models.image_tokenizers.magvit_v2:MagvitV2",
        "vq": "dmllm.models.image_tokenizers.vq:VectorQuantised",
    },
)
# What the authors' config.json calls a class, and the name it has here.
PUBLISHED = {"MAGVITv2": "magvit_v2", "VQModel": "vq"}


def build_image_tokenizer(name: str, fields: Mapping[str, Any] | None = None) -> ImageTokenizer:
    """The tokenizer with random weights.

    Args:
        name: in the table above, or the path of your own.
        fields: of its configuration, e.g. {"levels": [8, 5, 5, 5]} for fsq.

    Raises:
        ValueError: an unknown name, or fields that it has not.
        ImportError: its library is missing; says what to install.
    """
    return IMAGE_TOKENIZERS.load(name).from_fields(fields or {})
