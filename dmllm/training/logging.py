"""What a run says of itself: a progress bar or plain lines, metrics.jsonl, loss.png, and trackers if asked for.

`metrics.jsonl` has one JSON object a line. Training lines hold step, loss, grad_norm, lr, examples, examples_per_second
and data_wait, the share of the time spent waiting for data; validation lines hold step and validation_loss.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG = logging.getLogger("dmllm.training")
TRACKERS = {"tensorboard": "dmllm[trackers]", "trackio": "dmllm[trackers]", "wandb": "wandb"}


class Reporter:
    """Silent on all processes but the main one."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, total: int, start: int):
        self.folder, self.accelerator, self.total = folder, accelerator, total
        self.main = accelerator.is_main_process
        self.path, self.started, self.done = folder / "metrics.jsonl", time.monotonic(), start
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if self.main:
            for name in ("metrics.jsonl", "samples.jsonl"):
                _drop_lines_after(folder / name, start)
            if console.is_terminal:
                columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
                self.bar = Progress(*columns, console=console, refresh_per_second=2)
                self.bar.start()
                self.task = self.bar.add_task("", total=total, completed=start)

    def write(self, step: int, **values: Any) -> None:
        """One line of metrics.jsonl, and the trackers."""
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: _rounded(v) for k, v in values.items()}}) + "\n")
        self.accelerator.log(values, step=step)

    def progress(self, step: int, loss: float, examples_per_second: float) -> None:
        """Move the bar, or say a line."""
        if not self.main:
            return
        said = f"loss {loss:.4f}  {examples_per_second:.1f} examples/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=said)
            return
        rate = (step - self.done) / max(time.monotonic() - self.started, 1e-9)
        left = (self.total - step) / rate if rate > 0 else math.inf
        LOG.info("step %d/%d  %s  %s left", step, self.total, said, _clock(left))

    def say(self, text: str) -> None:
        """A line above the bar, or a plain one."""
        if self.main:
            (self.bar.console.print if self.bar is not None else LOG.info)(text)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar and draw the curve."""
        if self.bar is not None:
            self.bar.stop()
        if self.main:
            draw_loss(self.path, self.folder / "loss.png")


def check_trackers(names: list[str]) -> None:
    """Raise ValueError for an unknown tracker, or one that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"trackers: {name!r} is not one of {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"trackers: {name} is not installed; type: pip install '{TRACKERS[name]}'")


def draw_loss(metrics: Path, picture: Path) -> None:
    """loss.png from metrics.jsonl, if matplotlib is there (said once if it is not)."""
    if not metrics.is_file():
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        LOG.info("No loss.png: matplotlib is not installed; type: pip install 'dmllm[report]'")
        return
    lines = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one cut short by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _drop_lines_after(path: Path, step: int) -> None:
    """Forget what a killed run logged after its last checkpoint: it will be logged again."""
    if path.is_file():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        rewritten = path.with_name(f"{path.name}.writing")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rewritten.replace(path)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
