"""Results: scores per task and kind with their intervals, and everything needed to get them again.

A results folder holds

    suite.yaml          the suite as resolved, to run again
    settings.json       what the predictions depend on: a rerun with other settings is refused
    predictions.jsonl   one line a question, in the order of the data, written as they come
    results.json        scores, provenance, time
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmllm.evaluation.metrics import METRICS, Metric
from dmllm.evaluation.metrics.interval import interval

SUITE, SETTINGS, PREDICTIONS, RESULTS = "suite.yaml", "settings.json", "predictions.jsonl", "results.json"
TOGETHER = "together"  # the row of all kinds of a task
PACKAGES = ("dmllm", "torch", "torchvision", "transformers", "tokenizers", "timm", "open_clip_torch", "pillow", "numpy")


@dataclass(frozen=True, kw_only=True)
class Results:
    """A finished evaluation: results.json, and the predictions behind it."""

    folder: Path
    summary: dict[str, Any]
    """What results.json holds."""

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """The results in a folder. Raises FileNotFoundError when no evaluation has finished there."""
        path = Path(folder) / RESULTS
        if not path.is_file():
            raise FileNotFoundError(f"No finished evaluation in {folder}: {path} is missing; run `dmllm eval` first.")
        return cls(folder=Path(folder), summary=json.loads(path.read_text(encoding="utf-8")))

    def scores(self, task: str, kind: str = TOGETHER) -> dict[str, Any]:
        """One row of scores. Raises KeyError when there is none."""
        return next(row for row in self.summary["tasks"][task]["scores"] if row["kind"] == kind)

    def predictions(self) -> list[dict[str, Any]]:
        """The lines of predictions.jsonl, in order."""
        lines = (self.folder / PREDICTIONS).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]


def score_task(predictions: Sequence[dict[str, Any]], chance: dict[str, float]) -> list[dict[str, Any]]:
    """A row of scores for all kinds together, then one for each kind in the order of their names.

    Each row: kind, metric, value (the mean score), interval [low, high] (95 %), interval_method, count, exact (share
    of answers that are a truth, by exact match), chance (score of guessing, or None), forwards (model calls an
    answer), details (the metric's further figures).
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for prediction in predictions:
        kinds.setdefault(prediction["kind"], []).append(prediction)
    rows = [_row(kind, kinds[kind], chance.get(kind)) for kind in sorted(kinds)]
    if len(rows) == 1:
        return [rows[0] | {"kind": TOGETHER}, rows[0]]
    guessed = [row["chance"] for row in rows]
    total = sum(row["count"] for row in rows)
    together = None if None in guessed else sum(row["chance"] * row["count"] for row in rows) / total
    return [_row(TOGETHER, predictions, together), *rows]


def _row(kind: str, predictions: Sequence[dict[str, Any]], chance: float | None) -> dict[str, Any]:
    names = sorted({p["metric"] for p in predictions})
    metrics: list[Metric] = [METRICS.load(name) for name in names]
    scores: list[float] = []
    details: dict[str, Any] = {}
    if len(metrics) == 1:
        corpus = metrics[0].summarise([p["answer"] for p in predictions], [p["truth"] for p in predictions])
        scores, details = corpus.scores, corpus.details
    elif all(metric.bounded for metric in metrics):
        scores = [p["score"] for p in predictions]
        details = {"exactly right": sum(p["exact"] for p in predictions) / len(predictions)}
    value, bounds, method = None, None, None
    if scores:
        bounded = all(metric.bounded for metric in metrics)
        low, high, method = interval(scores, [tuple(p["images"]) or p["record"] for p in predictions], shares=bounded)
        value, bounds = sum(scores) / len(scores), [low, high]
    return {
        "kind": kind,
        "metric": " + ".join(names),
        "bounded": all(metric.bounded for metric in metrics),
        "value": value,
        "interval": bounds,
        "interval_method": method,
        "count": len(predictions),
        "exact": sum(p["exact"] for p in predictions) / len(predictions),
        "chance": chance,
        "forwards": sum(p["num_forwards"] for p in predictions) / len(predictions),
        "details": details,
    }


def provenance(model_name: str, model: nn.Module) -> dict[str, Any]:
    """The model, the code, the packages and the machine of an evaluation."""
    device = next(iter(model.parameters())).device
    return {
        "model": {
            "name": model_name,
            "sha256": sha256_of_weights(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        },
        "git": git_revision(),
        "packages": {"python": platform.python_version()} | _versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sha256_of_weights(model: nn.Module) -> str:
    """A digest of all parameters and buffers as loaded: names, types, shapes, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def git_revision() -> str | None:
    """The commit of the working directory, with "+changes" when tracked files differ from it; None outside git."""

    def ask(*words: str) -> str | None:
        try:
            asked = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return asked.stdout.strip() if asked.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return commit and commit + ("+changes" if ask("status", "--porcelain", "--untracked-files=no") else "")


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that the file is either the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary_lines(folders: Sequence[str | Path]) -> list[str]:
    """The scores of one or several results folders as a table of plain text, for a terminal."""
    found = [Results.read(folder) for folder in folders]
    rows = [("", *(result.folder.name for result in found), "chance", "questions")]
    for name, task in found[-1].summary["tasks"].items():
        others = [{row["kind"]: row for row in r.summary["tasks"].get(name, {"scores": []})["scores"]} for r in found]
        for row in task["scores"]:
            title = name if row["kind"] == TOGETHER else f"  {row['kind']}"
            values = [_shown(other.get(row["kind"])) for other in others]
            guess = "" if row["chance"] is None else f"{row['chance']:.1%}"
            rows.append((title, *values, guess, str(row["count"])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shown(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return ""
    return f"{row['value']:.1%}" if row["bounded"] else f"{row['value']:.2f}"
