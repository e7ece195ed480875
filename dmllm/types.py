"""The shared nouns: what is read, what is processed, what a model is fed, what a loss returns.

Shapes: B rows of a batch, L stream rows ("tokens", image rows included), T image tiles, H x W pixels.
Ids that are not tokens: a label of IGNORE is never noised and never scored; an image slot of TEXT is an ordinary token,
ROW_BREAK is the learned end-of-row vector of a tiled image, anything >= 0 is a row of the image features.
Documents: 0, 1, ... are conversations that do not see each other; PREFIX rows are seen by every document of the
row (one picture, many questions); PADDING rows see only themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

IGNORE = -100
TEXT, ROW_BREAK = -1, -2
PREFIX, PADDING = -1, -2


class Part(TypedDict):
    """One piece of a message: text, or an image given as a path, bytes, a data URL or a PIL image."""

    type: Literal["text", "image"]
    text: NotRequired[str]
    image: NotRequired[Any]


class Message(TypedDict):
    """One chat message in the form transformers' processors and the OpenAI API share.

    `kind` (a question's category, for per-kind scores) rides along when the data has it.
    """

    role: str
    content: list[Part]
    kind: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation as read from a source, before any tokenizer or image has been touched."""

    messages: list[Message]
    source: str  # the data set's name
    location: str  # "file.json: record 12", for error messages
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The ids that carry meaning for the model: rows of its vocabulary, but `image` may be a negative placeholder."""

    mask: int
    eos: int
    pad: int
    image: int | None = None


@dataclass(frozen=True, kw_only=True)
class Vocabulary(SpecialTokens):
    """The special ids, how many ids there are in all, what random tokens are drawn from, and where codes are."""

    size: int
    codes: tuple[int, int] | None = None  # the first code of a picture, and the id behind the last

    @property
    def reserved(self) -> tuple[int, ...]:
        """Ids that are no word of any text, ascending: mask, image, and padding where it is not the end of sequence."""
        pad = None if self.pad == self.eos else self.pad
        return tuple(sorted({i for i in (self.mask, self.image, pad) if i is not None and 0 <= i < self.size}))

    @property
    def words(self) -> int:
        """How many ids are not reserved; the end of sequence is one of them."""
        return self.size - len(self.reserved)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One processed row, on the CPU. Image slots count the rows of this example's own tiles from 0."""

    input_ids: Tensor  # [L] int64
    labels: Tensor  # [L] int64, IGNORE where nothing is predicted
    image_slots: Tensor  # [L] int64
    documents: Tensor  # [L] int64
    positions: Tensor  # [L] int64, or [4, L]: the place, then time, height and width
    pixel_values: Tensor | None = None  # [T, 3, H, W] uint8, or None without images
    image_resizes: Tensor | None = None  # [R, 9] int64, the numbers of dmllm.tiling.Resize, by their first tile
    image_grids: Tensor | None = None  # [N, 3] int64: frames, rows and columns of tiles, of images of native size
    index: int = 0  # global example index, the key of its random draws

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded to one length. Image slots index the features of the whole batch."""

    input_ids: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64
    image_slots: Tensor  # [B, L] int64
    documents: Tensor  # [B, L] int64
    positions: Tensor  # [B, L] int64, or [4, B, L]: the place, then time, height and width for three-axis rotary
    pixel_values: Tensor | None = None  # [T, 3, H, W] uint8
    image_resizes: Tensor | None = None  # [R, 9] int64, on the CPU: feature maps to be resized, by their first tile
    image_grids: Tensor | None = None  # [N, 3] int64, on the CPU: frames, rows and columns of tiles
    indices: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [B] global example indices

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; indices of draws and sizes of maps stay on the CPU, where they are read."""
        staying = ("indices", "image_resizes", "image_grids")
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if f.name not in staying and isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class LossSum:
    """A loss before division: the mean is total / count, with both summed over micro-batches and ranks first."""

    total: Tensor  # scalar, differentiable
    count: Tensor  # scalar, no gradient


@dataclass(frozen=True, kw_only=True)
class Step:
    """One state of the denoising loop, as `stream` yields it and animations draw it."""

    ids: Tensor  # [B, N] the canvas, mask tokens where still unknown
    committed: Tensor  # [B, N] bool
    num_forwards: Tensor  # [B] model calls each row has used so far
    finished: Tensor  # [B] bool
    num_wasted: int = 0  # model calls besides that served no row, where a GPU's host learns late that all is finished
