"""One row of a data file in any of the common forms -> messages of content parts.

    conversations + image    LLaVA: {"from": "human" | "gpt", "value": "<image>\\n..."}
    messages + images        ShareGPT, swift, LLaMA-Factory: {"role", "content": "<image>..."}
    messages of parts        OpenAI, Hugging Face: {"type": "text" | "image" | "image_url", ...}

`<image>` stands where an image goes; images without any marker go before the first question, as LLaVA puts them. Other
keys of a turn, such as a question's `kind`, stay on the message.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from dmllm.data.chat import as_part, place_images, split_marker
from dmllm.types import Message, Part

Format = Literal["auto", "llava", "messages", "openai"]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
MARKER = "<image>"


def read_row(row: Any, form: Format, folder: Path) -> list[Message]:
    """A row of any of the formats as messages. Raises ValueError saying what does not fit."""
    if not isinstance(row, dict):
        raise ValueError(f"a record is an object with keys, not {type(row).__name__}.")
    turns_key = "conversations" if "conversations" in row and form in ("auto", "llava") else "messages"
    turns = row.get(turns_key)
    if not isinstance(turns, list) or not turns:
        wanted = {"auto": "'conversations' or 'messages'", "llava": "'conversations'"}.get(form, "'messages'")
        raise ValueError(f"no list of turns under {wanted}; the keys are {', '.join(map(repr, row))}.")
    listed = row["images"] if row.get("images") is not None else row.get("image")
    images = [] if listed is None else list(listed) if isinstance(listed, list | tuple) else [listed]
    messages = [_message(turn, number, form) for number, turn in enumerate(turns)]
    if isinstance(system := row.get("system"), str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    holes = sum(p["type"] == "image" and "image" not in p for m in messages for p in m["content"])
    if holes != len(images) and (holes or any(p["type"] == "image" for m in messages for p in m["content"])):
        raise ValueError(f"{holes} {MARKER} markers for {len(images)} images; there must be one for each.")
    return _resolve(place_images(messages, images), folder)


def _message(turn: Any, number: int, form: Format) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is {type(turn).__name__}, not an object with keys.")
    given = turn.get("from", turn.get("role"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"turn {number}: the speaker {given!r} is not one of {', '.join(ROLES)}.")
    content = turn.get("value", turn.get("content"))
    if isinstance(content, str):
        parts = _text_parts(content, role, number) if form != "openai" else [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = [as_part(part, f"turn {number}, part {i}") for i, part in enumerate(content)]
    else:
        raise ValueError(f"turn {number}: its text is {type(content).__name__}, not a string or a list of parts.")
    rest = {k: v for k, v in turn.items() if k not in ("from", "role", "value", "content")}
    return {"role": role, "content": parts, **rest}  # type: ignore[typeddict-item]


def _text_parts(text: str, role: str, number: int) -> list[Part]:
    if MARKER not in text:
        return [{"type": "text", "text": text}]
    if role != "user":
        raise ValueError(f"turn {number}: {MARKER} in a turn of the {role}; images belong to the user's turns.")
    return split_marker(text, MARKER)


def _resolve(messages: list[Message], folder: Path) -> list[Message]:
    """Image paths relative to the folder; everything else as it is."""
    for message in messages:
        for part in message["content"]:
            image = part.get("image")
            if isinstance(image, dict) and image.get("bytes") is None:
                image = part["image"] = image.get("path") or image.get("url")
            if isinstance(image, str) and not image.startswith(_ADDRESSES) and not os.path.isabs(image):
                part["image"] = f"{folder}/{image}"
    return messages


_ADDRESSES = ("data:", "http://", "https://")
