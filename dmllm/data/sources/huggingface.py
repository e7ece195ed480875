"""Hugging Face data sets as rows: a folder written by save_to_disk, or a name on the hub (extra: datasets).

Image columns are handed over as stored (bytes or path) and decoded by dmllm.data.images, like every other image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class DatasetRows:
    """The rows of one split."""

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[int(index)]

    def location(self, index: int) -> str:
        return f"{self.name}: row {index}"

    def folder(self, index: int) -> Path:
        return Path(self.name) if Path(self.name).is_dir() else Path()


def is_saved_dataset(path: Path) -> bool:
    """Whether the folder was written by datasets' save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def open_dataset(name: str | Path, split: str, subset: str | None) -> DatasetRows:
    """A split of a saved data set or of one on the hub.

    Raises:
        ValueError: the extra is not installed, or there is no such data set or split.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: Hugging Face data sets need an extra: pip install 'dmllm[datasets]'") from None
    try:
        if isinstance(name, Path) or is_saved_dataset(Path(name)):
            loaded = datasets.load_from_disk(str(name))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise ValueError(f"there is no split {split!r}; it has {', '.join(map(str, loaded))}.")
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub's errors have no common base
        raise ValueError(f"data set {name}: {error}") from None
    for column, feature in loaded.features.items():
        if (stored := _undecoded(datasets, feature)) is not None:
            loaded = loaded.cast_column(column, stored)
    return DatasetRows(loaded, str(name))


def _undecoded(datasets: Any, feature: Any) -> Any:
    """The feature with its images left as bytes or path; None where there are none to leave."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Image):
        return type(feature)(datasets.Image(decode=False))
    return None
