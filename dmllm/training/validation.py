"""What is measured while training: the held-out loss with fixed draws, and answers to a few held-out questions."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from dmllm.checkpoints.folder import decode_defaults
from dmllm.objectives.draws import Draws
from dmllm.pipeline import Pipeline
from dmllm.training.assemble import Run, open_loader
from dmllm.training.distributed import gather_root, reshard, sum_over_processes, to_device, with_blank_image
from dmllm.types import IGNORE, PADDING, Batch, Message


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """Within, the model is what would be saved: the average if there is one, without dropout and gradients."""
    run.core.eval()
    try:
        with torch.no_grad(), run.learned.ema.applied() if run.learned.ema else nullcontext():
            yield
    finally:
        run.core.train()
        reshard(run.core)


def validation_loss(run: Run) -> float:
    """The objective on the first examples of the validation data, always with the same draws."""
    config, accelerator = run.config.validation, run.accelerator
    assert config is not None
    assert run.validation is not None
    number = min(config.num_examples, len(run.validation))
    loader = open_loader(run, config.data, run.validation, start=0, seed=0)
    rounds = math.ceil(number / (run.micro_batch_size * accelerator.num_processes))
    sums: dict[str, Tensor] = {}
    with evaluating(run):
        for batch in itertools.islice(loader, rounds):
            draws = Draws(seed=0, step=0, num_examples=number, indices=batch.indices)
            noised = run.objective.prepare(for_processes(run, first_rows(batch, number)), draws)
            losses = run.objective.loss(run.model, to_device(noised, accelerator.device))
            for name, loss in losses.items():
                pair = torch.stack([loss.total.float(), noised.counts[name].to(loss.total)])
                sums[name] = sums[name] + pair if name in sums else pair
    loader.close()
    totals, counts = sum_over_processes(accelerator, torch.stack([*sums.values()])).unbind(1)
    weights = torch.tensor([coefficient(run, name) for name in sums], device=totals.device)
    return float((weights * totals / counts.clamp(min=1e-12)).sum())


def first_rows(batch: Batch, number: int) -> Batch:
    """The batch with rows of global index >= number made padding, which nothing counts."""
    outside = (batch.indices >= number)[:, None]
    return replace(
        batch,
        labels=batch.labels.masked_fill(outside, IGNORE),
        documents=batch.documents.masked_fill(outside, PADDING),
    )


def for_processes(run: Run, batch: Batch) -> Batch:
    """With several processes every one of them runs the vision encoder, on a blank tile if need be."""
    if run.accelerator.num_processes == 1 or run.core.vision is None:
        return batch
    return with_blank_image(batch, run.core.vision.image_size)


def coefficient(run: Run, name: str) -> float:
    """The weight of one of the objective's losses in the whole."""
    return getattr(run.objective, "coefficients", {}).get(name, 1.0)


def sample_answers(run: Run, step: int) -> None:
    """Ask the first validation questions and append question, answer and truth to samples.jsonl."""
    assert run.validation is not None
    lines = []
    with evaluating(run):
        gather_root(run.core)
        pipeline = Pipeline(run.core, run.processor, decode_defaults(run.core))
        for _, number, record in itertools.islice(run.validation.order(), run.config.samples.num_examples):
            asked, truth = question(run.validation.record(number, record).messages)
            reply = pipeline.chat(asked, **run.config.samples.decode)
            lines.append({"step": step, "question": text(asked[-1]), "answer": reply.text, "truth": truth})
    if run.accelerator.is_main_process:
        with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def question(messages: list[Message]) -> tuple[list[Message], str]:
    """A conversation up to its first answer, and that answer."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:first], text(messages[first])


def text(message: Message) -> str:
    """The words of a message."""
    return "".join(part.get("text", "") for part in message["content"]).strip()
