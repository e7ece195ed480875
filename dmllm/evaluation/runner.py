"""Ask a model every question of a suite, score the answers, write down everything.

Answers are written as they come, in the order of the data, and a rerun in the same folder goes on after the last whole
line. Questions that share decode settings are asked together; since a row of a batch is answered as it would be alone,
neither the batch size nor a stop changes an answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dmllm.config import save_config, to_dict
from dmllm.data.images import load_image
from dmllm.evaluation.config import SuiteConfig
from dmllm.evaluation.metrics import METRICS
from dmllm.evaluation.metrics.text import exact_match
from dmllm.evaluation.results import (
    PREDICTIONS,
    RESULTS,
    SETTINGS,
    SUITE,
    Results,
    provenance,
    score_task,
    write_json,
)
from dmllm.evaluation.tasks import BadRecord, Question, Task, read_task

LOG = logging.getLogger("dmllm.evaluation")
WINDOW = 8  # batches among which questions of equal decode settings are looked for
INDIFFERENT = ("batch_size", "on_error")  # suite settings that change no answer


def evaluate(pipeline: Any, suite: SuiteConfig, out: str | Path, *, model_name: str) -> Results:
    """Evaluate `pipeline` (a `dmllm.pipeline.Pipeline`) on a suite, in the folder `out`.

    Args:
        model_name: what the model is called in results, best the name or path it was loaded from.

    Raises:
        ValueError: data or settings are wrong; `out` holds an evaluation with other settings; or, with on_error raise,
            a record cannot be read or asked. The message names it.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tasks = [
        read_task(
            replace(task, limit=min((n for n in (task.limit, suite.limit) if n is not None), default=None)),
            decode=suite.decode,
            folder=out / "data",
            on_error=suite.on_error,
        )
        for task in suite.tasks
    ]
    decode = {task.config.name: _decode_settings(pipeline, task) for task in tasks}
    about = provenance(model_name, pipeline.model)
    settings = {
        "model": {key: about["model"][key] for key in ("sha256", "dtype")},
        "suite": {key: value for key, value in to_dict(suite).items() if key not in INDIFFERENT},
        "questions": {task.config.name: task.questions_sha256 for task in tasks},
        "decode": decode,
    }
    _agree(out, settings)
    save_config(suite, out / SUITE)
    items = [item for task in tasks for item in task.items]
    done = _resume(out / PREDICTIONS, [item.id for item in items])
    _ask_all(pipeline, items, done, out, suite)
    results = _summarise(tasks, decode, about, out)
    write_json(out / RESULTS, results.summary)
    return results


def _decode_settings(pipeline: Any, task: Task) -> dict[str, Any]:
    """The full decode settings of each kind of question. Raises ValueError for a wrong one before anything is asked."""
    asked = {item.kind: item.decode for item in task.items if isinstance(item, Question)}
    try:
        return {kind: asdict(pipeline.decode_config(**options)) for kind, options in sorted(asked.items())}
    except ValueError as error:
        raise ValueError(f"Task {task.config.name!r}, decode: {error}") from None


def _agree(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or compare with those already there. Raises ValueError naming the first difference."""
    path = out / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        if (out / PREDICTIONS).is_file():
            raise ValueError(f"{out} holds {PREDICTIONS} but no {SETTINGS}; give another --out, or delete the folder.")
        write_json(path, settings)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    for where, old, new in _differences(there, settings):
        raise ValueError(
            f"{out} holds an evaluation with other settings: {where} was {old!r:.80}, now {new!r:.80}. "
            "Give another --out, or delete the folder."
        )


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}".removeprefix("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{where}.{i}")
    elif old != new:
        yield where, old, new


def _resume(path: Path, ids: list[str]) -> int:
    """How many lines of predictions are there; a half-written last one is cut off.

    Raises ValueError when the lines are not those of the first questions.
    """
    if not path.is_file():
        return 0
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        with path.open("r+b") as file:
            file.truncate(len(kept))
    lines = kept.decode("utf-8").split("\n")[:-1]
    for number, line in enumerate(lines):
        try:
            found = json.loads(line)["id"]
        except (json.JSONDecodeError, KeyError, TypeError):
            found = None
        if number >= len(ids) or found != ids[number]:
            wanted = ids[number] if number < len(ids) else "the end"
            raise ValueError(
                f"{path}: line {number + 1} answers {found!r}, but {wanted!r} is expected; delete it to start over."
            )
    return len(lines)


def _ask_all(pipeline: Any, items: Sequence[Question | BadRecord], done: int, out: Path, suite: SuiteConfig) -> None:
    """Append the missing lines of predictions."""
    if done:
        LOG.info("%s: %d of %d answers are there already", out, done, len(items))
    size = suite.batch_size * WINDOW
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        (out / PREDICTIONS).open("a", encoding="utf-8", errors="backslashreplace") as file,
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar,
    ):
        shown = bar.add_task("asking", total=len(items), completed=done)
        for start in range(done, len(items), size):
            window = items[start : start + size]
            lines: dict[int, dict[str, Any]] = {}
            written = 0
            for answered in _window(pipeline, window, out, suite):
                lines |= answered
                while written in lines:
                    file.write(json.dumps(lines.pop(written), ensure_ascii=False) + "\n")
                    written += 1
                file.flush()
                bar.advance(shown, len(answered))
            assert written == len(window), (written, len(window))


def _window(
    pipeline: Any, window: Sequence[Question | BadRecord], out: Path, suite: SuiteConfig
) -> Iterator[dict[int, dict[str, Any]]]:
    """Lines by their number in the window, batch by batch."""
    groups: dict[str, list[tuple[int, Question]]] = {}
    for number, item in enumerate(window):
        if isinstance(item, BadRecord):
            yield {number: _failed(item, ValueError(item.error), suite)}
        else:
            groups.setdefault(json.dumps(item.decode, sort_keys=True), []).append((number, item))
    for group in groups.values():
        for start in range(0, len(group), suite.batch_size):
            yield _batch(pipeline, group[start : start + suite.batch_size], out, suite)


def _batch(
    pipeline: Any, batch: list[tuple[int, Question]], out: Path, suite: SuiteConfig
) -> dict[int, dict[str, Any]]:
    """Lines of one batch. If it is refused, each question is asked alone to find the one to blame."""
    lines: dict[int, dict[str, Any]] = {}
    pictures: dict[str, Any] = {}
    asked, messages = [], []
    for number, question in batch:
        try:
            messages.append(_with_pictures(question, pictures))
            asked.append((number, question))
        except ValueError as error:
            lines[number] = _failed(question, error, suite)
    if not asked:
        return lines
    generators = [_generator(suite.seed, question.id) for _, question in asked]
    began = time.perf_counter()
    try:
        replies = pipeline.chat(messages, generator=generators, **asked[0][1].decode)
    except ValueError as error:
        if len(asked) == 1:
            return lines | {asked[0][0]: _failed(asked[0][1], error, suite)}
        for one in asked:
            lines |= _batch(pipeline, [one], out, suite)
        return lines
    seconds = (time.perf_counter() - began) / len(asked)
    answered = zip(asked, replies, strict=True)
    return lines | {number: _line(question, reply, seconds, out) for (number, question), reply in answered}


def _line(question: Question, reply: Any, seconds: float, out: Path) -> dict[str, Any]:
    """What predictions.jsonl says of an answer."""
    each = METRICS.load(question.metric).each
    return {
        "id": question.id,
        "task": question.task,
        "kind": question.kind,
        "record": question.location,
        "images": [_portable(image, out) for image in question.images if isinstance(image, str)],
        "question": question.text,
        "truth": list(question.truths),
        "answer": reply.text,
        "metric": question.metric,
        "score": None if each is None else each(reply.text, question.truths),
        "exact": bool(exact_match(reply.text, question.truths)),
        "num_forwards": int(reply.num_forwards),
        "finish_reason": reply.finish_reason,
        "seconds": round(seconds, 6),
    }


def _failed(item: Question | BadRecord, error: ValueError, suite: SuiteConfig) -> dict[str, Any]:
    """The line of a record that could not be asked; raises instead where the suite says so."""
    text = str(error) if item.location in str(error) else f"{item.location}: {error}"
    if suite.on_error == "raise":
        raise ValueError(f"{text} (on_error: skip counts such records and goes on)") from None
    LOG.warning("skipped %s", text)
    return {"id": item.id, "task": item.task, "record": item.location, "error": text}


def _with_pictures(question: Question, pictures: dict[str, Any]) -> list[dict[str, Any]]:
    """The question's messages with its pictures read; each file once in a batch."""

    def read(image: Any) -> Any:
        if not isinstance(image, str):
            return load_image(image)
        if image not in pictures:
            pictures[image] = load_image(image)
        return pictures[image]

    return [
        {**m, "content": [{**p, "image": read(p.get("image"))} if p["type"] == "image" else p for p in m["content"]]}
        for m in question.messages
    ]


def _generator(seed: int, name: str) -> torch.Generator:
    """The question's own generator, whatever is asked beside it."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _portable(image: str, out: Path) -> str:
    """A picture's path, from the results folder where it lies inside it."""
    try:
        return str(Path(image).relative_to(out))
    except ValueError:
        return image


def _summarise(tasks: list[Task], decode: dict[str, Any], about: dict[str, Any], out: Path) -> Results:
    """What results.json holds. Raises ValueError when a task has no answer at all."""
    lines = Results(folder=out, summary={}).predictions()
    answered = [line for line in lines if "error" not in line]
    seconds = sum(line["seconds"] for line in answered)
    summary: dict[str, Any] = {**about, "tasks": {}}
    for task in tasks:
        name = task.config.name
        own = [line for line in answered if line["task"] == name]
        skipped = [line["error"] for line in lines if line["task"] == name and "error" in line]
        if not own:
            raise ValueError(f"Task {name!r}: all {len(skipped)} records were skipped; the first: {skipped[0]}")
        summary["tasks"][name] = {
            "data": task.data,
            "data_sha256": task.sha256,
            "questions_sha256": task.questions_sha256,
            "prompt": task.config.prompt,
            "count": len(own),
            "skipped": len(skipped),
            "skipped_records": skipped[:20],
            "scores": score_task(own, task.chance),
            "decode": decode[name],
        }
    summary["answers"] = len(answered)
    summary["seconds"] = round(seconds, 3)
    summary["answers_per_second"] = round(len(answered) / seconds, 3) if seconds else None
    summary["forwards_per_answer"] = round(sum(line["num_forwards"] for line in answered) / len(answered), 3)
    return Results(folder=out, summary=summary)
