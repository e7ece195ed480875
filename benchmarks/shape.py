"""One set of random weights in LLaDA's published format, of a chosen size: what all rows of a table compute with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from dmllm.checkpoints.example import write_example

SPREAD = 0.05  # of the weights: logits far enough apart that rounding turns no choice


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a request."""

    width: int = 512
    """Of the stream."""
    layers: int = 5
    """Blocks of the transformer; with the widths here 15.6M weights."""
    heads: int = 8
    """Query heads, each with keys and values of its own."""
    inner: int = 1344
    """Width inside the feed-forward."""
    vocabulary: int = 32768
    """Rows of the embedding and of the vocabulary projection, another 16.8M weights each."""
    prompt: int = 793
    """Rows before the answer: a picture of 729 and a question of 64."""
    tokens: int = 128
    """Tokens of the answer."""
    block: int = 32
    """Tokens of a block."""
    per_call: int = 4
    """Tokens that a call commits."""

    @property
    def steps(self) -> int:
        return self.tokens // self.per_call

    @property
    def calls_per_block(self) -> int:
        return self.block // self.per_call

    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1

    @property
    def body(self) -> int:
        """Weights of the blocks."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner)

    def fields(self) -> dict[str, Any]:
        """config.json in LLaDA's own names."""
        return {
            "d_model": self.width,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "n_kv_heads": self.heads,
            "mlp_hidden_size": self.inner,
            "vocab_size": self.vocabulary,
            "embedding_size": self.vocabulary,
            "mask_token_id": self.mask_id,
            "eos_token_id": self.vocabulary - 2,
            "pad_token_id": self.vocabulary - 3,
        }

    def ids(self, rows: int = 1, length: int | None = None, seed: int = 0) -> torch.Tensor:
        """Prompts [rows, length] of random tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocabulary - 10, (rows, length or self.prompt), generator=generator)


def write(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of that shape in `folder`, which holds nothing yet."""
    sizes = folder.with_suffix(".yaml")
    sizes.write_text(yaml.safe_dump(shape.fields()), encoding="utf-8")
    write_example("llada", folder, size=str(sizes), seed=seed)
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(seed)
    weights = load_file(file)
    for weight in weights.values():
        if weight.ndim > 1:
            weight.normal_(std=SPREAD, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def add_options(parser: argparse.ArgumentParser) -> None:
    """--width, --layers, ..."""
    for f in fields(Shape):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=int, default=f.default)


def of(arguments: argparse.Namespace) -> Shape:
    """The shape that was asked for. Raises ValueError where a request does not divide into blocks and calls."""
    shape = Shape(**{f.name: getattr(arguments, f.name) for f in fields(Shape)})
    if shape.tokens % shape.block or shape.block % shape.per_call:
        raise ValueError(
            f"{shape.tokens} tokens in blocks of {shape.block}, {shape.per_call} a call: each must divide the one "
            "before it; try --tokens 128 --block 32 --per-call 4."
        )
    return shape


def about(shape: Shape) -> list[str]:
    """What is computed, in words."""
    return [
        f"LLaDA blocks with random weights, {shape.body / 1e6:.3g}M in {shape.layers} of width {shape.width}, "
        f"vocabulary {shape.vocabulary}; prompt {shape.prompt}, {shape.tokens} new tokens, blocks of {shape.block}, "
        f"{shape.per_call} tokens a call",
    ]
