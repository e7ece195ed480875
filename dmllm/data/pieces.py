"""What each token of a vocabulary adds to a text, in bytes: the link between a text's automaton and tokens.

A token may hold part of a character, and at the beginning of a text it may stand for less than elsewhere (sentencepiece
drops the space that opens a text); so each has two pieces, its own and its own as the first. Byte-level vocabularies
are read by GPT-2's table of bytes; of others the tokenizer itself says what a token adds, and what is found is checked
against what it says of whole texts.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

CHECKED = 200  # texts of several tokens


class Pieces(NamedTuple):
    """By token id; None is a token that is no text: a special or added one, or one that adds nothing."""

    within: list[bytes | None]
    first: list[bytes | None]


def pieces(tokenizer: Any, decode: Callable[[Sequence[int]], str]) -> Pieces:
    """The pieces of all tokens of a tokenizer.

    Args:
        tokenizer: of transformers.
        decode: ids to text, as answers are shown.

    Raises:
        ValueError: the text of several tokens is not that of each, one behind the other.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = [None if i in special else text for i, text in enumerate(tokenizer.convert_ids_to_tokens(_ids(tokenizer)))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = set() if backend is None else {part["type"] for part in _parts(json.loads(backend.to_str())["decoder"])}
    if "ByteLevel" in kinds:
        table = _bytes_of_characters()
        within = [None if not t else _byte_level(t, table) for t in texts]
        found = Pieces(within, within)
    else:
        found = _asked(texts, decode)
    _check(found, decode)
    return found


def _ids(tokenizer: Any) -> list[int]:
    return list(range(len(tokenizer)))


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return [p for part in decoder["decoders"] for p in _parts(part)] if decoder["type"] == "Sequence" else [decoder]


def _byte_level(text: str, table: dict[str, int]) -> bytes:
    numbers = [table.get(character) for character in text]
    return text.encode() if None in numbers else bytes(n for n in numbers if n is not None)


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's names of the bytes: themselves where they can be seen, characters from 256 on for the others."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(unseen)}


def _asked(texts: list[str | None], decode: Callable[[Sequence[int]], str]) -> Pieces:
    """What the tokenizer says of a token alone and of one behind another; <0xE9> is a byte."""
    anchor = next((i for i, t in enumerate(texts) if t and t.isascii() and t.isalnum() and decode([i]) == t), None)
    if anchor is None:
        raise ValueError("constraint: the tokenizer has no token of letters or digits that stands for itself.")
    before = len(decode([anchor]))
    within: list[bytes | None] = []
    first: list[bytes | None] = []
    for i, text in enumerate(texts):
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text or "")
        alone, behind = ("", "") if text is None else (decode([i]), decode([anchor, i])[before:])
        if byte and int(byte[1], 16) >= 0x80:
            raw = bytes([int(byte[1], 16)])
            within.append(raw)
            first.append(raw)
        else:
            within.append(behind.encode() or None)
            first.append(alone.encode() if behind else None)
    return Pieces(within, first)


def _check(found: Pieces, decode: Callable[[Sequence[int]], str]) -> None:
    draws = random.Random(0)
    usable = [i for i, piece in enumerate(found.within) if piece is not None]
    for _ in range(CHECKED if usable else 0):
        ids = draws.choices(usable, k=draws.randint(1, 5))
        said = b"".join([found.first[ids[0]] or b"", *(found.within[i] or b"" for i in ids[1:])])
        text = said.decode(errors="replace")
        if "\ufffd" not in text and decode(ids) != text:
            raise ValueError(
                f"constraint: this tokenizer writes the tokens {ids} as {decode(ids)!r}, each for itself {text!r}, so "
                "that which texts its tokens can spell is not known; constraints take byte-level and sentencepiece "
                "vocabularies."
            )
