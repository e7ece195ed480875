"""One paradigm, one study, one seed: trained, then measured. A folder holds

train.yaml      what `dmllm train` repeats
run/            the training run, its model in run/model
suite/          the answers to the study's suite, if it has one
results.json    what was measured, and the settings that it depends on
log.txt         what the run said
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dmllm.checkpoints.tokenizer import train_tokenizer
from dmllm.config import load_config, to_dict
from dmllm.data.builtin import make, stories
from dmllm.evaluation.comparison.bound import nats
from dmllm.evaluation.comparison.config import BuiltinData, CompareConfig, Paradigm, Study, merge
from dmllm.evaluation.comparison.texts import Answered, Hole, choose, draw_freely, fill, read_holes
from dmllm.evaluation.config import SuiteConfig
from dmllm.evaluation.results import RESULTS, write_json
from dmllm.evaluation.runner import evaluate
from dmllm.pipeline import Pipeline, load
from dmllm.training.config import TrainConfig
from dmllm.training.logging import read_metrics
from dmllm.training.loop import train

FREE = "free"  # the curve of texts that are drawn freely
TIME = "time.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done in one process."""

    config: CompareConfig
    study: Study
    paradigm: Paradigm
    seed: int
    out: Path  # of the comparison

    @property
    def folder(self) -> Path:
        """Of this job alone."""
        return self.out / self.study.name / f"{re.sub(r'[^a-z0-9]+', '-', self.paradigm.name.lower())}-{self.seed}"

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.study.name}/{self.paradigm.name}, seed {self.seed}"

    @property
    def tokenizer(self) -> Path:
        """The study's."""
        return self.out / self.study.name / "tokenizer"

    @property
    def tokens(self) -> dict[str, Any]:
        """How its tokenizer is made."""
        return {**self.config.tokenizer, **self.study.tokenizer}

    def made(self, data: BuiltinData, split: str) -> Path:
        """The folder of a data set."""
        digest = hashlib.blake2b(json.dumps(data.options, sort_keys=True).encode(), digest_size=4).hexdigest()
        return self.out / "data" / f"{data.builtin}-{split}-{data.num}-{data.seed}-{digest}"

    def recipe(self) -> dict[str, Any]:
        """The training configuration, as YAML has it."""
        study, paradigm = self.study, self.paradigm
        entries = [
            {"json_path": str(self.made(one, "train") / "data.json"), "name": one.builtin, "weight": one.weight}
            for one in study.data
        ]
        held_out = {"json_path": str(self.made(study.held_out, "val") / "data.json")}
        own: dict[str, Any] = {
            "output_dir": str(self.folder / "run"),
            "model": {"tokenizer": str(self.tokenizer), **paradigm.model},
            "data": {"datasets": entries},
            "validation": {"data": {"datasets": [held_out]}},
            "objective": {"name": paradigm.objective, "options": paradigm.options},
            "seed": self.seed,
        }
        values = merge(merge(merge(self.config.train, study.train), own), paradigm.train)
        if paradigm.start is not None:
            start = replace(self, paradigm=next(p for p in self.config.paradigms if p.name == paradigm.start))
            kept = {k: v for k, v in values["model"].items() if k in ("processor", "generation")}
            values["model"] = {**kept, **paradigm.model, "checkpoint": str(start.folder / "run" / "model")}
        return values

    def settings(self) -> dict[str, Any]:
        """What the results depend on."""
        own = {"study": self.study, "paradigm": self.paradigm, "train": self.recipe(), "tokens": self.tokens}
        return json.loads(json.dumps(to_dict(own)))

    def results(self) -> dict[str, Any] | None:
        """What has been measured under these settings; None if nothing has."""
        path = self.folder / RESULTS
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found if found.get("settings") == self.settings() else None


def prepare(job: Job) -> None:
    """Make the data sets and the tokenizer of a job, where they are not there yet."""
    study, sets = job.study, []
    sets += [(one, "train") for one in study.data]
    sets += [(study.held_out, "val"), *([(study.test, "test")] if study.test else [])]
    for data, split in sets:
        make(data.builtin, job.made(data, split), num=data.num, split=split, seed=data.seed, **data.options)
    if not (job.tokenizer / "tokenizer.json").is_file():
        texts = [job.made(one, "train") / "data.json" for one in study.data]
        train_tokenizer(texts, out=job.tokenizer, **job.tokens)


def run(job: Job) -> dict[str, Any]:
    """Do a job, with one thread; what was done of it before is not done again."""
    if (found := job.results()) is not None:
        return found
    torch.set_num_threads(1)
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        recipe = job.folder / "train.yaml"
        recipe.write_text(yaml.safe_dump(job.recipe(), sort_keys=False), encoding="utf-8")
        trained = _train(load_config(TrainConfig, recipe), job.folder)
        pipeline = load(str(job.folder / "run" / "model"), device="cpu", image_room=0, prompt_room=0)
        start = time.process_time()
        measured = measure(job, pipeline)
        found = {
            "study": job.study.name,
            "paradigm": job.paradigm.name,
            "seed": job.seed,
            "training": trained,
            "parameters": sum(p.numel() for p in pipeline.model.parameters()),
            **measured,
            "seconds": time.process_time() - start,
            "settings": job.settings(),
        }
        write_json(job.folder / RESULTS, found)
    return found


def _train(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train to the end, and what that took. Raises KeyboardInterrupt where it was stopped."""
    taken = json.loads((folder / TIME).read_text(encoding="utf-8")) if (folder / TIME).is_file() else 0.0
    start = time.process_time()
    result = train(config)
    if not (folder / "run" / "done").is_file():
        taken += time.process_time() - start
    write_json(folder / TIME, taken)
    if result.model is None:
        raise KeyboardInterrupt(f"{folder} was stopped after step {result.step}")
    (folder / "run" / "done").touch()
    lines = read_metrics(result.folder / "metrics.jsonl")
    return {
        "steps": result.step,
        "examples": result.step * config.batch_size,
        "seconds": taken,
        "loss": [[line["step"], line["loss"]] for line in lines if "loss" in line],
        "validation": [[line["step"], line["validation_loss"]] for line in lines if "validation_loss" in line],
    }


def measure(job: Job, pipeline: Pipeline) -> dict[str, Any]:
    """All that the study asks about, of a trained model."""
    study, paradigm, found = job.study, job.paradigm, {}
    size = job.config.batch_size
    holes: dict[str, list[Hole]] = {}
    if study.test is not None:
        made = job.made(study.test, "test")
        holes = {kind: read_holes(made, kind, study.questions) for kind in study.holes}
    found["holes"] = {
        kind: fill(pipeline, own, paradigm.decode, size, paradigm.hole).row() for kind, own in holes.items()
    }
    if study.ranked and paradigm.bound is not None:
        found["ranked"] = {kind: _ranked(pipeline, own[: study.ranked], study) for kind, own in holes.items()}
    freely = {**paradigm.decode, **paradigm.free}
    if study.free:
        found["free"] = draw_freely(pipeline, "story", study.free, study.length, freely, size)[0].row()
    if study.bound and paradigm.bound is not None:
        options = merge(paradigm.options, paradigm.bound)
        data = str(job.made(study.held_out, "val") / "data.json")
        found["bound"] = nats(pipeline, paradigm.objective, options, data, study.bound, study.bound_draws, size)
        if study.held_out.builtin == "stories" and list(study.held_out.options.get("kinds", ())) == ["story"]:
            found["bound"]["least"] = stories.entropy()
    if study.suite:
        suite = SuiteConfig(tasks=study.suite, decode=paradigm.decode, batch_size=size)
        asked = evaluate(pipeline, suite, job.folder / "suite", model_name=job.name).summary["tasks"]
        found["suite"] = {name: _scores(task) for name, task in asked.items()}
    found["curves"] = {kind: _curve(job, pipeline, kind, holes) for kind in study.curves}
    if study.timed:
        kind = study.holes[0]
        found["alone"] = fill(pipeline, holes[kind][: study.timed], paradigm.decode, 1, paradigm.hole).row() | {
            "kind": kind
        }
    return found


def _ranked(pipeline: Pipeline, holes: list[Hole], study: Study) -> dict[str, Any]:
    """Of a model that says no probabilities of texts, what it says instead."""
    try:
        return choose(pipeline, holes, study.rank_samples).row()
    except ValueError as error:
        return {"refused": str(error)}


def _scores(task: dict[str, Any]) -> dict[str, Any]:
    """The rows of a task of the suite by kind."""
    kept = ("value", "count", "forwards", "chance")
    return {row["kind"]: {key: row[key] for key in kept} for row in task["scores"]}


def _curve(job: Job, pipeline: Pipeline, kind: str, holes: dict[str, list[Hole]]) -> list[dict[str, Any]]:
    """Quality and calls at each setting of the paradigm."""
    study, paradigm, size, points = job.study, job.paradigm, job.config.batch_size, []
    for settings in paradigm.curve or [{}]:
        if kind == FREE:
            decode = {**paradigm.decode, **paradigm.free, **settings}
            point: Answered = draw_freely(pipeline, "story", study.free, study.length, decode, size)[0]
        else:
            point = fill(pipeline, holes[kind], {**paradigm.decode, **settings}, size, paradigm.hole)
        points.append({"settings": settings, **point.row()})
    return points
