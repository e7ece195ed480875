"""Between texts and pictures and what is drawn: descriptions to prompts, pictures to codes, codes to pictures.

Shapes: B pictures of rows x columns codes, each `stride` pixels a side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from dmllm.data.crops import crop
from dmllm.data.holes import HOLE, Gapped, gapped
from dmllm.data.images import load_image
from dmllm.drawing import KEY, UNKNOWN, vocabulary_of
from dmllm.image_vocabulary import ImageVocabulary
from dmllm.models.image_tokenizers import ImageTokenizer
from dmllm.samplers.config import decode_config
from dmllm.samplers.modalities import Part

GREY = 127
SIZE = "size"  # of the defaults in generation_config.json, pixels of a side or (width, height)
Size = int | tuple[int, int] | None


@dataclass(frozen=True)
class Board:
    """A model's image vocabulary and tokenizer: descriptions to prompts, pictures to codes, codes to pictures."""

    images: ImageVocabulary
    tokenizer: ImageTokenizer
    encode: Callable[[str], list[int]]
    defaults: Mapping[str, Any]

    @staticmethod
    def of(pipeline: Any, image_tokenizer: Any) -> Board:
        """Raises ValueError where a part is missing, or they do not fit each other."""
        images = vocabulary_of(pipeline.model)
        if image_tokenizer is not None:
            pipeline = copy(pipeline).drawing_by(image_tokenizer)
        tokenizer = pipeline.image_tokenizer
        if tokenizer is None:
            raise ValueError(
                "This checkpoint has no image tokenizer, which makes pictures of codes; name one: "
                "load(..., image_tokenizer='PATH'), or image_tokenizer= here."
            )
        if tokenizer.num_codes != images.size:
            raise ValueError(
                f"The image tokenizer has {tokenizer.num_codes} codes and the model {images.size}; take its own."
            )
        if pipeline.processor is None:
            raise ValueError("This checkpoint has no tokenizer of texts; draw by ids with dmllm.drawing.draw().")
        return Board(images, tokenizer, _encoder(pipeline.processor), pipeline.generation.get(KEY) or {})

    def grid(self, size: Size, picture: Image.Image | None = None) -> tuple[int, int]:
        """Rows and columns of codes of a picture of `size`. Raises ValueError where these are no whole numbers."""
        stride = self.tokenizer.stride
        if size is None and picture is not None and (SIZE not in self.defaults or self.images.newline is not None):
            return max(round(picture.height / stride), 1), max(round(picture.width / stride), 1)
        size = size or self.defaults.get(SIZE)
        if size is None:
            raise ValueError(f"size=None: this checkpoint names none; say one, in multiples of {stride} pixels.")
        width, height = (size, size) if isinstance(size, int) else size
        if width % stride or height % stride or width < 1 or height < 1:
            near = [max(round(side / stride), 1) * stride for side in (width, height)]
            raise ValueError(f"size={width}x{height} is not in codes of {stride} pixels; try {near[0]}x{near[1]}.")
        return height // stride, width // stride

    def scales(self, guidance: float | None, edits: bool = False) -> tuple[float, ...]:
        """Of the guidance away from no description; none where it is 0. `edits`: where a picture is seen."""
        own = self.defaults.get("guidance", 0.0)
        own = self.defaults.get("edit_guidance", own) if edits else own
        scale = own if guidance is None else guidance
        return (float(scale),) if scale else ()

    def drawing(self, text: str | None) -> list[int]:
        """The prompt of a picture; None: of one of nothing in particular."""
        return self.images.drawing(self._described(self.images.draw_text, text))

    def guided_edit(
        self, codes: Tensor, text: str, scales: tuple[float, ...], image_guidance: float | None
    ) -> tuple[list[list[int]], tuple[float, ...]]:
        """The prompts of a picture that a seen one is made into, and the scales of those after the first: without what
        is to be done, and without the picture."""
        around = self.images.edit_text
        told, seen = self._described(around, text), [codes]
        prompts = [self.images.editing(seen, told)]
        if scales:
            prompts.append(self.images.editing(seen, self._described(around, None)))
        by_image = self.defaults.get("image_guidance", 0.0) if image_guidance is None else image_guidance
        if by_image:
            prompts.append(self.images.drawing(told))
        return prompts, (*scales, *((float(by_image),) if by_image else ()))

    def codes(self, picture: Image.Image, grid: tuple[int, int]) -> Tensor:
        """[rows, columns] of a picture, cut to that shape."""
        pixels = crop(picture, (grid[0] * self.tokenizer.stride, grid[1] * self.tokenizer.stride))
        return self.tokenizer.encode(pixels[None])[0].cpu()

    def cells(self, mask: Any, grid: tuple[int, int]) -> Tensor:
        """Which codes are drawn anew, [rows, columns] bool: those that white pixels touch."""
        if isinstance(mask, str | os.PathLike | bytes | Image.Image):
            mask = load_image(mask)
        else:
            array = np.asarray(mask)
            if array.ndim != 2:
                raise ValueError(f"mask is {list(array.shape)}; it must be a picture, or [H, W].")
            mask = Image.fromarray((array > 0).astype(np.uint8) * 255)
        stride = self.tokenizer.stride
        pixels = crop(mask.convert("RGB"), (grid[0] * stride, grid[1] * stride), interpolation="nearest")[0]
        return (pixels > GREY).view(grid[0], stride, grid[1], stride).any(3).any(1)

    def margins(self, expand: tuple[int, int, int, int]) -> list[int]:
        """Codes at the left, right, top and bottom, of pixels at the left, top, right and bottom."""
        stride = self.tokenizer.stride
        if len(expand) != 4 or any(side < 0 or side % stride for side in expand):
            raise ValueError(f"expand={expand}: left, top, right, bottom in pixels, each a multiple of {stride}.")
        left, top, right, bottom = (side // stride for side in expand)
        return [left, right, top, bottom]

    def pictures(self, codes: Tensor) -> list[Image.Image]:
        """Of codes [B, rows, columns], grey where they are UNKNOWN."""
        known = (codes != UNKNOWN).cpu()
        pixels = self.tokenizer.decode(codes.clamp(min=0).to(next(self.tokenizer.parameters()).device)).cpu()
        stride = self.tokenizer.stride
        known = known.repeat_interleave(stride, 1).repeat_interleave(stride, 2)[:, None]
        pixels = torch.where(known, pixels, GREY).permute(0, 2, 3, 1)
        return [Image.fromarray(picture.numpy()) for picture in pixels]

    def _described(self, around: str, text: str | None) -> list[int]:
        """The ids of a description in what stands around it, or of none."""
        if text is not None:
            return self.encode(around.replace("{}", text))
        if self.images.unconditional is None:
            return self.encode(around.replace("{}", ""))
        before, after = around.split("{}")
        return [*self.encode(before), self.images.unconditional, *self.encode(after)]


@dataclass(frozen=True)
class Line:
    """A description with holes in front of a picture, all of it on the canvas but for what opens it."""

    processor: Any
    images: ImageVocabulary
    ids: list[int]
    at: int  # where the description begins
    gaps: Gapped | None  # None: it has no holes
    text: str

    @staticmethod
    def of(processor: Any, images: ImageVocabulary, text: str) -> Line:
        """Raises ValueError where a hole has several lengths."""
        encode, gaps = _encoder(processor), None
        before, after = (encode(part) for part in images.draw_text.split("{}"))
        inner = encode(text) if not HOLE.search(text) else []
        if not inner:
            gaps = gapped(processor, text, None)
            if gaps.choices > 1 or any(hole.grows for hole in gaps.holes):
                raise ValueError(f"{text!r:.80}: a hole beside a picture has one length; say [MASK:4] for four tokens.")
            inner = gaps.lay(gaps.lengths()[0]).ids
        whole = images.drawing([*before, *inner, *after])[len(images.draw) :]
        return Line(processor, images, whole, len(before), gaps, text)

    def parts(self, decode: Mapping[str, Any], generation: Mapping[str, Any]) -> list[Part]:
        """The holes, and what may stand in them; none where there are none."""
        if self.gaps is None:
            return []
        laid, table = self.gaps.lay(self.gaps.lengths()[0]), self.processor.tokens.kinds
        holes = [place for place, number in enumerate(laid.ids) if number == self.images.mask]
        allowed = torch.zeros(len(table), self.images.text_of[1], dtype=torch.bool)
        allowed[:, : table.shape[1]] = table[:, : allowed.shape[1]]
        own = {"count_mask": bool(generation.get("count_mask", False)), **decode}
        config = decode_config({**own, "max_new_tokens": len(holes), "eos_token_id": []})
        slots = torch.tensor(holes) + self.at
        kinds = torch.tensor([laid.kinds[place] for place in holes])
        return [Part(slots=slots, words=self.images.text_of, config=config, allowed=allowed[kinds])]

    def read(self, ids: list[int]) -> tuple[str, list[str]]:
        """The text, and what stands in its holes, of the filled canvas."""
        if self.gaps is None:
            return self.text, []
        laid = self.gaps.lay(self.gaps.lengths()[0])
        return self.gaps.read(laid, ids[self.at : self.at + len(laid.ids)], self.processor.decode)[:2]


def _encoder(processor: Any) -> Callable[[str], list[int]]:
    """Texts to ids. Raises ValueError for one that spells a mask."""

    def encode(text: str) -> list[int]:
        processor.tokens.images_in([{"role": "user", "content": [{"type": "text", "text": text}]}])
        return processor.tokens.encode(text)[0].tolist() if text else []

    return encode


def some_of(cells: Tensor, strength: float, draws: list[Generator]) -> Tensor:
    """A share `strength` of the cells [B, rows, columns], each row's drawn from its own generator."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} is a share of the codes, between 0 and 1.")
    chosen = []
    for own, generator in zip(cells.flatten(1), draws, strict=True):
        numbers = torch.rand(len(own), generator=generator, device=generator.device).to(own.device)
        first = numbers.masked_fill(~own, 2.0).argsort()[: round(strength * int(own.sum()))]
        chosen.append(torch.zeros_like(own).index_fill(0, first, True))
    return torch.stack(chosen).view_as(cells)
