"""A summary as sections: a heading, what it says in a line, a table, a picture. The report and the page print them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dmllm.evaluation.comparison.drawing import Line, lines

NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table and its picture."""

    study: str
    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    picture: Markup | None = None
    name: str = ""  # of the picture's file


def sections(summary: dict[str, Any], config: dict[str, Any]) -> list[Section]:
    """Everything that was measured, study by study. `config` is the comparison as plain values."""
    found = []
    for study, runs in summary.items():
        said = next((s["title"] for s in config["studies"] if s["name"] == study), "")
        made = [
            _learned(study, runs, said),
            _bound(study, runs),
            _holes(study, runs),
            _ranked(study, runs),
            _free(study, runs),
            *_suites(study, runs),
            _alone(study, runs),
            *_curves(study, runs),
            _path(study, runs),
        ]
        found += [section for section in made if section is not None and section.rows]
    return found


def percent(value: dict[str, Any] | None) -> str:
    """A share over seeds."""
    if value is None:
        return NOTHING
    if value["low"] is None:
        return f"{100 * value['mean']:.1f} %"
    return f"{100 * value['mean']:.1f} % [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


def number(value: dict[str, Any] | None, digits: int = 3) -> str:
    """Any other figure over seeds."""
    if value is None:
        return NOTHING
    if value["low"] is None or value["low"] == value["high"]:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _learned(study: str, runs: dict[str, Any], said: str) -> Section:
    rows = []
    for name, run in runs.items():
        options = ", ".join(f"{k}: {v}" for k, v in run["objective"]["options"].items())
        objective = run["objective"]["name"] + (f" {{{options}}}" if options else "")
        per_step = run["seconds"]["mean"] / run["steps"]
        begun = run["start"] or "nothing"
        seeds = ", ".join(map(str, run["seeds"]))
        rows.append(
            [name, objective, begun, f"{run['parameters']:,}", f"{run['examples']:,}", f"{1e3 * per_step:.0f}", seeds]
        )
    return Section(
        study=study,
        title="What learned",
        note=f"{said} Time is that of one processor; what another has seen, from which one started, is not "
        "counted.".strip(),
        head=["paradigm", "objective", "started from", "parameters", "examples seen", "ms a step", "seeds"],
        rows=rows,
    )


def _bound(study: str, runs: dict[str, Any]) -> Section | None:
    own = {name: run["bound"] for name, run in runs.items() if "bound" in run}
    if not own:
        return None
    first = next(iter(own.values()))
    least = first.get("least")
    known = f" No model can be below {least:.2f} nats a text." if least is not None else ""
    return Section(
        study=study,
        title="Bound on -log p",
        note=f"Nats on {first['count']} held-out texts of {first['tokens']:.0f} tokens; lower is better. For "
        f"autoregressive models it is -log p itself, for others an upper bound on it.{known}",
        head=["paradigm", "nats a token", "nats a text", *(["above the least"] if least is not None else [])],
        rows=[
            [name, number(b["token"]), number(b["text"], 2)]
            + ([] if least is None else [f"{b['text']['mean'] - least:.2f}"])
            for name, b in own.items()
        ],
    )


def _holes(study: str, runs: dict[str, Any]) -> Section | None:
    kinds = list(dict.fromkeys(kind for run in runs.values() for kind in run.get("holes", {})))
    if not kinds:
        return None
    rows = []
    for name, run in runs.items():
        own = run.get("holes", {})
        ways = {own[kind]["how"] for kind in own}
        cells = [percent(own[kind]["score"]) if kind in own else NOTHING for kind in kinds]
        rows.append([name, " and ".join(sorted(ways)) or NOTHING, *cells])
    count = next(run["holes"][kinds[0]]["count"] for run in runs.values() if run.get("holes"))
    return Section(
        study=study,
        title="Texts with a part missing",
        note=f"Share of {count} texts of each kind that hold, as the data's oracle says. Who is given what is left of "
        "the missing part alone writes that part from there, and what is behind it is set behind it.",
        head=["paradigm", "given", *kinds],
        rows=rows,
    )


def _ranked(study: str, runs: dict[str, Any]) -> Section | None:
    kinds = list(dict.fromkeys(kind for run in runs.values() for kind in run.get("ranked", {})))
    if not kinds:
        return None
    rows = []
    for name, run in runs.items():
        if own := run.get("ranked"):
            rows.append([name, *(percent(own[kind].get("score")) for kind in kinds)])
    told = next(run["ranked"][kinds[0]] for run in runs.values() if "how" in run.get("ranked", {}).get(kinds[0], {}))
    return Section(
        study=study,
        title="The same, chosen by how probable the whole text is",
        note=f"{told['count']} texts of each kind, {told['how']} fillings.",
        head=["paradigm", *kinds],
        rows=rows,
    )


def _free(study: str, runs: dict[str, Any]) -> Section | None:
    rows = [
        [name, percent(run["free"]["score"]), number(run["free"]["forwards"], 1), run["free"]["how"]]
        for name, run in runs.items()
        if "free" in run
    ]
    return Section(
        study=study,
        title="Texts drawn freely",
        note="At temperature 1; share in which everything fits together.",
        head=["paradigm", "hold", "calls a text", "variety, first seed"],
        rows=rows,
    )


def _suites(study: str, runs: dict[str, Any]) -> list[Section]:
    found = []
    for task in dict.fromkeys(task for run in runs.values() for task in run.get("suite", {})):
        own = {name: run["suite"][task] for name, run in runs.items() if task in run.get("suite", {})}
        first = next(iter(own.values()))
        kinds = list(first)
        rows = [
            [
                name,
                *(percent(kind["score"]) for kind in (scores[k] for k in kinds)),
                number(scores[kinds[0]]["forwards"], 1),
            ]
            for name, scores in own.items()
        ]
        if any(first[kind]["chance"] is not None for kind in kinds):
            guessed = [NOTHING if (c := first[k]["chance"]) is None else f"{100 * c:.1f} %" for k in kinds]
            rows.append(["guessing", *guessed, NOTHING])
        found.append(
            Section(
                study=study,
                title=f"Questions: {task}",
                note=f"{first[kinds[0]]['count']} questions of the test split, asked in a chat.",
                head=["paradigm", *kinds, "calls an answer"],
                rows=rows,
            )
        )
    return found


def _alone(study: str, runs: dict[str, Any]) -> Section | None:
    rows = [
        [name, number(run["alone"]["forwards"], 1), number(_thousand(run["alone"]["seconds"]), 1)]
        for name, run in runs.items()
        if "alone" in run
    ]
    kind = next((run["alone"].get("kind", "") for run in runs.values() if "alone" in run), "")
    return Section(
        study=study,
        title="Calls and time of an answer",
        note=f"One question at a time, one thread{f' ({kind})' if kind else ''}.",
        head=["paradigm", "model calls", "ms"],
        rows=rows,
    )


def _thousand(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v * 1e3 if isinstance(v, float) else v for k, v in value.items()}


def _curves(study: str, runs: dict[str, Any]) -> list[Section]:
    found = []
    for kind in dict.fromkeys(kind for run in runs.values() for kind in run["curves"]):
        drawn, rows = [], []
        for name, run in runs.items():
            points = run["curves"].get(kind, [])
            own = sorted(points, key=lambda p: p["forwards"]["mean"])
            drawn.append(Line(label=name, points=[(p["forwards"]["mean"], *_hundred(p["score"])) for p in own]))
            rows += [
                [
                    name,
                    _said(p["settings"]),
                    number(p["forwards"], 1),
                    number(_thousand(p["seconds"]), 1),
                    percent(p["score"]),
                ]
                for p in points
            ]
        found.append(
            Section(
                study=study,
                title=f"Quality against calls: {kind if kind != 'free' else 'texts drawn freely'}",
                note="Share that holds at each setting; time of one thread, questions asked together.",
                head=["paradigm", "setting", "calls an answer", "ms an answer", "hold"],
                rows=rows,
                picture=lines(drawn, across="model calls an answer", up="% that hold", log=True),
                name=f"{study}-{kind}".replace(" ", "-"),
            )
        )
    return found


def _hundred(value: dict[str, Any]) -> tuple[float, float | None, float | None]:
    low, high = (None if value[k] is None else 100 * value[k] for k in ("low", "high"))
    return 100 * value["mean"], low, high


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items()) or "as it is"


def _path(study: str, runs: dict[str, Any]) -> Section | None:
    """Validation over training: whether what is seen again and again still teaches."""
    own = {name: run["validation"] for name, run in runs.items() if len(run["validation"]) > 1}
    if not own:
        return None
    drawn = [
        Line(label=name, points=[(p["step"], p["mean"], p["low"], p["high"]) for p in path])
        for name, path in own.items()
    ]
    rows = []
    for name, path in own.items():
        best = min(path, key=lambda p: p["mean"])
        rows.append([name, number(best), f"{best['step']:,}", number(path[-1]), f"{path[-1]['step']:,}"])
    return Section(
        study=study,
        title="Held-out loss over training",
        note="Each by its own objective: what is not a bound in nats a token does not compare with what is. "
        "Dashed: the least that a bound can be, where it is known.",
        head=["paradigm", "lowest", "at step", "at the end", "step"],
        rows=rows,
        picture=lines(drawn, across="step", up="held-out loss", least=_least_a_token(runs)),
        name=f"{study}-loss",
    )


def _least_a_token(runs: dict[str, Any]) -> float | None:
    """Nats a token of the best possible model, where that is known."""
    known = [run["bound"] for run in runs.values() if run.get("bound", {}).get("least") is not None]
    return known[0]["least"] / known[0]["tokens"] if known else None
