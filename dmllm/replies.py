"""What is answered: texts, and rows of ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmllm.samplers.canvas import Stops, reply_length
from dmllm.types import Step


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    ids: list[int]  # up to the end of sequence, which is not among them
    num_forwards: int  # model calls until this answer was finished
    finish_reason: str  # "stop": an end of sequence was found; "length": the canvas is full


@dataclass(frozen=True)
class Generated:
    """What `generate` returns for P columns of input_ids and N = max_new_tokens."""

    sequences: Tensor  # [B, P + N]: input_ids as given, then the answer; pad tokens after its end of sequence
    num_forwards: Tensor  # [B] model calls until each row was finished
    trajectory: list[Step]  # the canvas after every model call


def answered(step: Step, stops: Stops) -> Tensor:
    """Which tokens of a step are the answers', their end of sequence included, [B, N] bool."""
    length, stopped = reply_length(step.ids, step.committed, stops)
    return torch.arange(step.ids.shape[1], device=step.ids.device) < (length + stopped)[:, None]


def replies_of(step: Step, stops: Stops, decode: Callable[[list[int]], str]) -> list[Reply]:
    """The answers that a step shows so far."""
    length, stopped = reply_length(step.ids, step.committed, stops)
    rows = zip(step.ids.tolist(), length.tolist(), stopped.tolist(), step.num_forwards.tolist(), strict=True)
    return [
        Reply(decode(ids[:n]), ids[:n], forwards, "stop" if ended else "length") for ids, n, ended, forwards in rows
    ]
