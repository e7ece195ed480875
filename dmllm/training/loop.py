"""Training, step by step.

A step takes its micro-batches, corrupts them all, sums each loss's count over micro-batches and processes, and only
then runs backward on

    sum over losses of  coefficient * total / global count

so that neither the micro-batch size nor the number of processes changes the result.
"""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmllm.objectives.draws import Draws
from dmllm.training.assemble import Run, assemble, open_loader
from dmllm.training.config import TrainConfig
from dmllm.training.distributed import global_counts, sum_over_processes, to_device
from dmllm.training.export import save_model
from dmllm.training.logging import Reporter
from dmllm.training.optimiser import set_learning_rates
from dmllm.training.schedule import learning_rate_factor
from dmllm.training.state import Progress, newest_checkpoint, save_checkpoint
from dmllm.training.validation import coefficient, evaluating, for_processes, sample_answers, validation_loss
from dmllm.types import Batch


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call of `train` has done."""

    folder: Path  # of the run
    model: Path | None  # the final model, a Hugging Face folder; None if the run was stopped before its end
    step: int
    best_loss: float | None  # lowest validation loss


def train(config: TrainConfig) -> Result:
    """Train until the last step, or until stopped (Ctrl-C, SIGTERM); called again, continue.

    Raises:
        ValueError: the configuration does not fit the data, the processes, or the run that output_dir holds.
        FloatingPointError: the loss is no longer a finite number.
    """
    run = assemble(config)
    report = Reporter(run.folder, run.accelerator, total=run.steps, start=run.start.step)
    factor = learning_rate_factor(config.schedule, run.steps)
    progress, window = run.start, Window()
    loader = open_loader(run, config.data, run.mixture, start=progress.examples, seed=config.seed)
    batches = Timed(loader)
    with report, stop_requests() as stopped:
        _say_start(run, report)
        for step in range(progress.step, run.steps):
            set_learning_rates(run.learned.optimisers, factor(step))
            window.add(training_step(run, batches, step))
            progress = replace(progress, step=step + 1, examples=progress.examples + config.batch_size)
            last = progress.step == run.steps
            saving = last or progress.step % config.save_every == 0
            stop = stopped() and run.accelerator.num_processes == 1
            if saving or stop or progress.step % config.log_every == 0:
                stop = window.log(run, report, progress, factor(step), batches.taken(), stopped())
            paused = time.monotonic()
            if config.validation and (last or progress.step % config.validation.every == 0):
                progress = validate(run, report, progress)
            if config.samples.every and (last or progress.step % config.samples.every == 0):
                sample_answers(run, progress.step)
            if saving or stop:
                save_checkpoint(run.folder, progress, run.learned, run.accelerator, config.keep)
            window.since += time.monotonic() - paused
            if stop and not last:
                break
        loader.close()
        if loader.skipped:
            report.say(f"{loader.skipped} records could not be used and others took their place.")
        return finish(run, report, progress)


def training_step(run: Run, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
    """Move the weights once. Returns this process's share of each loss, and the gradient's norm, on the device."""
    config, accelerator = run.config, run.accelerator
    torch.manual_seed(config.seed + 1_000_003 * step + accelerator.process_index)  # for dropout, where a tower has it
    noised = []
    for batch in itertools.islice(batches, run.micro_batches):
        draws = Draws(
            seed=config.seed, step=step, num_examples=config.batch_size, indices=batch.indices, num_steps=run.steps
        )
        noised.append(run.objective.prepare(for_processes(run, batch), draws))
    counts = global_counts(accelerator, [n.counts for n in noised])
    shares: dict[str, Tensor] = {}
    for number, micro in enumerate(noised, start=1):
        accumulating = accelerator.no_sync(run.model) if number < len(noised) else nullcontext()
        with accumulating:
            losses = run.objective.loss(run.model, to_device(micro, accelerator.device))
            parts = {name: coefficient(run, name) * loss.total / counts[name] for name, loss in losses.items()}
            # gradients are averaged over processes, losses are to be summed
            accelerator.backward(sum(parts.values()) * accelerator.num_processes)
        for name, part in parts.items():
            shares[name] = part.detach() + shares.get(name, 0.0)
    learning = [p for p in run.core.parameters() if p.requires_grad]
    norm: Any = accelerator.clip_grad_norm_(learning, config.clip_norm or math.inf)
    for optimiser in run.learned.optimisers.values():
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    if run.learned.ema is not None:
        run.learned.ema.update(step)
    return {**shares, "grad_norm": norm.full_tensor() if hasattr(norm, "full_tensor") else norm}


@dataclass
class Timed:
    """An iterator that adds up how long its items were waited for."""

    batches: Iterator[Batch]
    seconds: float = 0.0

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Batch:
        before = time.monotonic()
        batch = next(self.batches)
        self.seconds += time.monotonic() - before
        return batch

    def taken(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass
class Window:
    """Losses since the last line, summed on the device: reading them is the only time the host waits for it."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in one step."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def log(self, run: Run, report: Reporter, progress: Progress, factor: float, waited: float, stop: bool) -> bool:
        """Write the window's means and begin a new one. Returns whether any process was asked to stop.

        Args:
            factor: of the learning rates.
            waited: seconds spent waiting for data.
        """
        flag = torch.tensor(float(stop), device=run.accelerator.device)
        values = torch.stack([flag, *(value.float() for value in self.sums.values())])
        flags, *totals = sum_over_processes(run.accelerator, values).tolist()
        means = {name: total / self.steps for name, total in zip(self.sums, totals, strict=True)}
        norm = means.pop("grad_norm") / run.accelerator.num_processes
        loss = sum(means.values())
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"The loss is {loss} and the gradient's norm {norm} around step {progress.step}; try a lower "
                f"--optimiser.lr or a longer --schedule.warmup. Newest checkpoint: {newest_checkpoint(run.folder)}."
            )
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        rate = self.steps * run.config.batch_size / seconds
        further = means if len(means) > 1 else {}
        report.write(
            progress.step,
            loss=loss,
            **further,
            grad_norm=norm,
            lr=run.config.optimiser.lr * factor,
            examples=progress.examples,
            examples_per_second=rate,
            data_wait=waited / seconds,
        )
        report.progress(progress.step, loss, rate)
        self.sums, self.steps = {}, 0
        return flags > 0


def validate(run: Run, report: Reporter, progress: Progress) -> Progress:
    """Log the validation loss and keep the model in best/ if it is the lowest so far."""
    loss = validation_loss(run)
    report.write(progress.step, validation_loss=loss)
    better = loss < (math.inf if progress.best_loss is None else progress.best_loss)
    report.say(f"step {progress.step}: validation loss {loss:.4f}{' (best)' if better else ''}")
    if not better:
        return progress
    progress = replace(progress, best_loss=loss, best_step=progress.step)
    with evaluating(run):
        save_model(run, run.folder / "best", progress)
    return progress


def finish(run: Run, report: Reporter, progress: Progress) -> Result:
    """Save the model of a run that is complete; say how to continue one that is not."""
    model = None
    if progress.step == run.steps:
        model = run.folder / "model"
        with evaluating(run):
            save_model(run, model, progress)
        report.say(f"Done: {model}")
    else:
        at = newest_checkpoint(run.folder)
        report.say(f"Stopped after step {progress.step} of {run.steps}; the same command continues from {at}.")
    run.accelerator.end_training()
    return Result(folder=run.folder, model=model, step=progress.step, best_loss=progress.best_loss)


@contextmanager
def stop_requests() -> Iterator[Any]:
    """Within, Ctrl-C and SIGTERM ask the loop to stop after the step it is in; a second Ctrl-C stops at once."""
    asked = threading.Event()

    def ask(number: int, _: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_start(run: Run, report: Reporter) -> None:
    learning = sum(p.numel() for p in run.core.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.core.parameters())
    report.say(
        f"{run.folder}: {learning / 1e6:.2f}M of {total / 1e6:.2f}M parameters learn from {len(run.mixture)} examples, "
        f"{run.config.batch_size} a step ({run.accelerator.num_processes} x {run.micro_batches} x "
        f"{run.micro_batch_size}), {run.steps} steps on {run.accelerator.device}"
    )
    if run.start.step:
        report.say(f"Continuing after step {run.start.step}.")
