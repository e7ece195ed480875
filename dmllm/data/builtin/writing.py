"""Writing a built-in data set as LLaVA JSON and PNG files, exactly what a user's own data looks like.

    OUT/data.json        a JSON list, one record a picture
    OUT/images/000/*.png a thousand pictures a folder; none where there is nothing to see
    OUT/truth.jsonl      the exact content of every picture
    OUT/made.json        the arguments, by which a finished folder is recognised

The folder appears all at once, when it is complete. Workers share nothing but the arguments, and each picture has its
own generator: any number of them writes the same bytes.
"""

import functools
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmllm.data.builtin.drawing import png
from dmllm.data.builtin.picture import Dataset, Picture, keyed_generator

# Raised whenever the same arguments begin to give other pictures.
VERSION = 2
PICTURES_A_FOLDER = 1000
PICTURES_A_CHUNK = 100


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the bytes of a data set."""

    name: str
    dataset: Dataset
    split: str
    seed: int
    size: int
    num: int
    options: Any

    def picture(self, index: int) -> Picture:
        """Picture number `index`."""
        rng = keyed_generator(self.name, self.split, self.seed, index)
        return self.dataset.compose(rng, self.split, self.size, self.options)

    def record(self, index: int, picture: Picture) -> dict[str, Any]:
        """The picture's questions and answers as a LLaVA record; each question carries its kind."""
        turns = []
        for turn in picture.turns:
            marker = "" if turns or picture.paint is None else "<image>\n"
            turns.append({"from": "human", "value": marker + turn.question, "kind": turn.kind})
            turns.append({"from": "gpt", "value": turn.answer})
        shown = {} if picture.paint is None else {"image": image_path(index)}
        return {"id": self.identity(index), **shown, "conversations": turns}

    def identity(self, index: int) -> str:
        return f"{self.name}-{self.split}-{self.seed}-{index:06d}"

    def made(self) -> dict[str, Any]:
        """The arguments as they are written to made.json."""
        return {
            "name": self.name,
            "split": self.split,
            "seed": self.seed,
            "size": self.size,
            "num": self.num,
            "options": json.loads(json.dumps(asdict(self.options))),  # tuples as the file will hold them
            "version": VERSION,
        }


def image_path(index: int) -> str:
    return f"images/{index // PICTURES_A_FOLDER:03d}/{index:06d}.png"


def write(job: Job, out: Path, *, workers: int | None) -> Path:
    """Write the data set to `out` unless it is there already; see `dmllm.data.builtin.make`."""
    if _is_made(job, out):
        return out
    chunks = [range(start, min(start + PICTURES_A_CHUNK, job.num)) for start in range(0, job.num, PICTURES_A_CHUNK)]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    with _appearing(out) as folder:
        with (
            _mapped(functools.partial(_write_chunk, job, folder), chunks, workers) as written,
            (folder / "data.json").open("w", encoding="utf-8") as data,
            (folder / "truth.jsonl").open("w", encoding="utf-8") as truth,
        ):
            separator = "[\n"
            for records, truths in written:
                data.write(separator + records)
                truth.write(truths)
                separator = ",\n"
            data.write("\n]\n")
        (folder / "made.json").write_text(json.dumps(job.made(), indent=2) + "\n", encoding="utf-8")
    return out


def _write_chunk(job: Job, folder: Path, chunk: range) -> tuple[str, str]:
    """Paint the chunk's pictures; return its part of data.json and of truth.jsonl."""
    records, truths = [], []
    for index in chunk:
        picture = job.picture(index)
        if picture.paint is not None:
            path = folder / image_path(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(picture.paint()))
        records.append(json.dumps(job.record(index, picture)))
        truths.append(json.dumps({"id": job.identity(index)} | picture.truth) + "\n")
    return ",\n".join(records), "".join(truths)


@contextmanager
def _mapped(function: Any, chunks: list[range], workers: int) -> Iterator[Iterator[tuple[str, str]]]:
    """The function's results in order, from this process or from several."""
    if workers == 1:
        yield map(function, chunks)
        return
    with multiprocessing.Pool(workers) as pool:
        yield pool.imap(function, chunks)


def _is_made(job: Job, out: Path) -> bool:
    """Whether `out` holds exactly this data set. Raises FileExistsError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    made = out / "made.json"
    if not made.is_file():
        raise FileExistsError(f"{out} exists and is not a data set made here; name a new or an empty folder.")
    there = json.loads(made.read_text(encoding="utf-8"))
    if there != job.made():
        wanted = job.made()
        differ = [f"{key}={there.get(key)!r}, not {wanted[key]!r}" for key in wanted if there.get(key) != wanted[key]]
        raise FileExistsError(
            f"{out} was made with other arguments ({'; '.join(differ)}); name another folder or delete this one."
        )
    return True


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if all goes well and vanishes if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    try:
        yield folder
        if out.exists():  # empty, or it would have been refused
            out.rmdir()
        folder.replace(out)
    finally:
        if folder.exists():
            shutil.rmtree(folder)
