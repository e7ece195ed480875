"""Conversations: one internal form (messages of content parts), and the chat template that turns them into text.

A conversation is rendered turn by turn: what comes before an answer is the template's output with its generation
prompt, the answer is what the template adds when the answer is given. Each piece is tokenized on its own, in training
and in inference, so that the ids of a training example are exactly the prompt's ids followed by the answer's.

Templates are jinja with transformers' conventions (`messages`, `add_generation_prompt`, the special tokens' names). One
that reads only string contents, as text models have, gets each image as the image token's text in its place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from dmllm.data.skeleton import TouchedError, filled, only_known_filters, searched_for, segments, stand
from dmllm.types import Message, Part

SPECIAL_TOKENS = {
    "pad": "<|pad|>",
    "eos": "<|end|>",
    "mask": "<|mask|>",
    "image": "<|image|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "system": "<|system|>",
}

# The template of models from scratch: <|user|><|image|>question<|end|><|assistant|>answer<|end|>
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- else -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

ROLES = ("system", "user", "assistant")
CACHED_SHAPES = 4096  # conversations of different roles and parts whose skeletons are kept
Skeleton = list[tuple[list[str | tuple[int, bool]], bool]]
_IMAGE: Part = {"type": "image"}


class _ForgetsError(ValueError):
    """The template renders the beginning of a conversation differently later on."""


class Piece(NamedTuple):
    """A stretch of a rendered conversation that is tokenized on its own."""

    text: str
    is_answer: bool


class Chat:
    """A chat template bound to the texts of a tokenizer's special tokens.

    Args:
        template: jinja, as in `chat_template.jinja`.
        image_token: the text that the template emits for an image; None for a text-only model.
        special_texts: the texts of all special tokens, by which the end of a turn is recognised.
        variables: what the template may refer to, such as {"bos_token": "<s>"}.

    Raises:
        ValueError: the template cannot be rendered, drops text or images, or does not follow add_generation_prompt.
    """

    def __init__(
        self, template: str, *, image_token: str | None, special_texts: Sequence[str], variables: dict[str, str]
    ):
        self.template, self.image_token = template, image_token
        self.special_texts, self.variables = tuple(special_texts), variables
        self._skeletons: dict[tuple[Any, ...], Skeleton | None] = {}
        self.reads_parts = self._reads_parts()
        self._check()
        self._searched, self._can_skip = searched_for(template), only_known_filters(template)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation. Raises ValueError with the template's own complaint."""
        return self._render(self._plain(messages), add_generation_prompt)

    def pieces(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, only_last: bool = False
    ) -> list[Piece]:
        """The conversation cut around every answer; the generation prompt follows a question, if wanted.

        An answer holds its end-of-turn token; white space that the template puts after that belongs to the next turn.
        A template may render earlier answers differently, e.g. without their reasoning; then only the last answer can
        be told apart, and everything before it is one piece.

        Args:
            only_last: only the last answer matters: allow such a template.

        Raises:
            ValueError: the template refuses the conversation, or renders earlier answers differently.
        """
        plain = self._plain(messages)
        texts, shape = [], [add_generation_prompt, only_last]
        for message in plain:
            content = message["content"]
            kinds = [part["type"] for part in content] if self.reads_parts else None
            texts += [part["text"] for part in content if part["type"] == "text"] if self.reads_parts else [content]
            shape += [message["role"], None if kinds is None else tuple(kinds)]
        key = tuple(shape)
        if self._can_skip and key not in self._skeletons:
            if len(self._skeletons) >= CACHED_SHAPES:
                self._skeletons.clear()
            self._skeletons[key] = self._skeleton(plain, add_generation_prompt, only_last)
        skeleton = self._skeletons.get(key)
        if skeleton is None or any(word in text for word in self._searched for text in texts):
            return self._cut(plain, add_generation_prompt, only_last)
        return [Piece(filled(segments, texts), is_answer) for segments, is_answer in skeleton]

    def _skeleton(self, plain: list[dict[str, Any]], add_generation_prompt: bool, only_last: bool) -> Skeleton | None:
        """The pieces of every conversation of this shape, or None if the template does more than print the texts."""
        numbers = itertools.count()
        stands = [
            {
                "role": m["role"],
                "content": [p if p["type"] == "image" else {**p, "text": stand(next(numbers))} for p in m["content"]]
                if self.reads_parts
                else stand(next(numbers)),
            }
            for m in plain
        ]
        try:
            pieces = [(segments(p.text), p.is_answer) for p in self._cut(stands, add_generation_prompt, only_last)]
        except TouchedError:
            return None
        printed = {s[0] for found, _ in pieces for s in found or () if not isinstance(s, str)}
        if any(found is None for found, _ in pieces) or len(printed) != next(numbers):
            return None
        return [(found or [], is_answer) for found, is_answer in pieces]

    def _cut(self, plain: list[dict[str, Any]], add_generation_prompt: bool, only_last: bool) -> list[Piece]:
        try:
            return self._cut_everywhere(plain, add_generation_prompt)
        except _ForgetsError:
            if not only_last:
                raise
        if plain[-1]["role"] != "assistant":
            return [Piece(self._render(plain, add_generation_prompt), False)]
        prompt = self._render(plain[:-1], True)
        return [Piece(prompt, False), Piece(self._answer(plain, prompt), True)]

    def _answer(self, plain: list[dict[str, Any]], prompt: str) -> str:
        """What the conversation's last answer adds to its prompt, up to the end-of-turn token."""
        answer = self._rest(self._render(plain, False), prompt, len(plain) - 1)
        ends = answer[-1:].isspace() and answer.rstrip().endswith(self.special_texts)
        return answer.rstrip() if ends else answer

    def _cut_everywhere(self, plain: list[dict[str, Any]], add_generation_prompt: bool) -> list[Piece]:
        pieces: list[Piece] = []
        done = ""
        for k, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            prompt = self._render(plain[:k], True)
            pieces.append(Piece(self._rest(prompt, done, k), False))
            answer = self._answer(plain[: k + 1], prompt)
            pieces.append(Piece(answer, True))
            done = prompt + answer
        if not plain or plain[-1]["role"] != "assistant":
            pieces.append(Piece(self._rest(self._render(plain, add_generation_prompt), done, len(plain)), False))
        return pieces

    def _render(self, plain: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return _compile_jinja_template(self.template).render(
                messages=plain, add_generation_prompt=add_generation_prompt, **self.variables
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = " ".join(m["role"] for m in plain)
            raise ValueError(f"The chat template refuses a conversation of the turns '{roles}': {error}") from None

    def _plain(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """What the template sees: roles and contents, without the images themselves."""
        return [{"role": m["role"], "content": self._content(m)} for m in messages]

    def _rest(self, text: str, start: str, turn: int) -> str:
        if not text.startswith(start):
            raise _ForgetsError(
                f"The chat template renders the beginning of a conversation differently once message {turn} is there, "
                "so its turns cannot be learned together; use turns: one or turns: each, or another template."
            )
        return text[len(start) :]

    def _content(self, message: Message) -> Any:
        if self.reads_parts:
            return [_IMAGE if p["type"] == "image" else p for p in message["content"]]
        return "".join(
            (self.image_token or "") if p["type"] == "image" else p.get("text", "") for p in message["content"]
        )

    def _reads_parts(self) -> bool:
        self.reads_parts = True
        parts: list[Part] = [{"type": "image"}] if self.image_token else []
        try:
            text = self.render([{"role": "user", "content": [*parts, {"type": "text", "text": "probe"}]}], True)
        except ValueError:
            return False
        images = text.count(self.image_token) if self.image_token else 0
        return text.count("probe") == 1 and images == len(parts) and "'type'" not in text

    def _check(self) -> None:
        user: Message = {"role": "user", "content": [{"type": "text", "text": "first probe"}]}
        answer: Message = {"role": "assistant", "content": [{"type": "text", "text": "second probe"}]}
        prompt, full = self.render([user], True), self.render([user, answer], False)
        if "first probe" not in prompt or "second probe" not in full[len(prompt) :] or not full.startswith(prompt):
            raise ValueError(
                "The chat template does not render a question with its generation prompt, and then the same followed "
                f"by the answer: {prompt!r} and {full!r}. Give another one as chat_template."
            )
        end = full.rpartition("second probe")[2]
        if self.render([user], False) == prompt and sum(end.count(t) for t in self.special_texts) > 1:
            raise ValueError(
                f"The chat template ends every conversation with {end!r}, asked for a generation prompt or not, so the "
                "end of an answer cannot be told; write its last part as {% if add_generation_prompt %}...{% endif %} "
                "and give the result as chat_template."
            )


def as_messages(conversation: str | Sequence[Any], images: Sequence[Any] | None = None) -> list[Message]:
    """A conversation in the one internal form, from a question, chat messages, or OpenAI's content parts.

    `images` fill the image parts that hold none, in order; without any image part they go before the first question.

    Raises:
        ValueError: an unknown role or kind of part, or a different number of images and places for them.
    """
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    messages: list[Message] = []
    for number, raw in enumerate(conversation):
        role = raw.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number}: role={role!r} is not one of {', '.join(ROLES)}.")
        content = raw.get("content")
        parts: list[Part] = (
            [{"type": "text", "text": content}]
            if isinstance(content, str)
            else [as_part(part, f"message {number}, part {i}") for i, part in enumerate(content or [])]
        )
        rest = {key: value for key, value in raw.items() if key not in ("role", "content")}
        messages.append({"role": role, "content": parts, **rest})  # type: ignore[typeddict-item]
    return place_images(messages, list(images or []))


def as_part(part: Any, where: str) -> Part:
    """One content part from the forms in use: text, image (path, url, base64, object), image_url."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type")
    if kind == "text" or (kind is None and "text" in part):
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: a text part holds {part.get('text')!r} instead of a string.")
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": url.get("url") if isinstance(url, dict) else url}
    if kind == "image":
        if part.get("base64") is not None:
            return {"type": "image", "image": f"data:image/*;base64,{part['base64']}"}
        given = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
        return {"type": "image", "image": given[0]} if given else {"type": "image"}
    raise ValueError(f"{where}: type={kind!r} is not one of text, image, image_url.")


def place_images(messages: list[Message], images: list[Any]) -> list[Message]:
    """The messages with `images` put into the image parts that hold none, or before the first question."""
    empty = sum(p["type"] == "image" and "image" not in p for m in messages for p in m["content"])
    filled = any(p["type"] == "image" and "image" in p for m in messages for p in m["content"])
    if images and not empty and not filled:
        for number, message in enumerate(messages):
            if message["role"] == "user":
                front: list[Part] = [{"type": "image", "image": image} for image in images]
                changed: Message = {**message, "content": [*front, *message["content"]]}
                return [*messages[:number], changed, *messages[number + 1 :]]
        raise ValueError(f"{len(images)} images, but no user message to put them into.")
    if empty != len(images):
        raise ValueError(f"{len(images)} images for {empty} places: {_counts(messages)}; give one for each.")
    if not images:
        return messages
    supply = iter(images)
    return [
        {
            **m,
            "content": [
                {"type": "image", "image": next(supply)} if p["type"] == "image" and "image" not in p else p
                for p in m["content"]
            ],
        }
        for m in messages
    ]


def split_marker(text: str, marker: str = "<image>") -> list[Part]:
    """Text with `<image>` markers as content parts; one line break after a marker belongs to it."""
    first, *others = text.split(marker)
    parts: list[Part] = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts.append({"type": "image"})
        if other := other.removeprefix("\r").removeprefix("\n"):
            parts.append({"type": "text", "text": other})
    return parts


def _counts(messages: list[Message]) -> str:
    counts = [sum(p["type"] == "image" for p in m["content"]) for m in messages]
    return ", ".join(f"message {i} has {n}" for i, n in enumerate(counts) if n) or "no message has an image part"
