"""How probable given answers are: one question, several answers, the prompt and its pictures computed once.

What is scored is what training learns behind a question: the answer with the end of turn that the chat template puts
there and, for processors that pad answers, end tokens up to a length that all the answers share.

    full, prefix     a lower bound on log p(answer) by Monte Carlo (`samplers.likelihood`)
    block:N          the sum of such bounds, each of a block given all before it
    permutation      the same bound by the chain rule in random orders, each view one of them
    causal, block:1  log p(answer) itself

All answers to one question are hidden by the same random numbers, so that what one is behind another is known better
than either. Sources: LLaDA, arXiv:2502.09992, equation 6; BD3-LM, arXiv:2503.09573, equation 5.
Shapes: S views, n tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dmllm.computed import Kept
from dmllm.data.answers import completed
from dmllm.data.chat import as_messages
from dmllm.nn.visibility import ORDERED, check_layout
from dmllm.prompted import keeps_cache, stream_of
from dmllm.registry import nearest
from dmllm.samplers import check_masks
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.likelihood import Noise, bound
from dmllm.samplers.ordered import order_values
from dmllm.samplers.process import Predict
from dmllm.samplers.stream import Stream, guided
from dmllm.types import Batch, Example

BY = ["log_prob", "per_token"]


@dataclass(frozen=True)
class Scored:
    """An answer and how probable it is, in nats."""

    text: str
    index: int  # which of the given answers it is
    ids: list[int]  # what was scored, with its end
    log_prob: float  # a lower bound on log p(answer | question, pictures), or that itself
    standard_error: float  # of the bound, by its random views; 0 where there is nothing random
    behind: float  # what the first answer is ahead of this one, by what they are ranked by
    behind_error: float  # the standard error of that, views in common

    @property
    def per_token(self) -> float:
        """The mean over what was scored, in nats a token."""
        return self.log_prob / len(self.ids)


class Question:
    """A prompt of one row, ready for answers of up to `longest` tokens.

    Args:
        cfg_scale: guidance, as in decoding; 0 is none.
        use_cache: None keeps the prompt's keys and values where that changes nothing; False never.
        visibility: a name of `LAYOUTS` or block:N; None is the model's own.
        kept: what earlier requests have computed.
    """

    def __init__(
        self,
        model: Any,
        prompt: Batch,
        longest: int,
        mask_id: int,
        *,
        cfg_scale: float = 0.0,
        use_cache: bool | None = None,
        visibility: str | None = None,
        kept: Kept | None = None,
    ):
        assert len(prompt) == 1, "one question at a time"
        kind = visibility or model.config.visibility
        self.model, self.mask_id, self.cfg_scale = model, mask_id, cfg_scale
        self.block_length = 1 if kind == "causal" else check_layout(kind)
        kind = kind if self.block_length is None else f"block:{self.block_length}"
        cached, self.ordered = keeps_cache(model, prompt, kind, use_cache), kind == ORDERED
        given = {"cached": cached, "blank": mask_id if cfg_scale else None, "kept": kept}
        self.stream = stream_of(model, prompt, longest, kind, streams=2 if self.ordered else 1, **given)
        self.given = prompt.input_ids.shape[1]
        if cached:
            self.stream.store(self.block_length or 1)

    @property
    def exact(self) -> bool:
        """Whether there is nothing random: each token is scored given those before it."""
        return self.block_length == 1

    def blocks(self, length: int) -> list[slice]:
        """The parts of an answer that are scored one by one; blocks are counted from the prompt's first token."""
        if self.block_length is None:
            return [slice(0, length)]
        edges = range(-(self.given % self.block_length), length, self.block_length)
        return [slice(max(edge, 0), min(edge + self.block_length, length)) for edge in edges]

    def values(self, answer: Tensor, places: Tensor, noise: Noise, batch_size: int) -> Tensor:
        """What each view says of log p of each block of an answer [n], [S, blocks of the noise] float64.

        Args:
            places: [n], the columns of the noise that hide the tokens.
            batch_size: views in one model call.
        """
        if self.ordered:
            ranks = noise.order[:, places.cpu()].argsort(1).argsort(1).to(answer.device)
            return order_values(self.stream, answer, ranks, self.mask_id, batch_size, self.cfg_scale)[:, None]
        stream, found = self.stream.fork(1), []
        if self.exact and self.model.config.shift:
            total = self._in_one_call(stream, answer)
            return F.pad(total.expand(len(noise.level), 1), (0, noise.level.shape[1] - 1))
        for number, part in enumerate(self.blocks(len(answer))):
            predict = self._predict(stream, answer, part)
            found.append(bound(predict, answer[part], noise, places[part], number, self.mask_id, batch_size))
            if stream.cache is not None and part.stop < len(answer):
                self._feed(stream, answer[None], part, answer.new_zeros(1, 0), torch.zeros(1, device=answer.device))
        return F.pad(torch.stack(found, 1), (0, noise.level.shape[1] - len(found)))

    def _in_one_call(self, stream: Stream, answer: Tensor) -> Tensor:
        """log p(answer), where a row predicts the next token and sees none behind itself: a float64 scalar."""
        whole, rows = slice(0, len(answer)), torch.arange(len(answer), device=answer.device)[None]
        logits = self._feed(stream, answer[None], whole, rows, torch.zeros(1, device=answer.device)).float()
        found = logits.gather(-1, answer[None, :, None]).squeeze(-1) - logits.logsumexp(-1)
        return found.double().sum()

    def _predict(self, stream: Stream, answer: Tensor, part: slice) -> Predict:
        """The model on views of a part of the answer, the answer's tokens before it known."""

        def predict(canvas: Canvas, rows: Tensor) -> Tensor:
            ids = answer.repeat(len(canvas), 1)
            ids[:, part] = canvas.ids
            return self._feed(stream.fork(len(canvas)), ids, part, rows + part.start, canvas.time)

        return predict

    @torch.no_grad()
    def _feed(self, stream: Stream, ids: Tensor, part: slice, rows: Tensor, time: Tensor) -> Tensor:
        """Logits [S, K, V] at the `rows` [S, K] of answers [S, n], of which nothing is fed behind `part`."""
        copies, lengths = stream.copies, stream.lengths
        start = torch.zeros_like(lengths)
        if stream.cache is not None and self.block_length is None:
            start = lengths
        elif stream.cache is not None:
            start = (lengths + part.start) // self.block_length * self.block_length
        ids = F.pad(ids, (0, stream.length - ids.shape[1])).repeat(copies, 1)
        window = stream.run(start, lengths + part.stop, int((lengths + part.stop - start).max()))
        asked = rows.repeat(copies, 1) + lengths[:, None]
        return guided(stream.feed(ids, *window, asked, time.repeat(copies)), self.cfg_scale)


def rank(
    pipeline: Any,
    requests: list[tuple[Any, list[Any]]],
    examples: list[Example],
    answers: list[Sequence[str]],
    by: str,
    draws: list[Generator],
    *,
    collate: Callable[[list[Example]], Batch],
    num_samples: int,
    **options: Any,
) -> list[list[Scored]]:
    """The answers to each question, the most probable first; `Pipeline.rank` says how. `examples` are the prompts."""
    if by not in BY:
        raise ValueError(f"by={by!r} is not known; {nearest(by, BY)}")
    if type(num_samples) is not int or num_samples < 2:
        raise ValueError(f"num_samples={num_samples!r} must be a whole number, at least 2; 128 is usual.")
    if hasattr(pipeline.model, "denoise"):
        raise ValueError("rank is not for a model that denoises in its own way: it says no probabilities of answers.")
    check_masks(pipeline.model, "rank()")
    if len(answers) != len(requests) or any(isinstance(given, str) for given in answers):
        raise ValueError(f"answers: {len(answers)} for {len(requests)} questions; give a list of texts for each.")
    found = []
    for request, example, given, generator in zip(requests, examples, answers, draws, strict=True):
        ids = completed(pipeline.processor, as_messages(*request), given)
        said, noise = (
            _values(pipeline, collate([example]), ids, num_samples, generator, **options) if ids else ([], None)
        )
        found.append(_sorted(list(given), ids, said, noise, by) if noise else [])
    return found


def _values(
    pipeline: Any,
    prompt: Batch,
    ids: list[list[int]],
    num_samples: int,
    generator: Generator,
    *,
    batch_size: int,
    **options: Any,
) -> tuple[list[Tensor], Noise]:
    """What the views say of each answer's blocks, [S, blocks] each, and the noise that they have in common."""
    longest, device = max(map(len, ids)), pipeline.model.device
    question = Question(pipeline.model, prompt, longest, pipeline.special.mask, kept=pipeline.kept, **options)
    noise = Noise.draw(num_samples, longest, generator, len(question.blocks(longest)))
    answers = [(torch.tensor(own, device=device), torch.arange(len(own))) for own in ids]
    return [question.values(*answer, noise, batch_size).cpu() for answer in answers], noise


def _sorted(answers: list[str], ids: list[list[int]], said: list[Tensor], noise: Noise, by: str) -> list[Scored]:
    shares = [values / len(own) if by == "per_token" else values for values, own in zip(said, ids, strict=True)]
    order = sorted(range(len(ids)), key=lambda i: -float(shares[i].sum(1).mean()))
    first = shares[order[0]]
    return [
        Scored(
            text=answers[i],
            index=i,
            ids=ids[i],
            log_prob=float(said[i].sum(1).mean()),
            standard_error=noise.standard_error(said[i]),
            behind=float((first - shares[i]).sum(1).mean()),
            behind_error=noise.standard_error(first - shares[i]),
        )
        for i in order
    ]
