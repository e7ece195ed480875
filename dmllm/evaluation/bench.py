"""What this machine multiplies in a second, what share of that a training step reaches, and what an answer takes.

    python -m dmllm.evaluation.bench --model dmllm-tiny --threads 2 --seconds 3

Everything is measured in one process, in rounds. A step is the training loop's own: reading pictures, noising, forward,
backward, optimiser. Its work is the operations of forward and backward, so that reading data and the optimiser count as
time alone. On a GPU fp32 is TF32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmllm.checkpoints.compose import ModelSpec
from dmllm.data.builtin import make
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.evaluation.config import TaskConfig
from dmllm.evaluation.products import Products, count, multiply, operands, square
from dmllm.evaluation.rounds import Spread, in_turn, ratio, sheet, short
from dmllm.evaluation.tasks import Question, read_task
from dmllm.objectives.draws import Draws
from dmllm.pipeline import Pipeline, Reply, load
from dmllm.training.assemble import Run, assemble, open_loader
from dmllm.training.config import ObjectiveConfig, OptimiserConfig, TrainConfig
from dmllm.training.distributed import to_device
from dmllm.training.loop import Timed, training_step
from dmllm.types import IGNORE, Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# As in data_configs/dmllm_tiny.yaml, but at rates that leave the weights nearly as they are.
OBJECTIVE = ObjectiveConfig(
    options={"weight": "none", "reduction": "answer_length", "complementary": True, "padding_as_one": True}
)
OPTIMISER = OptimiserConfig(name="muon", lr=1e-6, muon_lr=1e-6, weight_decay=0.01)
CACHED, UNCACHED = "prompt cached", "no cache"
AS_SET, SINGLY = "as set", "a token a call"
CUBES_ON_GPU = 100  # products in a row, so that a GPU works for milliseconds


class Way(NamedTuple):
    """A way of asking."""

    size: int  # questions in a batch
    cache: str
    pace: str  # the checkpoint's decode settings, or one token committed in each model call

    def __str__(self) -> str:
        return f"batch {self.size}, {self.cache}, {self.pace}"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much is measured."""

    seconds: float = 3.0
    """Time for each measurement, about; `rounds` rounds are run in any case."""
    rounds: int = 7
    """Least number of rounds."""
    pictures: int = 64
    """Built-in scenes; every round trains on all of them once."""
    batch_size: int = 16
    """Pictures of a step; divides `pictures`."""
    questions: int = 16
    """Questions that every round asks, one by one and all together."""
    cube: int = 2048
    """Side of the square matrices whose product stands for what the machine can do."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the training steps of a round hold, and what they multiply in one precision."""

    steps: int
    examples: int
    pairs: int  # answers to learn
    flops: int  # of forward and backward
    linear: Products  # of the first step


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Training in one precision; GFLOP/s, and shares as fractions."""

    pictures: Spread  # a second
    pairs: Spread  # a second
    waiting: Spread  # share of the time that goes into reading data
    step: Spread
    cube: Spread
    linear: Spread  # the linear layers' products by themselves
    share_of_cube: Spread
    share_of_linear: Spread


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training steps, in fp32 and under bf16 autocast."""

    config: BenchConfig
    rounds: int
    work: Work
    rates: dict[str, Rates]
    bf16_speed: Spread  # steps in a second, as a multiple of fp32's

    def lines(self) -> list[str]:
        """A table."""
        work, side = self.work, f"{self.config.cube} x {self.config.cube} x {self.config.cube}"
        rates = self.rates.values()
        rows = [
            ["pictures/s", *(str(r.pictures) for r in rates)],
            ["question-answer pairs/s", *(str(r.pairs) for r in rates)],
            ["GFLOP/s of the step", *(str(r.step) for r in rates)],
            [f"GFLOP/s of {side}", *(str(r.cube) for r in rates)],
            ["GFLOP/s of its linear layers' products alone", *(str(r.linear) for r in rates)],
            [f"share of {side} that the step reaches", *(r.share_of_cube.percent() for r in rates)],
            ["share of its linear layers' products alone", *(r.share_of_linear.percent() for r in rates)],
            ["share of the time that goes into reading data", *(r.waiting.percent() for r in rates)],
        ]
        return [
            f"training: a round is {work.steps} steps, {work.examples} pictures, {work.pairs} pairs, "
            f"{short(work.flops / 1e9)} GFLOP; {self.rounds} rounds",
            *sheet(["", *self.rates], rows),
            f"  bf16 makes {self.bf16_speed} times the steps of fp32",
        ]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The same questions, asked in several ways."""

    rounds: int
    questions: int
    same: int  # questions whose answers agree, token by token, between all ways at the checkpoint's settings
    tokens: dict[Way, float]  # of an answer, its end not counted; mean
    forwards: dict[Way, float]  # model calls until an answer is finished; mean
    answers: dict[Way, Spread]  # a second
    ratios: dict[str, Spread]  # of answers a second

    def lines(self) -> list[str]:
        """A table."""
        rows = [
            [str(way), str(rate), *map(short, (rate.median * self.tokens[way], self.tokens[way], self.forwards[way]))]
            for way, rate in self.answers.items()
        ]
        return [
            f"decoding: a round is {self.questions} questions with their pictures; {self.same} of them are answered "
            f"alike in every way {AS_SET}; {self.rounds} rounds",
            *sheet(["", "answers/s", "tokens/s", "tokens/answer", "forwards/answer"], rows),
            *(f"  {what}: {found} times the answers" for what, found in self.ratios.items()),
        ]


def measure_training(model: str, data: Path, folder: Path, config: BenchConfig) -> Training:
    """Products and training steps in both precisions.

    Args:
        model: a checkpoint that takes images and has a tokenizer.
        data: LLaVA JSON of `config.pictures` records.
        folder: where the runs write.
    """
    runs = {precision: assemble(_recipe(model, data, folder, precision, config)) for precision in DTYPES}
    work = {precision: count_work(run) for precision, run in runs.items()}
    device = runs["fp32"].accelerator.device
    actions: dict[str, Callable[[], Any]] = {}
    flops: dict[str, int] = {}
    for precision, dtype in DTYPES.items():
        cube = {square(config.cube, dtype): 1 if device.type == "cpu" else CUBES_ON_GPU}
        for name, products in (("cube", cube), ("linear", work[precision].linear)):
            actions[f"{name} {precision}"] = partial(multiply, operands(products, device))
            flops[f"{name} {precision}"] = sum(product.flops * times for product, times in products.items())
        actions[f"step {precision}"] = partial(train_round, runs[precision])
        flops[f"step {precision}"] = work[precision].flops
    taken = in_turn(actions, rounds=config.rounds, seconds=config.seconds, device=device)
    rates = {}
    for precision in DTYPES:
        seconds = {name: [s for s, _ in taken[f"{name} {precision}"]] for name in ("step", "cube", "linear")}
        speeds = {name: [flops[f"{name} {precision}"] / s / 1e9 for s in column] for name, column in seconds.items()}
        rates[precision] = Rates(
            pictures=Spread.of([work[precision].examples / s for s in seconds["step"]]),
            pairs=Spread.of([work[precision].pairs / s for s in seconds["step"]]),
            waiting=Spread.of([waited / s for s, waited in taken[f"step {precision}"]]),
            **{name: Spread.of(column) for name, column in speeds.items()},
            share_of_cube=ratio(speeds["step"], speeds["cube"]),
            share_of_linear=ratio(speeds["step"], speeds["linear"]),
        )
    full, half = ([s for s, _ in taken[f"step {precision}"]] for precision in DTYPES)
    return Training(config=config, rounds=len(full), work=work["fp32"], rates=rates, bf16_speed=ratio(full, half))


def count_work(run: Run) -> Work:
    """Count what one round of training steps holds and multiplies."""
    config = run.config
    loader = open_loader(run, config.data, run.mixture, start=0, seed=config.seed)
    batches = [next(loader) for _ in range(run.steps)]
    loader.close()
    counted = [count_step(run, batch, step) for step, batch in enumerate(batches)]
    return Work(
        steps=run.steps,
        examples=sum(map(len, batches)),
        pairs=sum(count_answers(batch.labels) for batch in batches),
        flops=sum(flops for flops, _ in counted),
        linear=counted[0][1],
    )


def count_step(run: Run, batch: Batch, step: int) -> tuple[int, Products]:
    """Operations of a step's forward and backward, and its linear layers' products; no weight moves."""
    draws = Draws(seed=run.config.seed, step=step, num_examples=run.config.batch_size, indices=batch.indices)
    noised = to_device(run.objective.prepare(batch, draws), run.accelerator.device)

    def forward_and_backward() -> None:
        losses = run.objective.loss(run.model, noised)
        run.accelerator.backward(sum(loss.total for loss in losses.values()))

    found = count(forward_and_backward)
    for optimiser in run.learned.optimisers.values():
        optimiser.zero_grad(set_to_none=True)
    return found


def count_answers(labels: Tensor) -> int:
    """Runs of labelled tokens in [B, L]."""
    scored = (labels != IGNORE).int()
    return int(scored[:, 0].sum() + (scored.diff(dim=1) == 1).sum())


def train_round(run: Run) -> float:
    """One round of training steps. Returns the seconds spent on waiting for data."""
    loader = open_loader(run, run.config.data, run.mixture, start=0, seed=run.config.seed)
    batches = Timed(loader)
    for step in range(run.steps):
        training_step(run, batches, step)
    loader.close()
    return batches.seconds


def measure_decoding(pipeline: Pipeline, questions: Sequence[Question], config: BenchConfig) -> Decoding:
    """Answers one by one and all together; with the prompt's cache, where it is exact, and without; and what the
    checkpoint's settings (several tokens a call) save over one token a call."""
    caches = [UNCACHED] if pipeline.model.config.visibility == "full" else [CACHED, UNCACHED]
    whole = len(questions)
    ways = [Way(size, cache, AS_SET) for size in (1, whole) for cache in caches]
    ways += [Way(whole, cache, SINGLY) for cache in caches]
    actions = {str(way): partial(ask, pipeline, questions, way) for way in ways}
    taken = in_turn(actions, rounds=config.rounds, seconds=config.seconds, device=pipeline.device)
    replies: dict[Way, list[Reply]] = {way: taken[str(way)][-1][1] for way in ways}
    speeds = {way: [whole / s for s, _ in taken[str(way)]] for way in ways}
    best = caches[0]
    compared = {
        f"batch {whole} / batch 1, {best}": (Way(whole, best, AS_SET), Way(1, best, AS_SET)),
        f"{AS_SET} / {SINGLY}, batch {whole}, {best}": (Way(whole, best, AS_SET), Way(whole, best, SINGLY)),
    }
    if CACHED in caches:
        for size, _, pace in ways[1::2]:
            pair = (Way(size, CACHED, pace), Way(size, UNCACHED, pace))
            compared[f"{CACHED} / {UNCACHED}, batch {size}, {pace}"] = pair
    given = [[tuple(reply.ids) for reply in replies[way]] for way in ways if way.pace == AS_SET]
    return Decoding(
        rounds=len(speeds[ways[0]]),
        questions=whole,
        same=sum(len(set(answers)) == 1 for answers in zip(*given, strict=True)),
        tokens={way: statistics.mean(len(reply.ids) for reply in replies[way]) for way in ways},
        forwards={way: statistics.mean(reply.num_forwards for reply in replies[way]) for way in ways},
        answers={way: Spread.of(column) for way, column in speeds.items()},
        ratios={what: ratio(speeds[above], speeds[below]) for what, (above, below) in compared.items()},
    )


def ask(pipeline: Pipeline, questions: Sequence[Question], way: Way) -> list[Reply]:
    """The answers, `way.size` at a time."""
    single = {"steps": pipeline.decode_config().max_new_tokens, "threshold": None}
    asked = [list(question.messages) for question in questions]
    replies = []
    for start in range(0, len(asked), way.size):
        part = asked[start : start + way.size]
        decode = single if way.pace == SINGLY else {}
        replies += pipeline.chat(part, generator=0, use_cache=None if way.cache == CACHED else False, **decode)
    return replies


def main(argv: Sequence[str] | None = None, config: BenchConfig | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="dmllm.evaluation.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="dmllm-tiny", help="a folder, a packaged name or a hub name")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; without it, torch's own choice")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement, about")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = config or BenchConfig(seconds=arguments.seconds)
    pipeline = load(arguments.model, prompt_room=0)  # rounds ask the same again
    _say(_about(arguments.model, pipeline))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make("scenes", folder / "scenes", num=config.pictures, split="test") / "data.json"
        _say(measure_training(arguments.model, data, folder, config).lines())
        task = read_task(TaskConfig(name="scenes", data=str(data)), decode={}, folder=folder, on_error="raise")
        questions = [item for item in task.items if isinstance(item, Question)]
        every = max(len(questions) // config.questions, 1)
        _say(measure_decoding(pipeline, questions[::every][: config.questions], config).lines())


def _about(model: str, pipeline: Pipeline) -> list[str]:
    device = pipeline.device
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU ({torch.get_num_threads()} threads)"
    )
    parameters = sum(p.numel() for p in pipeline.model.parameters()) / 1e6
    load_average = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return [
        f"{model}: {parameters:.3g}M parameters on {where}, torch {torch.__version__}{load_average}",
        "median [least, greatest] over rounds in which everything takes its turn",
    ]


def _say(lines: list[str]) -> None:
    sys.stdout.write("\n".join([*lines, "", ""]))
    sys.stdout.flush()


def _recipe(model: str, data: Path, folder: Path, precision: Any, config: BenchConfig) -> TrainConfig:
    return TrainConfig(
        output_dir=str(folder / precision),
        model=ModelSpec(checkpoint=model),
        data=DataConfig(datasets=(DataSource(json_path=str(data)),)),
        objective=OBJECTIVE,
        optimiser=OPTIMISER,
        ema=0.999,
        steps=config.pictures // config.batch_size,
        batch_size=config.batch_size,
        precision=precision,
    )


if __name__ == "__main__":
    main()
