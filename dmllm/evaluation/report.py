"""report.html: what was asked, what was answered, how good that is; one file without scripts or outside resources.

Several results of the same questions stand side by side (before and after training, say). Pictures, the loss curve and
one denoising animation are part of the file; everything that comes from data or a model is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dmllm.animation import save_gif
from dmllm.data.images import load_image
from dmllm.evaluation.charts import loss_curve as draw_curve
from dmllm.evaluation.results import SUITE, TOGETHER, Results
from dmllm.evaluation.tasks import ONE_KIND, templated
from dmllm.types import Message, Part

TEMPLATE = "report.html.jinja"
REPORT, ANIMATION = "report.html", "denoising.gif"
SAMPLES, MISTAKES = 8, 8  # pictures shown of each task
SEED = 0  # of the choice among them
SHOWN = 8  # model calls in which the animation writes its answer
LARGEST = 512  # pixels; larger pictures are shrunk and stored as JPEG


def write_report(
    out: str | Path,
    results: Sequence[tuple[str, str | Path]],
    *,
    loss_curve: str | Path | None = None,
    pipeline: Any = None,
    title: str | None = None,
) -> Path:
    """Write the report of one or several evaluations and return its path.

    Args:
        out: a folder (report.html is written in it) or the .html file.
        results: (label, results folder), in the order of the columns; samples are drawn from the last.
        loss_curve: the metrics.jsonl of the training run.
        pipeline: the last result's model, which shows how it denoises one answer; None leaves the animation out.

    Raises:
        ValueError: results that asked a task different questions cannot stand side by side.
        FileNotFoundError: a folder without finished results, or no metrics file.
    """
    path = Path(out) if str(out).endswith(".html") else Path(out) / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    if not results:
        raise ValueError("results is empty; give at least one (label, results folder).")
    found = [(label, Results.read(folder)) for label, folder in results]
    _check_comparable(found)
    answers = [{p["id"]: p for p in result.predictions() if "error" not in p} for _, result in found]
    _, last = found[-1]
    page = {
        "title": title or f"How good is {last.summary['model']['name']}?",
        "labels": [label for label, _ in found],
        "last": last.summary,
        "tasks": [_task(name, found, answers) for name in last.summary["tasks"]],
        "curve": None if loss_curve is None else _curve(Path(loss_curve)),
        "animation": None if pipeline is None else _animation(pipeline, last, answers[-1], path.parent),
        "runs": [
            {"label": label, "command": _command(result), "decodings": _decodings(result), **result.summary}
            for label, result in found
        ],
    }
    loader = jinja2.PackageLoader("dmllm", "evaluation")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(environment.get_template(TEMPLATE).render(page), encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path


def _check_comparable(found: list[tuple[str, Results]]) -> None:
    label, last = found[-1]
    for other_label, other in found[:-1]:
        for name, task in last.summary["tasks"].items():
            there = other.summary["tasks"].get(name)
            if there is not None and there["questions_sha256"] != task["questions_sha256"]:
                raise ValueError(
                    f"Task {name!r} asks other questions in {other_label!r} ({there['data']}) than in {label!r} "
                    f"({task['data']}); evaluate both on the same suite."
                )


def _task(name: str, found: list[tuple[str, Results]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Score rows and pictures of one task."""
    task = found[-1][1].summary["tasks"][name]
    columns = [
        {r["kind"]: r for r in result.summary["tasks"].get(name, {"scores": []})["scores"]} for _, result in found
    ]
    kinds = [kind for kind in columns[-1] if not (kind == ONE_KIND and len(columns[-1]) == 2)]
    rows = [_score_row(kind, [column.get(kind) for column in columns]) for kind in kinds]
    own = [p for p in answers[-1].values() if p["task"] == name]
    generator = np.random.default_rng(SEED)
    shuffled = [own[i] for i in generator.permutation(len(own))]
    samples = shuffled[:SAMPLES]
    shown = {p["id"] for p in samples}
    wrong = _one_of_each_kind_first([p for p in shuffled if _missed(p) and p["id"] not in shown])
    folder = found[-1][1].folder
    earlier = [(label, those) for (label, _), those in zip(found[:-1], answers[:-1], strict=True)]
    return {
        "name": name,
        "rows": rows,
        "skipped": task["skipped"],
        "count": task["count"],
        "wrong": sum(map(_missed, own)),
        "samples": [_card(p, folder, earlier) for p in samples],
        "mistakes": [_card(p, folder, earlier) for p in wrong[:MISTAKES]],
    }


def _score_row(kind: str, scores: list[dict[str, Any] | None]) -> dict[str, Any]:
    last = scores[-1]
    assert last is not None
    return {
        "kind": "all questions" if kind == TOGETHER else kind,
        "together": kind == TOGETHER,
        "metric": last["metric"].replace("_", " "),
        "count": last["count"],
        "chance": last["chance"],
        "bounded": last["bounded"],
        "cells": scores,
        "details": [{k.replace("_", " "): v for k, v in (s or {}).get("details", {}).items()} for s in scores],
    }


def _verdict(prediction: dict[str, Any]) -> str:
    """right, partly or wrong by its own score; open where the metric scores no single answer and it is not a truth."""
    score = prediction["score"]
    if score is None:
        return "right" if prediction["exact"] else "open"
    return "right" if score == 1 else "partly" if score > 0 else "wrong"


def _missed(prediction: dict[str, Any]) -> bool:
    return _verdict(prediction) in ("partly", "wrong")


def _one_of_each_kind_first(predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of every kind, then the second of every kind, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for prediction in predictions:
        seen[prediction["kind"]] = rank = seen.get(prediction["kind"], -1) + 1
        ranked.append((rank, prediction))
    return [prediction for _, prediction in sorted(ranked, key=lambda pair: pair[0])]


def _card(prediction: dict[str, Any], folder: Path, earlier: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "images": [_picture(image, folder) for image in prediction["images"]],
        "verdict": _verdict(prediction),
        "truths": list(dict.fromkeys(prediction["truth"])),
        "before": [(label, answers[prediction["id"]]) for label, answers in earlier if prediction["id"] in answers],
        **{key: prediction[key] for key in ("kind", "question", "answer")},
    }


def _picture(image: str, folder: Path) -> dict[str, Any] | None:
    """A picture as a data URL with its size, None when it is not there any more."""
    source = image if image.startswith("data:") or Path(image).is_file() else str(folder / image)
    try:
        picture = load_image(source)
    except ValueError:
        return None
    shrunk = max(picture.size) > LARGEST
    if shrunk:
        picture.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    picture.save(data, **({"format": "JPEG", "quality": 85} if shrunk else {"format": "PNG"}))
    kind = "jpeg" if shrunk else "png"
    return {"url": _data_url(data.getvalue(), kind), "tiny": max(picture.size) <= 128}


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _curve(metrics: Path) -> Any:
    if not metrics.is_file():
        raise FileNotFoundError(f"No training metrics {metrics}; give the metrics.jsonl of a run, or None.")
    whole_lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # a running training may be writing the last
    lines = [json.loads(line) for line in whole_lines]
    return draw_curve(
        [(line["step"], line["loss"]) for line in lines if "loss" in line],
        [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line],
    )


def _animation(pipeline: Any, result: Results, answers: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The longest right answer, denoised once more; None when there is no picture to ask about."""
    asked = [p for p in answers.values() if p["images"] and _picture(p["images"][0], result.folder)]
    if not asked:
        return None
    chosen = max(asked, key=lambda p: (_verdict(p) == "right", len(p["answer"])))
    task = result.summary["tasks"][chosen["task"]]
    images = [i if i.startswith("data:") or Path(i).is_file() else str(result.folder / i) for i in chosen["images"]]
    parts: list[Part] = [{"type": "image", "image": image} for image in images]
    content = templated(task["prompt"], [*parts, {"type": "text", "text": chosen["question"]}])
    messages: list[Message] = [{"role": "user", "content": content}]
    decode = task["decode"][chosen["kind"]]
    blocks = -(-decode["max_new_tokens"] // (decode["block_length"] or decode["max_new_tokens"]))
    slowly = {**decode, "threshold": None, "steps": blocks * max(SHOWN // blocks, 1)}
    steps = list(pipeline.stream(messages, generator=SEED, **slowly))
    gif = folder / ANIMATION
    save_gif(steps, gif, pipeline.token_texts, image=images[0], question=chosen["question"])
    return {
        "url": _data_url(gif.read_bytes(), "gif"),
        "question": chosen["question"],
        "answer": pipeline.text(steps[-1]),
        "forwards": int(steps[-1].num_forwards[0]),
        "asked": chosen["num_forwards"],
    }


def _command(result: Results) -> str:
    """What to type to get these results again."""
    suite = shlex.quote(str(result.folder / SUITE))
    return f"dmllm eval {suite} --model {shlex.quote(result.summary['model']['name'])} --out again"


def _decodings(result: Results) -> dict[str, list[tuple[dict[str, Any], list[str]]]]:
    """For each task its distinct decode settings, each with the kinds of question that are decoded so."""
    found = {}
    for name, task in result.summary["tasks"].items():
        settings: list[dict[str, Any]] = []
        for chosen in task["decode"].values():
            settings += [chosen] if chosen not in settings else []
        found[name] = [(chosen, [k for k, own in task["decode"].items() if own == chosen]) for chosen in settings]
    return found
