"""A pipeline without a model: it knows the answers, is wrong where told, and counts what it is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from dmllm.samplers.config import DecodeConfig, decode_config
from dmllm.types import Step


@dataclass
class FakeReply:
    text: str
    ids: list[int]
    num_forwards: int
    finish_reason: str


class FakePipeline:
    """Answers by question text, else with a draw from the request's own generator, so that order and batches show."""

    def __init__(self, answers: dict[str, str] | None = None, *, stop_after: int | None = None, refuse: str = "\0"):
        self.answers, self.stop_after, self.refuse = answers or {}, stop_after, refuse
        torch.manual_seed(0)
        self.model = nn.Linear(2, 2)
        self.batches: list[tuple[list[str], dict[str, Any]]] = []
        self.asked: list[list[dict[str, Any]]] = []

    def decode_config(self, **decode: Any) -> DecodeConfig:
        return decode_config(decode, {"max_new_tokens": 8})

    def chat(self, messages: Sequence[Any], *, generator: Sequence[torch.Generator], **decode: Any) -> list[FakeReply]:
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        texts = [words(request) for request in messages]
        if any(self.refuse in text for text in texts):
            raise ValueError("the prompt is too long")
        self.batches.append((texts, decode))
        self.asked += [list(request) for request in messages]
        drawn = [int(torch.randint(1000, (), generator=g)) for g in generator]
        replies = [self.answers.get(text, f"guess {n}") for text, n in zip(texts, drawn, strict=True)]
        return [FakeReply(text, [1], len(text), "stop") for text in replies]

    def stream(self, messages: Any, *, generator: int, **decode: Any) -> Iterator[Step]:
        for known in (1, 3):
            committed = torch.arange(3)[None] < known
            finished = torch.tensor([known == 3])
            yield Step(
                ids=torch.arange(3)[None], committed=committed, num_forwards=torch.tensor([known]), finished=finished
            )

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return ["a", " red", " dot"]

    def text(self, step: Step) -> str:
        return "a red dot"


def words(request: Sequence[dict[str, Any]]) -> str:
    return "".join(part.get("text", "") for part in request[-1]["content"])


def write_llava(folder: Path, conversations: list[list[tuple[str, str, str]]]) -> Path:
    """LLaVA JSON with one small picture a record, from lists of (question, answer, kind)."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, turns in enumerate(conversations):
        Image.new("RGB", (8, 8), (number * 40 % 256, 80, 120)).save(folder / f"{number}.png")
        conversation = []
        for i, (question, answer, kind) in enumerate(turns):
            conversation += [
                {"from": "human", "value": question if i else f"<image>\n{question}", "kind": kind},
                {"from": "gpt", "value": answer},
            ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path
