"""What a step holds in memory over a large vocabulary: only the rows that were asked for.

    python -m benchmarks.memory --vocabulary 126464

Every operation's results are looked at: how many rows over the vocabulary the largest of them has, beside how many rows
were fed and how many asked for. The peak is what torch holds at once beyond weights and prompt.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, watch
from benchmarks import shape as shapes
from benchmarks.decode import ours
from benchmarks.output import conclude
from benchmarks.shape import Shape
from dmllm.evaluation.rounds import sheet, short
from dmllm.objectives import build_objective
from dmllm.objectives.draws import Draws
from dmllm.pipeline import Pipeline, load
from dmllm.types import IGNORE, TEXT, Batch

LARGE = Shape(width=128, layers=2, heads=2, inner=256, vocabulary=126464)
OPTIONS = {"min_noise": 0.5, "max_noise": 0.5}  # of the objective: about half of an answer is hidden


def look(what: str, work: Callable[[], Any], vocabulary: int, fed: int, asked: int) -> dict[str, Any]:
    """One row: `work` run twice, once to see its tensors and once its peak."""
    with watch.Largest(vocabulary) as largest:
        work()
    return {
        "what": what,
        "fed": fed,
        "asked": asked,
        "rows": largest.rows,
        "largest_shape": list(largest.shape),
        "largest_bytes": largest.bytes,
        "peak_bytes": watch.peak_bytes(work),
        "all_rows_bytes": fed * vocabulary * 4,
    }


def training_step(pipeline: Pipeline, shape: Shape, rows: int) -> tuple[Callable[[], Any], int]:
    """A step's forward and backward on `rows` requests with their answers, and how many tokens it hides."""
    model, special = pipeline.model, pipeline.special
    ids = shape.ids(rows, shape.prompt + shape.tokens)
    labels = torch.full_like(ids, IGNORE)
    labels[:, shape.prompt :] = ids[:, shape.prompt :]
    batch = Batch(
        input_ids=ids,
        labels=labels,
        image_slots=torch.full_like(ids, TEXT),
        documents=torch.zeros_like(ids),
        positions=torch.arange(ids.shape[1]).expand_as(ids),
        indices=torch.arange(rows),
    )
    objective = build_objective("masked", OPTIONS, special, "full")
    noised = objective.prepare(batch, Draws(seed=0, step=0, num_examples=rows, indices=batch.indices))

    def step() -> None:
        with torch.enable_grad():
            losses = objective.loss(model, noised)
            sum(loss.total for loss in losses.values()).backward()  # type: ignore[union-attr]
        model.zero_grad(set_to_none=True)

    return step, len(noised.rows)


def measure(shape: Shape, rows: int) -> dict[str, Any]:
    """A training step, and a request in every way."""
    with tempfile.TemporaryDirectory() as name:
        pipeline = load(str(shapes.write(shape, Path(name) / "model")), device="cpu", prompt_room=0)
    length = shape.prompt + shape.tokens
    step, hidden = training_step(pipeline, shape, rows)
    found = [look(f"training step, batch of {rows}", step, shape.vocabulary, rows * length, hidden)]
    for way in ours(pipeline, "fp32", replace(shape)):
        work = partial(way.answer, shape.ids())
        found.append(look(f"decoding, {way.name.removeprefix('ours, ')}", work, shape.vocabulary, length, shape.block))
    return {"about": machine.about(), "rows": found, "vocabulary": shape.vocabulary}


def lines(found: dict[str, Any]) -> list[str]:
    """A table."""
    head = ["", "rows fed", "asked for", "rows over the vocabulary", "largest MB", "peak MB", "MB, were it all rows"]
    table = [
        [
            row["what"],
            str(row["fed"]),
            str(row["asked"]),
            str(row["rows"]),
            short(row["largest_bytes"] / 1e6),
            short(row["peak_bytes"] / 1e6),
            short(row["all_rows_bytes"] / 1e6),
        ]
        for row in found["rows"]
    ]
    return [f"vocabulary {found['vocabulary']}, float32; {machine.in_words(found['about'])}", *sheet(head, table)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=LARGE.vocabulary)
    parser.add_argument("--rows", type=int, default=1, help="answers of the training step")
    parser.add_argument("--out", default="runs/bench/memory.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(replace(LARGE, vocabulary=arguments.vocabulary), arguments.rows)
    conclude(found, lines(found), arguments.out, "benchmarks.memory", argv)


if __name__ == "__main__":
    main()
