"""How many tokens an answer has in training: padded with end tokens, or cut, so that its length is learned.

A canvas has a length before its text is known. Two ways to learn what to do with one that does not fit:

    answer_lengths, longer        the few lengths that will be asked for; an answer gets the smallest that holds it, and
                                  with probability `longer` a larger one
    further_ends, cut_answers     any length: 1 to n further end tokens behind an answer of n, or only a beginning of it

Source: the second is the adaptive length of LLaDA-o, arXiv:2603.01068, which draws each with probability 0.1.
"""

from __future__ import annotations

from typing import Any

import torch

from dmllm.data.packing import Chunk, Document, repeated

SHORT = 16  # tokens; answers that have no more are never cut


def check_lengths(config: Any) -> None:
    """Raise ValueError unless the chances of another length are chances, and nothing else says how long answers are."""
    ends, cut = config.further_ends, config.cut_answers
    if ends < 0 or cut < 0 or ends + cut > 1:
        raise ValueError(f"further_ends={ends} and cut_answers={cut} are probabilities of which one happens; use 0.1.")
    if config.answer_lengths and (ends or cut):
        raise ValueError(
            f"further_ends={ends} and cut_answers={cut} with answer_lengths={list(config.answer_lengths)}, which say "
            "already how long answers are; use longer instead, or leave answer_lengths out."
        )
    if cut and config.eos_padding == "batch":
        raise ValueError(
            f"cut_answers={cut} with eos_padding='batch' would put an end behind half an answer; leave one of them out."
        )


def change_lengths(documents: list[Document], config: Any, eos: int, generator: torch.Generator) -> list[Document]:
    """The documents with their last answers padded or cut, as a `ProcessorConfig` says."""
    number, scored = len(documents), config.score_padding
    if config.further_ends or config.cut_answers:
        draws = torch.rand(number, 2, generator=generator, dtype=torch.float64).tolist()
        return [_adapt(document, config, eos, *two) for document, two in zip(documents, draws, strict=True)]
    if not config.answer_lengths:
        return documents
    draws = torch.rand(number, 2, generator=generator).tolist() if config.longer else [(1.0, 0.0)] * number
    larger = [how if which < config.longer else None for which, how in draws]
    return [pad_answer(d, config.answer_lengths, how, eos, scored) for d, how in zip(documents, larger, strict=True)]


def pad_answer(
    document: Document, lengths: tuple[int, ...], larger: float | None, eos: int, is_scored: bool
) -> Document:
    """The document with end tokens behind its last answer, up to the smallest of `lengths` that fits, or to one of the
    larger ones: `larger` in [0, 1) says which."""
    size = len(document[-1].ids)
    fitting = [n for n in lengths if n >= size]
    if not fitting:
        return document
    target = fitting[0]
    if larger is not None and len(fitting) > 1:
        target = fitting[1 + int(larger * (len(fitting) - 1))]
    if target == size:
        return document
    return [*document, Chunk(repeated(eos, target - size), is_padding=True, is_scored=is_scored)]


def _adapt(document: Document, config: Any, eos: int, which: float, how: float) -> Document:
    """One document by two numbers in [0, 1): what happens to its last answer, and how much."""
    *before, answer = document
    size = len(answer.ids)
    if which < config.further_ends:
        ends = repeated(eos, 1 + int(how * size))
        return [*document, Chunk(ends, is_padding=True, is_scored=config.score_padding)]
    if which < config.further_ends + config.cut_answers and size > SHORT:
        return [*before, answer._replace(ids=answer.ids[: 1 + int(how * (size - 1))])]
    return document
