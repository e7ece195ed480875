"""All jobs of a comparison: several processes of one thread each, finished ones are not done again."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dmllm.evaluation.comparison.config import CompareConfig
from dmllm.evaluation.comparison.job import Job, prepare, run

LOG = logging.getLogger("dmllm.evaluation.comparison")


def jobs_of(config: CompareConfig, out: Path) -> list[Job]:
    """Every study, paradigm and seed; those that start from another's model behind it."""
    jobs = [
        Job(config=config, study=study, paradigm=paradigm, seed=seed, out=out)
        for study in config.studies
        for seed in config.seeds_of(study)
        for paradigm in config.of(study)
    ]
    for study in config.studies:
        names = [p.name for p in config.of(study)]
        if missing := [p.start for p in config.of(study) if p.start is not None and p.start not in names]:
            raise ValueError(f"study {study.name}: {missing[0]!r}, from which another starts, is not in it.")
    return sorted(jobs, key=lambda job: _depth(config, job.paradigm.name))


def _depth(config: CompareConfig, name: str) -> int:
    """How many models are trained before this one's."""
    start = next(p.start for p in config.paradigms if p.name == name)
    return 0 if start is None else 1 + _depth(config, start)


def compare(config: CompareConfig, out: str | Path) -> list[dict[str, Any]]:
    """Run what has not been run, and return the results of all jobs.

    Raises:
        ValueError: a configuration does not fit; the message says which.
    """
    jobs = jobs_of(config, Path(out))
    for job in jobs:
        prepare(job)
    found = {job.folder: results for job in jobs if (results := job.results()) is not None}
    left = [job for job in jobs if job.folder not in found]
    LOG.info("%s: %d of %d runs are there already", out, len(found), len(jobs))
    start = time.monotonic()
    for depth in sorted({_depth(config, job.paradigm.name) for job in left}):
        wave = [job for job in left if _depth(config, job.paradigm.name) == depth]
        for job, results in _done(wave, config.processes):
            found[job.folder] = results
            said = results["training"]["seconds"], results["seconds"], time.monotonic() - start
            LOG.info("%s: trained in %.0f s, measured in %.0f s; %.0f s in all", job.name, *said)
    return [found[job.folder] for job in jobs]


def _done(jobs: list[Job], processes: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """(job, results) as they come."""
    if processes == 1 or len(jobs) == 1:
        yield from map(_named, jobs)
        return
    context = multiprocessing.get_context("spawn")
    # An executor's processes may have children of their own, with which data sets are made; a pool's may not.
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context, max_tasks_per_child=1) as executor:
        running = [executor.submit(_named, job) for job in jobs]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            for future in running:
                future.cancel()


def _named(job: Job) -> tuple[Job, dict[str, Any]]:
    try:
        return job, run(job)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        told = (
            f" For another comparison give another --out, or delete {job.folder}."
            if "holds a run" in str(error)
            else ""
        )
        raise ValueError(f"{job.name}: {error}{told}") from None
