"""Names of the Hugging Face hub -> folders on disk: an existing folder, else the local cache, else a download.

The cache is asked first, so that a cached name never waits for a network; where there is neither, the error says which
file was wanted and what to type to get it.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError


def fetch(name: str, need: tuple[str, ...], *, also: tuple[str, ...] = (), revision: str | None = None) -> Path:
    """The folder that holds `name`.

    Args:
        name: a folder, or a hub name such as "google/siglip2-base-patch16-224".
        need: what must be there, each a file name, a pattern, or alternatives joined by "|", the preferred one first.
        also: patterns of files that come along when the name is downloaded.
        revision: branch, tag or commit of a hub name; None is what the cache calls main.

    Raises:
        FileNotFoundError: a wanted file is not to be had; the message names it and the command that gets it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if missing := _missing(folder, need):
            raise FileNotFoundError(f"The folder {name} has no {' and no '.join(missing)}.{pickle_advice(folder)}")
        return folder
    if folder.is_absolute() or name.startswith(("./", "../", "~")):
        raise FileNotFoundError(f"There is no folder {name}; the working directory is {Path.cwd()}.")
    patterns = [pattern for entry in need for pattern in entry.split("|")] + list(also)
    reason = ""
    for local in (True, False):
        try:
            cached = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local)
        except (OSError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            continue
        if not _missing(Path(cached), need):
            return Path(cached)
        reason = f"it has no {' and no '.join(_missing(Path(cached), need))}"
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    raise FileNotFoundError(
        f"{name!r} is neither a folder nor complete in the Hugging Face cache ({constants.HF_HUB_CACHE}), and it could "
        f"not be downloaded ({reason}). Wanted: {', '.join(need).replace('|', ' or ')}. Where there is a network, type:"
        f"  {command}  (then copy that cache here), or give a folder."
    )


def pickle_advice(folder: Path) -> str:
    """What to do about weights that come as pickles only; nothing where there are none."""
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if not pickles:
        return ""
    return (
        f" It has {pickles[0]}: a pickle can run code when it is read, so it is not; let its publisher, or "
        "transformers on a machine that trusts it, save it as safetensors (save_pretrained)."
    )


def find(folder: Path, entry: str) -> Path | None:
    """The first file in `folder` that matches one of the alternatives in `entry`, in their order."""
    names = sorted(path.name for path in folder.iterdir())
    matches = (name for pattern in entry.split("|") for name in names if fnmatch(name, pattern))
    return next((folder / name for name in matches), None)


def _missing(folder: Path, need: tuple[str, ...]) -> list[str]:
    """What of `need` is not there; an index of shards needs its shards."""
    missing = []
    for entry in need:
        found = find(folder, entry)
        if found is None:
            missing.append(entry.replace("|", " or "))
        elif found.name.endswith(".index.json"):
            shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
            missing += [shard for shard in shards if not (folder / shard).is_file()]
    return missing
