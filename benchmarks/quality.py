"""What fewer model calls cost: quality against calls and against time, on the shipped model and pictures of its kind.

    python -m benchmarks.quality --model dmllm-tiny --picture docs/quality.svg

Every rule that commits several tokens in a call is asked the same questions as one that commits a single token:
captions, whose answers are long, and reading, whose tokens cannot be guessed. Beside them stands what a model that
writes from left to right would pay on the same weights: a call for each token and one for the end, each on one row
behind a cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, watch
from benchmarks.output import conclude, tell
from dmllm.evaluation.config import TaskConfig
from dmllm.evaluation.metrics import METRICS
from dmllm.evaluation.rounds import Spread, sheet, short
from dmllm.evaluation.tasks import Question, read_task
from dmllm.pipeline import Pipeline, load

METRIC = {"reading": "char_accuracy", "default": "exact_match"}
SINGLE = "a token a call"
LOST = 0.01  # of the score, that may be given for speed


@dataclass(frozen=True)
class Setting:
    """A rule at one strength."""

    rule: str
    value: str
    decode: dict[str, Any]


def settings(length: int) -> list[Setting]:
    """One token a call; several; and what is sure."""
    single = {"threshold": None, "steps": length}
    found = [Setting(SINGLE, "", single)]
    found += [
        Setting("tokens a call", str(n), {"threshold": None, "steps": length // n})
        for n in (2, 4, 8, 16)
        if n <= length
    ]
    found += [Setting("threshold", f"{t:g}", {"threshold": t}) for t in (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)]
    bounds = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 4.0)
    found += [Setting("entropy bound", f"{b:g}", {"entropy_bound": b, "remasking": "entropy"}) for b in bounds]
    found += [Setting("factor", f"{f:g}", {"factor": f}) for f in (0.1, 0.5, 1.0, 2.0)]
    return found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions of one kind under one setting."""

    kind: str
    setting: Setting
    score: float
    forwards: float  # an answer
    tokens: float  # of an answer, its end too
    seconds: list[float]  # an answer, round by round


def questions_of(kinds: Sequence[str], pictures: int, folder: Path, seed: int) -> dict[str, list[Question]]:
    task = TaskConfig(name="scenes", builtin="scenes", split="test", num=pictures, seed=seed, metric=METRIC)
    items = [q for q in read_task(task, decode={}, folder=folder, on_error="raise").items if isinstance(q, Question)]
    return {kind: [q for q in items if q.kind == kind] for kind in kinds}


def ask(pipeline: Pipeline, questions: list[Question], decode: dict[str, Any], batch: int) -> tuple[float, list[Any]]:
    """Seconds of this process, and the replies."""
    start, replies = machine.now(), []
    for first in range(0, len(questions), batch):
        part = [list(q.messages) for q in questions[first : first + batch]]
        replies += pipeline.chat(part, generator=0, **decode)
    return machine.now() - start, replies


def from_left_to_right(pipeline: Pipeline, questions: list[Question], tokens: float, batch: int) -> list[float]:
    """Seconds an answer of so many tokens, a call on one row for each: prompts, and one call measured."""
    found = []
    for _ in range(3):
        whole = calls_of_one = 0.0
        for first in range(0, len(questions), batch):
            with watch.Calls(pipeline.model) as calls:
                ask(pipeline, questions[first : first + batch], {"max_new_tokens": 1, "threshold": None}, batch)
            whole += calls.seconds
            calls_of_one += calls.steps[-1]
        found.append((whole + (tokens - 1) * calls_of_one) / len(questions))
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON has it."""
    about, loads = machine.about(), [machine.load_average()]
    pipeline = load(arguments.model, device="cpu", image_room=0, prompt_room=0)  # the same is asked again
    length = pipeline.decode_config().max_new_tokens
    with tempfile.TemporaryDirectory() as name:
        questions = questions_of(arguments.kinds, arguments.pictures, Path(name), arguments.seed)
        every = [(kind, setting) for kind in questions for setting in settings(length)]
        taken: list[list[float]] = [[] for _ in every]
        replies: list[list[Any]] = [[] for _ in every]
        for number in range(arguments.rounds):
            loads.append(machine.load_average())
            tell(f"round {number + 1} of {arguments.rounds}, load average {loads[-1]:.1f}")
            for i, (kind, setting) in enumerate(every):
                seconds, replies[i] = ask(pipeline, questions[kind], setting.decode, arguments.batch)
                taken[i].append(seconds / len(questions[kind]))
        found = [
            _asked(kind, setting, questions[kind], own, seconds)
            for (kind, setting), own, seconds in zip(every, replies, taken)
        ]
        beside = {
            kind: {
                "forwards": (tokens := next(a.tokens for a in found if a.kind == kind)),
                "seconds": statistics.median(from_left_to_right(pipeline, own, tokens, arguments.batch)),
            }
            for kind, own in questions.items()
        }
    return {
        "about": about,
        "load_averages": [round(x, 2) for x in loads],
        "model": arguments.model,
        "pictures": arguments.pictures,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "questions": {kind: len(own) for kind, own in questions.items()},
        "rows": [_row(a) for a in found],
        "left_to_right": beside,
    }


def _asked(kind: str, setting: Setting, questions: list[Question], replies: list[Any], seconds: list[float]) -> Asked:
    scores = []
    for question, reply in zip(questions, replies, strict=True):
        each = METRICS.load(question.metric).each
        assert each is not None
        scores.append(each(reply.text, question.truths))
    return Asked(
        kind=kind,
        setting=setting,
        score=statistics.mean(scores),
        forwards=statistics.mean(float(r.num_forwards) for r in replies),
        tokens=statistics.mean(len(r.ids) + (r.finish_reason == "stop") for r in replies),
        seconds=seconds,
    )


def _row(asked: Asked) -> dict[str, Any]:
    return {
        "kind": asked.kind,
        "rule": asked.setting.rule,
        "value": asked.setting.value,
        "score": asked.score,
        "forwards": asked.forwards,
        "tokens": asked.tokens,
        "seconds": vars(Spread.of(asked.seconds)),
    }


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fewest calls among what scores at most `LOST` less than one token a call."""
    least = next(row["score"] for row in rows if row["rule"] == SINGLE) - LOST
    return min((row for row in rows if row["score"] >= least - 1e-9), key=lambda row: row["forwards"])


def lines(found: dict[str, Any]) -> list[str]:
    """What was measured, as tables."""
    said = [
        f"{found['model']} on {found['pictures']} built-in scenes, batches of {found['batch']}",
        machine.in_words(found["about"]),
        f"median [least, greatest] of {found['rounds']} rounds in turn, seconds of this process",
        "",
    ]
    for kind, number in found["questions"].items():
        rows, beside = [row for row in found["rows"] if row["kind"] == kind], found["left_to_right"][kind]
        single, chosen = rows[0], best(rows)
        table = [
            [
                f"{row['rule']} {row['value']}".strip() + (" *" if row is chosen else ""),
                f"{100 * row['score']:.1f} %",
                short(row["forwards"]),
                short(row["tokens"] / row["forwards"]),
                str(Spread(*(1e3 * row["seconds"][k] for k in ("median", "least", "greatest")))),
                f"{short(single['forwards'] / row['forwards'])} x",
                f"{short(beside['forwards'] / row['forwards'])} x",
                f"{short(single['seconds']['median'] / row['seconds']['median'])} x",
            ]
            for row in rows
        ]
        alone = [
            "left to right, cached (cost alone)",
            "",
            short(beside["forwards"]),
            "1",
            short(1e3 * beside["seconds"]),
        ]
        table.append([*alone, f"{short(single['forwards'] / beside['forwards'])} x", "1 x", ""])
        table[-1][-1] = f"{short(single['seconds']['median'] / beside['seconds'])} x"
        head = [
            f"{kind}, {number} questions",
            "score",
            "forwards",
            "tokens each",
            "ms an answer",
            "fewer",
            "than l-t-r",
        ]
        said += [*sheet([*head, "sooner"], table), ""]
        said += [
            f"  * within {100 * LOST:g} point of {SINGLE}: {chosen['rule']} {chosen['value']}, "
            f"{short(single['forwards'] / chosen['forwards'])} times fewer forwards, "
            f"{short(single['seconds']['median'] / chosen['seconds']['median'])} times sooner",
            "",
        ]
    return [*said, *machine.warn(found["load_averages"])]


def draw(found: dict[str, Any], path: Path) -> None:
    """Score against forwards and against time, a row of panels for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    kinds = list(found["questions"])
    figure, panels = pyplot.subplots(len(kinds), 2, figsize=(10, 3.6 * len(kinds)), squeeze=False, sharey="row")
    for kind, (left, right) in zip(kinds, panels):
        rows, beside = [row for row in found["rows"] if row["kind"] == kind], found["left_to_right"][kind]
        for rule in dict.fromkeys(row["rule"] for row in rows):
            own = [row for row in rows if row["rule"] == rule]
            scores = [100 * row["score"] for row in own]
            left.plot([row["forwards"] for row in own], scores, "o-", label=rule, markersize=4)
            right.plot([1e3 * row["seconds"]["median"] for row in own], scores, "o-", markersize=4)
        left.axvline(beside["forwards"], color="grey", linestyle=":", label="left to right, cached (cost)")
        right.axvline(1e3 * beside["seconds"], color="grey", linestyle=":")
        for panel, what in ((left, "model calls an answer"), (right, "processor ms an answer")):
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_ylim(min(89.0, *(100 * row["score"] - 1 for row in rows)), 101)  # a point is little
            panel.set_xlabel(what)
            panel.grid(alpha=0.3, which="both")
        left.set_ylabel(f"{kind}, %")
    panels[0][0].legend(fontsize=7, loc="lower right")
    figure.suptitle(
        f"{found['model']}, {found['about']['processor']}, one thread, {found['about']['date']}", fontsize=9
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, draw, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="dmllm-tiny")
    parser.add_argument("--kinds", nargs="+", default=["caption", "reading"])
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/bench/quality.json")
    parser.add_argument("--picture", help="an .svg or .png of the curves")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    if arguments.picture:
        draw(found, Path(arguments.picture))
    conclude(found, lines(found), arguments.out, "benchmarks.quality", argv)


if __name__ == "__main__":
    main()
