"""Answers that are given, as the tokens that stand behind a prompt: tokenized as in training, with what the chat
template writes before and behind them and, for processors that pad answers, end tokens up to one of their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmllm.data.chat import as_messages
from dmllm.types import Message

STAND = "answer"


def completed(processor: Any, messages: str | Sequence[Any], answers: Sequence[str]) -> list[list[int]]:
    """The ids of each answer to a question or a conversation, with its end; padded ones are of one length.

    Raises:
        ValueError: an answer is no text, is empty, or spells a special token.
    """
    found = []
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer:
            raise ValueError(f"answers: number {number} is {answer!r}; each is a text that is not empty.")
        found.append(processor.tokens.encode(_turn(processor, messages, answer))[0].tolist())
    size = padded_length(processor, max(map(len, found), default=0))
    return [ids + [processor.special.eos] * (size - len(ids)) if size else ids for ids in found]


def around(processor: Any, messages: str | Sequence[Any]) -> tuple[str, str]:
    """What the chat template writes before the text of an answer, behind its generation prompt, and behind the text."""
    before, _, after = _turn(processor, messages, STAND).rpartition(STAND)
    return before, after


def padded_length(processor: Any, longest: int) -> int:
    """To how many tokens training pads an answer of this length; 0 for not at all."""
    return next((n for n in processor.config.answer_lengths if n >= longest), 0)


def _turn(processor: Any, messages: str | Sequence[Any], answer: str) -> str:
    """What the chat template adds to a conversation when `answer` is given."""
    turn: Message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    processor.tokens.images_in([turn])
    # pictures are in their places already, or play no part here
    conversation = as_messages(messages) if isinstance(messages, str) else list(messages)
    return processor.chat.pieces([*as_messages(conversation), turn], only_last=True)[-1].text
