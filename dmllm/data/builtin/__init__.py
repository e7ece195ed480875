"""Built-in data sets: pictures or texts, questions and exact truth, made in minutes on any machine, no download.

    make("scenes", "data/scenes", num=10_000)

writes `data.json` (LLaVA's format), `images/` (`stories` has none) and `truth.jsonl`, so that training and evaluation
see exactly what they would see of a user's data. The same arguments give the same bytes. `chance` says what guessing
would score.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

from dmllm.data.builtin.baseline import majority_baseline
from dmllm.data.builtin.picture import SPLITS, Dataset
from dmllm.data.builtin.writing import Job, write

__all__ = ["NAMES", "chance", "describe", "majority_baseline", "make"]

# Each module has a DATASET; it is imported on use because `digits` needs scikit-learn.
NAMES = {
    "scenes": "dmllm.data.builtin.scenes",
    "digits": "dmllm.data.builtin.digits",
    "stories": "dmllm.data.builtin.stories",
}
# Pictures from which `chance` is measured.
CHANCE_PICTURES = 4000


def make(
    name: str,
    out: str | Path,
    *,
    num: int,
    split: str = "train",
    seed: int = 0,
    size: int = 64,
    workers: int | None = None,
    **options: Any,
) -> Path:
    """Write `num` pictures of the data set `name` to the folder `out` and return it.

    `size` is the pictures' width and height in pixels, `workers` the number of processes (all cores if None; no
    influence on the bytes). Options: `turns` (questions a picture), and for scenes `reading` and `large_print` (shares
    of pictures with lines of text and with a few large characters) and `kinds`, which `stories` has too. Splits are
    disjoint. A folder made with the same arguments is returned as it is.

    Raises ValueError for arguments that are not allowed and FileExistsError if `out` holds anything else.
    """
    return write(_job(name, num=num, split=split, seed=seed, size=size, options=options), Path(out), workers=workers)


def describe(name: str) -> str:
    """What the data set shows and what is asked."""
    dataset = _load(name)
    return f"{dataset.description} Kinds of questions: {', '.join(dataset.kinds)}."


@functools.cache
def _measured_chance(name: str) -> dict[str, float]:
    job = _job(name, num=CHANCE_PICTURES, split="train", seed=0, size=64, options={})
    records = (job.record(index, job.picture(index)) for index in range(job.num))
    return majority_baseline(record for record in records if "image" in record)


def chance(name: str) -> dict[str, float]:
    """For each kind of question about a picture, the accuracy of guessing from its wording alone (see
    `majority_baseline`); nothing for `stories`, of which the wording is all there is."""
    return dict(_measured_chance(name))


def _load(name: str) -> Dataset:
    if name not in NAMES:
        raise ValueError(f"{name!r} is not a built-in data set; known are: {', '.join(NAMES)}.")
    return importlib.import_module(NAMES[name]).DATASET


def _job(name: str, *, num: int, split: str, seed: int, size: int, options: dict[str, Any]) -> Job:
    dataset = _load(name)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    if num < 1:
        raise ValueError(f"num={num}: at least one picture has to be made; try num=1000.")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; seeds are 0, 1, 2, ...")
    if size < 32 or size % 8:
        raise ValueError(f"size={size} is not a multiple of 8 of at least 32 pixels; try size=64.")
    allowed = list(dataset.options.__dataclass_fields__)
    if unknown := [option for option in options if option not in allowed]:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its options are: {', '.join(allowed)}.")
    return Job(
        name=name, dataset=dataset, split=split, seed=seed, size=size, num=num, options=dataset.options(**options)
    )
