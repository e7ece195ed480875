"""report.html, one file without scripts or outside resources, and the generated part of docs/paradigms.md."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import torch

from dmllm.config import to_dict
from dmllm.evaluation.comparison.config import CompareConfig
from dmllm.evaluation.comparison.summary import summarise
from dmllm.evaluation.comparison.tables import Section, sections
from dmllm.evaluation.results import git_revision, write_json

TEMPLATE = "comparison.html.jinja"
SUMMARY, REPORT = "summary.json", "report.html"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def write_report(results: Sequence[dict[str, Any]], config: CompareConfig, out: str | Path) -> Path:
    """summary.json and report.html in the folder `out`; the report's path."""
    out = Path(out)
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "git": git_revision(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    summary = {"about": about, "config": to_dict(config), "studies": summarise(results)}
    write_json(out / SUMMARY, summary)
    return write_page(json.loads((out / SUMMARY).read_text(encoding="utf-8")), out / REPORT)


def write_page(summary: dict[str, Any], path: Path) -> Path:
    """report.html of a summary."""
    found = sections(summary["studies"], summary["config"])
    studies = {name: [s for s in found if s.study == name] for name in summary["studies"]}
    loader = jinja2.PackageLoader("dmllm", "evaluation")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.get_template(TEMPLATE).render({**summary, "studies": studies})
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def markdown(summary: dict[str, Any], pictures: str | None = None) -> str:
    """All tables; `pictures` is the folder, seen from the page, where the pictures are."""
    found, study = [], None
    for section in sections(summary["studies"], summary["config"]):
        if section.study != study:
            study = section.study
            found.append(f"### Study: {study}\n")
        found.append(f"#### {section.title}\n\n{section.note}\n")
        if section.picture and pictures:
            found.append(f"![{section.title}]({pictures}/{section.name}.svg)\n")
        found.append(_table(section))
    about = summary["about"]
    found.append(f"Measured {about['date']} with torch {about['torch']}, code {(about['git'] or 'unknown')[:12]}.\n")
    return "\n".join(found)


def _table(section: Section) -> str:
    rows = [section.head, ["---"] + ["---:"] * (len(section.head) - 1), *section.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def write_into(page: str | Path, summary: str | Path) -> None:
    """Put the tables of a summary.json between the markers of a Markdown page, and the pictures into a folder of its
    name beside it.

    Raises ValueError where the page has no markers.
    """
    page, found = Path(page), json.loads(Path(summary).read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no place for results: put the lines {BEGIN} and {END} into it.")
    folder = page.with_suffix("")
    for section in sections(found["studies"], found["config"]):
        if section.picture:
            folder.mkdir(exist_ok=True)
            (folder / f"{section.name}.svg").write_text(str(section.picture), encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(found, folder.name)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
