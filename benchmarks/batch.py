"""Requests of mixed lengths together, and one by one; on a small model and on a larger one.

    python -m benchmarks.batch

A small model spends its calls on what surrounds the products, which a batch shares; a larger one spends them on the
products, and where one request already multiplies about as fast as the machine can, a batch gains no more than what is
left. Both are shown: answers in a batch against the same one by one, and how fast either multiplies.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine
from benchmarks import shape as shapes
from benchmarks.output import conclude
from benchmarks.shape import Shape
from dmllm.evaluation.products import count
from dmllm.evaluation.rounds import Spread, ratio, sheet, short
from dmllm.pipeline import Pipeline, load

SMALL = Shape(width=192, layers=6, heads=6, inner=512, vocabulary=512, prompt=96, tokens=32, block=8, per_call=2)
SHAPES = {"small": SMALL, "large": Shape(prompt=256, tokens=64)}
KEPT: dict[str, dict[str, Any]] = {
    "no cache": {},
    "dual cache": {"cache": "dual"},
    "block-causal": {"visibility": "block"},
}


def requests(shape: Shape, size: int) -> list[Tensor]:
    """Prompts of lengths from a quarter of the shape's to all of it."""
    lengths = torch.linspace(shape.prompt / 4, shape.prompt, size).long().tolist() if size > 1 else [shape.prompt]
    return [shape.ids(1, n, seed=i) for i, n in enumerate(lengths)]


@torch.no_grad()
def answer(pipeline: Pipeline, shape: Shape, kept: dict[str, Any], asked: list[Tensor], together: bool) -> list[Tensor]:
    """The new tokens of each request, asked all together (padded on the left) or one by one."""
    kept = {name: f"block:{shape.block}" if value == "block" else value for name, value in kept.items()}
    width = max(ids.shape[1] for ids in asked)
    found = []
    for part in [asked] if together else [[ids] for ids in asked]:
        widest = width if together else part[0].shape[1]
        ids = torch.cat([F.pad(ids, (widest - ids.shape[1], 0)) for ids in part])
        seen = torch.cat([F.pad(torch.ones_like(ids), (widest - ids.shape[1], 0)) for ids in part])
        reply = pipeline.generate(
            ids,
            seen,
            max_new_tokens=shape.tokens,
            block_length=shape.block,
            steps=shape.steps,
            eos_token_id=[],
            temperature=0.0,
            **kept,
        )
        found += list(reply.sequences[:, widest:])
    return found


def measure(shape: Shape, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Rows for each way and size."""
    with tempfile.TemporaryDirectory() as name:
        pipeline = load(str(shapes.write(shape, Path(name) / "model")), device="cpu", prompt_room=0)
    rows = []
    for kept, options in KEPT.items():
        for size in sizes:
            asked = requests(shape, size)
            works = [partial(answer, pipeline, shape, options, asked, together) for together in (True, False)]
            (flops, _), (flops_alone, _) = (count(work) for work in works)
            seconds: list[list[float]] = [[], []]
            for _ in range(rounds):
                for work, own in zip(works, seconds):
                    start = machine.now()
                    replies = work()
                    own.append(machine.now() - start)
            same = sum(map(torch.equal, works[0](), replies))
            rows.append(
                {
                    "kept": kept,
                    "size": size,
                    "same": same,
                    "tokens_per_second": vars(Spread.of([size * shape.tokens / s for s in seconds[0]])),
                    "alone": vars(Spread.of([size * shape.tokens / s for s in seconds[1]])),
                    "times": vars(ratio(seconds[1], seconds[0])),
                    "gflops": flops / min(seconds[0]) / 1e9,
                    "gflops_alone": flops_alone / min(seconds[1]) / 1e9,
                }
            )
    return rows


def lines(found: dict[str, Any]) -> list[str]:
    """Tables."""
    said = [machine.in_words(found["about"]), f"a square product: {short(found['gflops_of_a_cube'])} GFLOP/s", ""]
    for name, own in found["shapes"].items():
        head = [name, "batch", "alike", "tokens/s", "one by one", "times", "GFLOP/s", "one by one"]
        table = [
            [
                row["kept"],
                str(row["size"]),
                f"{row['same']} of {row['size']}",
                str(Spread(**row["tokens_per_second"])),
                str(Spread(**row["alone"])),
                str(Spread(**row["times"])),
                short(row["gflops"]),
                short(row["gflops_alone"]),
            ]
            for row in own["rows"]
        ]
        said += [*shapes.about(Shape(**own["shape"])), *sheet(head, table), ""]
    return [*said, *machine.warn(found["load_averages"])]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.batch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="runs/bench/batch.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    about, loads = machine.about(), [machine.load_average()]
    found: dict[str, Any] = {"about": about, "gflops_of_a_cube": machine.cube_rate(torch.float32) / 1e9, "shapes": {}}
    for name in arguments.shapes:
        rows = measure(SHAPES[name], arguments.sizes, arguments.rounds)
        found["shapes"][name] = {"shape": asdict(SHAPES[name]), "rows": rows}
        loads.append(machine.load_average())
    found |= {"load_averages": loads, "rounds": arguments.rounds}
    conclude(found, lines(found), arguments.out, "benchmarks.batch", argv)


if __name__ == "__main__":
    main()
