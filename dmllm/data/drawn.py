"""Conversations whose answer is a picture: its codes on the canvas, behind a description or a picture to be changed.

    {"role": "user", "content": [{"type": "text", "text": "a red circle"}]}
    {"role": "assistant", "content": [{"type": "image", "image": "circle.png"}]}

becomes the ids that `imagine` asks with, and the picture's codes, which are labelled; what frames them is given. A
picture in the question stands before the description as codes, as `edit` has it. All else is the processor's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmllm.data.crops import crop
from dmllm.data.images import load_image
from dmllm.data.packing import Turns
from dmllm.data.processor import Processor, ProcessorConfig
from dmllm.image_vocabulary import ImageVocabulary
from dmllm.types import IGNORE, TEXT, Example, Record, SpecialTokens

KEPT = 65536  # pictures whose codes are remembered, by their paths


class DrawingProcessor(Processor):
    """A processor that also makes rows of records whose answer is a picture.

    Args:
        images: where codes stand among the model's tokens.
        image_tokenizer: what makes codes of pictures: `encode`, `stride`.
        size: pixels of a side, or (width, height), of the pictures that are learned.
        caption_dropout: how often a description is left out, so that there is something to guide away from.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: ProcessorConfig,
        special: SpecialTokens,
        chat_template: str | None = None,
        *,
        images: ImageVocabulary,
        image_tokenizer: Any,
        size: int | tuple[int, int],
        caption_dropout: float = 0.1,
    ):
        super().__init__(tokenizer, config, special, chat_template)
        width, height = (size, size) if isinstance(size, int) else size
        if width % image_tokenizer.stride or height % image_tokenizer.stride:
            raise ValueError(f"size={width}x{height} must be in codes of {image_tokenizer.stride} pixels.")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout={caption_dropout} is a probability.")
        self.images, self.image_tokenizer, self.caption_dropout = images, image_tokenizer, caption_dropout
        self.pixels = height, width
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": OrderedDict()}

    def example(
        self, record: Record, *, generator: torch.Generator, turns: Turns | None = None, index: int = 0
    ) -> Example:
        """As `Processor.example`; the answer that is a picture is the last, and there is one question."""
        answer = record.messages[-1]
        if answer["role"] != "assistant" or not any(part["type"] == "image" for part in answer["content"]):
            return super().example(record, generator=generator, turns=turns, index=index)
        try:
            return self._drawn(record, generator, index)
        except ValueError as error:
            raise ValueError(f"{record.location}: {error}") from None

    def _drawn(self, record: Record, generator: torch.Generator, index: int) -> Example:
        asked, answer = record.messages[:-1], record.messages[-1]
        if len(answer["content"]) != 1 or any(message["role"] != "user" for message in asked):
            raise ValueError("a picture is the whole answer to the one question of its conversation.")
        parts = [part for message in asked for part in message["content"]]
        text = " ".join(part["text"] for part in parts if part["type"] == "text" and "text" in part).strip()
        sources = [self.codes(part["image"]) for part in parts if part["type"] == "image" and "image" in part]
        left_out = float(torch.rand((), generator=generator)) < self.caption_dropout
        around = self.images.edit_text if sources else self.images.draw_text
        told = self._told(around, None if left_out else text)
        opening = self.images.editing(sources, told) if sources else self.images.drawing(told)
        codes = self.codes(answer["content"][0].get("image"))
        ids, slots = self.images.canvas(*codes.shape)
        ids[slots] = codes.flatten() + self.images.offset
        whole = torch.cat([torch.tensor(opening), ids])
        if len(whole) > self.config.max_length:
            raise ValueError(f"{len(whole)} rows are more than max_length={self.config.max_length}; raise it.")
        labels = torch.full_like(whole, IGNORE)
        labels[slots + len(opening)] = ids[slots]
        nothing = torch.zeros_like(whole)
        return Example(
            input_ids=whole,
            labels=labels,
            image_slots=nothing + TEXT,
            documents=nothing,
            positions=torch.arange(len(whole)),
            index=index,
        )

    def codes(self, image: Any) -> Tensor:
        """[rows, columns] of a picture, cut to the size that is learned; remembered, where it is a path."""
        if isinstance(image, str) and image in self._known:
            return self._known[image].long()
        pixels = crop(load_image(image, self.config.max_pixels), self.pixels)
        found = self.image_tokenizer.encode(pixels[None])[0].cpu()
        if isinstance(image, str):
            self._known[image] = found.int()
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return found

    def _told(self, around: str, text: str | None) -> Sequence[int]:
        """The ids of a description in what stands around it; None: of none."""
        before, after = around.split("{}")
        if text is None and self.images.unconditional is not None:
            return [*self._ids(before), self.images.unconditional, *self._ids(after)]
        return self._ids(before + (text or "") + after)

    def _ids(self, text: str) -> list[int]:
        self.tokens.images_in([{"role": "user", "content": [{"type": "text", "text": text}]}])
        return self.tokens.encode(text)[0].tolist() if text else []
