"""One processor for training, evaluation and inference: a conversation with images -> a row of the stream.

    record -> turns -> chat template -> ids, piece by piece -> image rows for image tokens -> documents -> Example

Training ids are exactly the prompt's ids followed by the answer's. Labels are only on answers and their end-of-turn
token. Every stream row of an image holds the image token's id and its slot (dmllm.tiling).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature

from dmllm.config import to_dict
from dmllm.data.chat import CHAT_TEMPLATE, Chat, as_messages
from dmllm.data.collate import collate
from dmllm.data.images import MAX_PIXELS, cut_tiles, load_image
from dmllm.data.lengths import change_lengths, check_lengths
from dmllm.data.packing import (
    Chunk,
    Document,
    Turns,
    fit,
    lay_out,
    leading_images,
    length,
    only_last_answer,
    repeated,
    split_turns,
    tiles_of,
)
from dmllm.data.tokens import Tokens
from dmllm.hub import fetch
from dmllm.tiling import ROW_BREAK, Grid, Resize, TilingConfig, plan
from dmllm.types import PADDING, Example, Message, Part, Record, SpecialTokens

CONFIG_FILE, TEMPLATE_FILE = "processor_config.json", "chat_template.jinja"
IMAGES = ("pixel_values", "image_resizes", "image_grids")
Rows = tuple[np.ndarray, Grid | None]  # an image's slots, and its grid if it keeps its own size


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    """How conversations become rows."""

    tiling: TilingConfig | None = None
    """How images are cut; None: a text-only model, images are refused."""
    image_frame: tuple[int, ...] = ()
    """Two ids that stand before and behind the rows of every image, where the template does not write them; or none."""
    turns: Turns = "all"
    """all: every assistant turn labelled; one: a random one, after its history; each: a document for every turn."""
    image_prefix: bool = False
    """Rows up to the last leading image are a prefix that all documents of the row share; needed by turns: each."""
    max_length: int = 2048
    """Rows of an example, image rows included; later documents and turns are dropped, then answers cut, to fit."""
    answer_lengths: tuple[int, ...] = ()
    """Canvas lengths: a document's last answer is padded with end tokens to the smallest that fits; []: not padded."""
    longer: float = 0.0
    """Probability that an answer is padded to a larger listed length, drawn uniformly, instead of the smallest."""
    further_ends: float = 0.0
    """Probability of 1 to n further end tokens behind an answer of n, so that any canvas teaches where answers end."""
    cut_answers: float = 0.0
    """Probability that of an answer of more than 16 tokens only a beginning is learned, as in a canvas too short."""
    eos_padding: Literal["none", "batch"] = "none"
    """batch: rows are filled up to the batch's length with end tokens of their last document, as LLaDA does."""
    score_padding: bool = True
    """Whether the end tokens that pad answers (all of the above) are labelled; the first always is."""
    max_pixels: int = MAX_PIXELS
    """Images of more pixels are refused before they are decoded."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer_lengths", tuple(sorted(self.answer_lengths)))
        object.__setattr__(self, "image_frame", tuple(self.image_frame))
        if self.turns not in ("all", "one", "each"):
            raise ValueError(f"turns={self.turns!r} is not known; use all, one or each.")
        if self.eos_padding not in ("none", "batch"):
            raise ValueError(f"eos_padding={self.eos_padding!r} is not known; use none or batch.")
        if self.turns == "each":
            check_each(self)
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves no room for a question and an answer.")
        if not 0 <= self.longer <= 1 or (self.longer and len(self.answer_lengths) < 2):
            raise ValueError(
                f"longer={self.longer} with answer_lengths={list(self.answer_lengths)}: a probability, and there must "
                "be a larger length to choose, for example answer_lengths: [16, 32]."
            )
        if self.answer_lengths and self.answer_lengths[0] < 1:
            raise ValueError(f"answer_lengths={list(self.answer_lengths)}: lengths are at least 1.")
        check_lengths(self)


def check_each(config: ProcessorConfig) -> None:
    """Raise ValueError unless the configuration can pack one document a turn behind one image."""
    if not config.image_prefix:
        raise ValueError("turns: each needs image_prefix: true, so that the picture is encoded once for all documents.")


class Processor:
    """Conversations to rows and ids to text, for one tokenizer, chat template and way of cutting images.

    Args:
        tokenizer: a transformers tokenizer that knows the special tokens.
        config: how conversations become rows.
        special: the ids of the special tokens.
        chat_template: jinja; None takes the tokenizer's own, or the default one if it has none.
    """

    def __init__(
        self, tokenizer: Any, config: ProcessorConfig, special: SpecialTokens, chat_template: str | None = None
    ):
        self.tokenizer, self.config, self.special = tokenizer, config, special
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE
        self.tokens = Tokens(tokenizer, special, config.image_frame)
        if config.tiling is not None and special.image is None:
            raise ValueError(
                "tiling is set, but special.image is None: name the image token's id, or set tiling: null."
            )
        self.chat = Chat(
            self.chat_template,
            image_token=self.tokens.image_text,
            special_texts=self.tokens.special_texts,
            variables={k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        )

    @property
    def rows_per_tile(self) -> int:
        """Rows of image features per tile; 0 without images."""
        return self.config.tiling.rows_per_tile if self.config.tiling else 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the end token and what the chat template puts behind an answer."""
        question: Message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
        answer: Message = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
        last = int(self.tokens.encode(self.chat.pieces([question, answer])[-1].text)[0][-1])
        ends = {self.special.eos, *([last] if self.tokens.text_of(last) in self.chat.special_texts else [])}
        return tuple(sorted(ends))

    def example(
        self, record: Record, *, generator: torch.Generator, turns: Turns | None = None, index: int = 0
    ) -> Example:
        """A labelled row for training. `turns` overrides the configuration's for this record.

        Raises:
            ValueError: naming the record, when its images, turns or length do not work out.
        """
        try:
            turns = turns or self.config.turns
            if turns == "each":
                check_each(self.config)
            conversations = split_turns(record.messages, turns, generator)
            rows, pixel_values, resizes = self._images(conversations)
            only_last = turns != "all"
            documents = [self._document(messages, rows, only_last=only_last) for messages in conversations]
            if not all(document[-1].is_answer for document in documents):
                raise ValueError("an empty answer, and the chat template puts no end token behind it.")
            if turns == "one":
                documents = [only_last_answer(document) for document in documents]
            documents = change_lengths(documents, self.config, self.special.eos, generator)
            shared = self._shared(conversations[0], documents[0])
            kept = fit(documents, shared, self.config.max_length)
            if kept is not documents and pixel_values is not None:
                tiles = tiles_of(kept, self.rows_per_tile, resizes)
                pixel_values, resizes = pixel_values[:tiles], [r for r in resizes if r.tile < tiles]
            return lay_out(kept, shared, pixel_values, index, resizes)
        except ValueError as error:
            raise ValueError(f"{record.location}: {error}") from None

    def prompt(self, messages: str | Sequence[Any], images: Sequence[Any] | None = None) -> Example:
        """A row for inference that ends with the generation prompt; nothing is labelled.

        Raises:
            ValueError: the last message is an answer, images and their places differ in number, or it is too long.
        """
        conversation = as_messages(messages, images)
        if not conversation or conversation[-1]["role"] == "assistant":
            raise ValueError(
                "A prompt ends with a user's message; the last one here is the assistant's, or there is none."
            )
        return self._prompt(conversation, add_generation_prompt=True)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.decode(
            ids.tolist() if isinstance(ids, Tensor) else list(ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_dict: bool = True,
        return_tensors: Literal["pt"] = "pt",
        padding_side: Literal["left", "right"] = "left",
    ) -> BatchFeature | Tensor | str | list[str]:
        """A conversation, or a list of them, as text (tokenize=False) or as inputs of the model.

        Returns:
            The inputs of `model(**inputs)`, or only input_ids with return_dict=False.
        """
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        conversations = [as_messages(c) for c in (conversation if batched else [conversation])]
        if not tokenize:
            texts = [self.chat.render(messages, add_generation_prompt) for messages in conversations]
            return texts if batched else texts[0]
        _only_tensors(return_tensors)
        examples = [self._prompt(messages, add_generation_prompt) for messages in conversations]
        features = self._features(examples, padding_side)
        return features if return_dict else features["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        return_tensors: Literal["pt"] = "pt",
        padding: bool = True,
        padding_side: Literal["left", "right"] = "left",
    ) -> BatchFeature:
        """Rendered texts, with the image token's text where images go, as inputs of the model.

        Args:
            text: one text or several, as `apply_chat_template(..., tokenize=False)` returns them.
            images: for one text an image or a list of them; for several a list with an image or a list for each.
            padding: False refuses texts of different lengths.
        """
        _only_tensors(return_tensors)
        if text is None:
            raise ValueError("text is missing; a prompt is text with the image token's text where images go.")
        texts = [text] if isinstance(text, str) else list(text)
        lists = _image_lists(images, len(texts), isinstance(text, str))
        examples = []
        for one, given in zip(texts, lists, strict=True):
            parts: list[Part] = [{"type": "image", "image": image} for image in given]
            rows, pixel_values, resizes = self._images([[{"role": "user", "content": parts}]])
            document = self._chunks([(*self.tokens.encode(one), False)], [rows[id(part)] for part in parts])
            shared = self._shared([{"role": "user", "content": parts}], document)
            examples.append(lay_out([document], shared, pixel_values, 0, resizes))
        if not padding and len({len(example) for example in examples}) > 1:
            raise ValueError("The texts differ in length; set padding=True.")
        return self._features(examples, padding_side)

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Write the tokenizer's files, chat_template.jinja and processor_config.json; returns their paths."""
        folder = Path(folder)
        written = [str(path) for path in self.tokenizer.save_pretrained(folder)]
        (folder / TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
        values = {"processor_class": "Processor", "special": to_dict(self.special), "config": to_dict(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return sorted({*written, str(folder / TEMPLATE_FILE), str(folder / CONFIG_FILE)})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None, **_: Any) -> Processor:
        """The processor that `save_pretrained` wrote; further arguments of transformers' from_pretrained are ignored.

        Args:
            folder: a folder, or a name on the hub.
            revision: of a name on the hub.

        Raises:
            FileNotFoundError: there is no such folder or name, or it has no processor.
            ValueError: the processor is of another kind.
        """
        folder = fetch(str(folder), (CONFIG_FILE,), also=("tokenizer*", TEMPLATE_FILE), revision=revision)
        path = folder / CONFIG_FILE
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("processor_class") != cls.__name__ or "special" not in values:
            raise ValueError(f"{path} is a {values.get('processor_class')!r}, not a dmllm processor.")
        tiling = values["config"].pop("tiling")
        config = ProcessorConfig(**values["config"], tiling=None if tiling is None else TilingConfig(**tiling))
        template = folder / TEMPLATE_FILE
        return cls(
            AutoTokenizer.from_pretrained(folder),
            config,
            SpecialTokens(**values["special"]),
            template.read_text(encoding="utf-8") if template.is_file() else None,
        )

    def _features(self, examples: list[Example], side: Literal["left", "right"]) -> BatchFeature:
        batch = collate(examples, self.special, rows_per_tile=self.rows_per_tile, side=side)
        return BatchFeature(
            {
                "input_ids": batch.input_ids,
                "attention_mask": (batch.documents != PADDING).long(),
                "image_slots": batch.image_slots,
                "documents": batch.documents,
                "positions": batch.positions,
                **{k: v for k in IMAGES if (v := getattr(batch, k)) is not None},
            }
        )

    def _prompt(self, conversation: list[Message], add_generation_prompt: bool) -> Example:
        rows, pixel_values, resizes = self._images([conversation])
        document = self._document(conversation, rows, add_generation_prompt, only_last=True)
        if (size := length(document)) > self.config.max_length:
            images = sum(len(chunk.ids) for chunk in document if chunk.slots is not None)
            raise ValueError(
                f"The prompt takes {size} rows, {images} of them image rows, more than "
                f"max_length={self.config.max_length}; shorten it, or raise max_length in processor_config.json."
            )
        document = [chunk._replace(is_answer=False) for chunk in document]
        return lay_out([document], self._shared(conversation, document), pixel_values, 0, resizes)

    def _images(self, conversations: list[list[Message]]) -> tuple[dict[int, Rows], Tensor | None, list[Resize]]:
        """The rows of every image part, by the part's identity; all tiles in order of first appearance; and what of
        them is to be resized."""
        parts: dict[int, Part] = {}
        for messages in conversations:
            for message in messages:
                for part in message["content"]:
                    if part["type"] == "image":
                        parts[id(part)] = part
        if not parts:
            return {}, None, []
        if self.config.tiling is None:
            raise ValueError("an image, but this model takes ids alone (tiling: null): text, or a picture's own ids.")
        tiling = self.config.tiling.of(len(parts))
        rows, tiles, num_tiles = {}, [], 0
        resizes: list[Resize] = []
        for key, part in parts.items():
            if "image" not in part:
                raise ValueError("an image part without an image.")
            image = load_image(part["image"], self.config.max_pixels)
            cut = plan(image.width, image.height, tiling)
            slots = np.array(cut.slots)
            if num_tiles:
                slots[slots != ROW_BREAK] += num_tiles * tiling.rows_per_tile
            if cut.resize is not None:
                resizes.append(cut.resize._replace(tile=cut.resize.tile + num_tiles))
            rows[key] = slots, cut.grid
            tiles.append(cut_tiles(image, cut, tiling))
            num_tiles += cut.num_tiles
        return rows, tiles[0] if len(tiles) == 1 else torch.cat(tiles), resizes

    def _document(
        self,
        messages: list[Message],
        rows: dict[int, Rows],
        add_generation_prompt: bool = True,
        only_last: bool = False,
    ) -> Document:
        slots = [rows[id(part)] for part in self.tokens.images_in(messages)]
        pieces = self.chat.pieces(messages, add_generation_prompt, only_last)
        return self._chunks([(*self.tokens.encode(piece.text), piece.is_answer) for piece in pieces], slots)

    def _chunks(self, pieces: list[tuple[np.ndarray, list[int], bool]], slots: list[Rows]) -> Document:
        """Encoded pieces with the rows of an image in place of each image token."""
        if (used := sum(len(places) for _, places, _ in pieces)) != len(slots):
            raise ValueError(
                f"{len(slots)} images for {used} image tokens in the rendered text; there must be one "
                f"{self.tokens.image_text!r} for each, which the chat template emits for an image part."
            )
        supply = iter(slots)
        document: Document = []
        for ids, places, is_answer in pieces:
            start = 0
            for place in places:
                if place > start:
                    document.append(Chunk(ids[start:place]))
                image, grid = next(supply)
                document.append(Chunk(repeated(self.special.image or 0, len(image)), image, grid=grid))
                start = place + 1
            if start < len(ids):
                document.append(Chunk(ids[start:] if start else ids, None, is_answer))
        return document

    def _shared(self, messages: list[Message], document: Document) -> int:
        return leading_images(messages, document) if self.config.image_prefix else 0


def _only_tensors(return_tensors: str) -> None:
    if return_tensors != "pt":
        raise ValueError(f"return_tensors={return_tensors!r}: inputs are torch tensors; use 'pt'.")


def _image_lists(images: Any, number: int, single: bool) -> list[list[Any]]:
    """A list of images for each of `number` texts."""
    if images is None:
        return [[] for _ in range(number)]
    if single:
        return [list(images) if isinstance(images, list | tuple) else [images]]
    lists = [list(i) if isinstance(i, list | tuple) else [] if i is None else [i] for i in images]
    if len(lists) != number:
        raise ValueError(f"{len(lists)} lists of images for {number} texts; give one for each, [] where there is none.")
    return lists
