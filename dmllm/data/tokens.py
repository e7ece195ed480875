"""Text -> ids, and what must not be spelled in a text: the part of a tokenizer that rows are made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dmllm.types import Message, Part, SpecialTokens

CACHED_TEXTS = 65536  # ids of recent short texts; questions repeat
CACHED_CHARACTERS = 512
PLACEHOLDER = "<image>"  # the text of an image token that the vocabulary does not have (LLaVA, arXiv:2304.08485)

ANY, WORD, SPACE = 0, 1, 2  # kinds of tokens: any text, a word with its space before it, such a word or the space
SPACES = ("\u0120", "\u2581", " ")  # how vocabularies write the space that begins a word


class Tokens:
    """A tokenizer's ids for rendered text; never truncated, no special tokens added, recent short texts remembered."""

    def __init__(self, tokenizer: Any, special: SpecialTokens, image_frame: tuple[int, ...] = ()):
        self.tokenizer, self.image, self.image_frame = tokenizer, special.image, image_frame
        self.mask_text = self.text_of(special.mask)
        self.image_text = None if special.image is None else self._text_of_image(special.image)
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_texts = tuple(sorted(specials | set(tokenizer.all_special_tokens)))
        self._encoder = self._splitting_encoder()
        self._cache: dict[str, tuple[np.ndarray, list[int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_encoder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encoder = self._splitting_encoder()

    def encode(self, text: str) -> tuple[np.ndarray, list[int]]:
        """The ids [n] int64 of a text, and where among them the image tokens are."""
        found = self._cache.get(text)
        if found is None:
            ids = np.array(self._framed(self._encoder(text)), dtype=np.int64)
            places = [] if self.image is None else np.flatnonzero(ids == self.image).tolist()
            found = ids, places
            if len(text) <= CACHED_CHARACTERS:
                if len(self._cache) >= CACHED_TEXTS:
                    self._cache.clear()
                self._cache[text] = found
        return found

    def text_of(self, token_id: int) -> str:
        """A token's own text. Raises ValueError for an id that the tokenizer does not have."""
        text = self.tokenizer.convert_ids_to_tokens(int(token_id))
        if text is None:
            raise ValueError(f"The tokenizer has no token {token_id}; it knows {len(self.tokenizer)} tokens.")
        return text

    @cached_property
    def kinds(self) -> Tensor:
        """Which tokens are of each kind, [3, tokens] bool; special and added ones are of none."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        texts = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        texts = ["" if i in special else text or "" for i, text in enumerate(texts)]
        begins = [text.startswith(SPACES) for text in texts]
        words = [b and text[1:].strip("".join(SPACES)) == text[1:] != "" for b, text in zip(begins, texts, strict=True)]
        spaces = [word or text in SPACES for word, text in zip(words, texts, strict=True)]
        return torch.tensor([[bool(text) for text in texts], words, spaces])

    @cached_property
    def has_words(self) -> bool:
        """Whether the vocabulary has words with the space before them, and they read so."""
        texts = self.tokenizer.convert_ids_to_tokens(self.kinds[WORD].nonzero().flatten().tolist())
        word = next((text for text in texts if text.isascii() or text[1:].isascii()), None)
        if word is None:
            return False
        token = self.tokenizer.convert_tokens_to_ids(word)
        return self._read([token, token]).endswith(f"{word[1:]} {word[1:]}")

    def _read(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, special tokens by their names."""
        texts = []
        for token_id in ids:
            text = self.tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            begins_word = str(self.tokenizer.convert_ids_to_tokens(token_id)).startswith("\u2581")  # sentencepiece's
            texts.append(f" {text}" if begins_word and not text.startswith(" ") else text)
        return texts

    def _framed(self, ids: list[int]) -> list[int]:
        """With the two ids that surround an image, where there are."""
        if not self.image_frame:
            return ids
        first, last = self.image_frame
        return [one for number in ids for one in ((first, number, last) if number == self.image else (number,))]

    def _text_of_image(self, token_id: int) -> str:
        return PLACEHOLDER if token_id < 0 else self.text_of(token_id)

    def _splitting_encoder(self) -> Callable[[str], list[int]]:
        """Where the image token is no token of the tokenizer, what stands around it is encoded piece by piece."""
        encode, image, text = _encoder(self.tokenizer), self.image, self.image_text
        if image is None or text is None or image >= 0:
            return encode

        def around(whole: str) -> list[int]:
            first, *others = (encode(part) if part else [] for part in whole.split(text))
            return [*first, *(number for part in others for number in (image, *part))]

        return around

    def images_in(self, messages: list[Message]) -> list[Part]:
        """The image parts of the messages.

        Raises:
            ValueError: an answer with an image, or a text that spells the mask token or the image token.
        """
        images = []
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    if message["role"] == "assistant":
                        raise ValueError("an image in an assistant turn; answers are text.")
                    images.append(part)
                    continue
                text = part.get("text", "")
                if self.mask_text in text or (self.image_text is not None and self.image_text in text):
                    found = self.mask_text if self.mask_text in text else self.image_text
                    raise ValueError(
                        f"the text contains {found!r}, a special token of the model; give images as image parts, and "
                        "write such names differently."
                    )
        return images


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Encodes with a copy of the tokenizer, which calls of the original cannot set to truncate."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return lambda text: tokenizer.encode(text, add_special_tokens=False)
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    return lambda text: own.encode(text, add_special_tokens=False).ids
