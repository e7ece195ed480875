"""What is answered: texts, and rows of ids."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
