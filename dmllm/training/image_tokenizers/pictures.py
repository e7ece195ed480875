"""The pictures that a tokenizer learns from and is measured on: files of a folder, or of a built-in data set.

Which picture is example number n, where it is cut and whether it is mirrored follow from (seed, n) alone, so that a
stopped run goes on with what it would have seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmllm.data.builtin import NAMES, make
from dmllm.data.crops import crop
from dmllm.data.images import load_image
from dmllm.training.image_tokenizers.config import PicturesConfig

LOG = logging.getLogger("dmllm.training")
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
ATTEMPTS = 16  # pictures tried in the place of one that cannot be read


def find_pictures(config: PicturesConfig, folder: Path) -> tuple[list[Path], list[Path]]:
    """(files to learn from, files to measure on); a built-in data set is made below `folder`.

    Raises:
        ValueError: there are no pictures, or too few to hold some out.
    """
    if config.path in NAMES and not Path(config.path).is_dir():
        height, width = config.sides
        made = [
            make(config.path, folder / split, num=num, split=split, size=max(height, width), **config.options)
            for split, num in (("train", config.num), ("val", config.held_out))
        ]
        learn, measured = (_files(path) for path in made)
        return learn, measured
    if not Path(config.path).is_dir():
        raise ValueError(
            f"data.path={config.path!r} is neither a folder, seen from {Path.cwd()}, nor a built-in data set: "
            f"{', '.join(NAMES)}."
        )
    files = _files(Path(config.path))
    held_out = min(config.held_out, max(len(files) // 10, 1))
    if len(files) < 2:
        raise ValueError(f"{config.path} holds {len(files)} pictures; at least 2 are needed, one to measure on.")
    order = np.random.default_rng(0).permutation(len(files)).tolist()
    chosen = set(order[:held_out])
    return [f for i, f in enumerate(files) if i not in chosen], [files[i] for i in sorted(chosen)]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)


class Examples(Dataset):
    """Example number n, of as many as are asked for: uint8 [3, H, W]."""

    def __init__(self, files: list[Path], config: PicturesConfig, seed: int):
        self.files, self.config, self.seed = files, config, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, n: int) -> Tensor:
        """A picture that cannot be read is said to be, and another is taken."""
        for attempt in range(ATTEMPTS):
            try:
                image = load_image(self.files[self._place(n + attempt)])
            except ValueError as error:
                LOG.warning("%s Another is taken.", error)
                continue
            if not self.config.augment:
                return crop(image, self.config.sides)
            draws = np.random.default_rng([self.seed, 1, n]).random(3)
            pixels = crop(image, self.config.sides, at=(draws[0], draws[1]))
            return pixels.flip(-1) if draws[2] < 0.5 else pixels
        raise ValueError(f"{ATTEMPTS} pictures one after another cannot be read; see the warnings above.")

    def _place(self, n: int) -> int:
        epoch, place = divmod(n, len(self.files))
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.files))
            self._order = epoch, order.tolist()
        return self._order[1][place]


def training_batches(
    files: list[Path], config: PicturesConfig, *, seed: int, batch_size: int, start: int, steps: int, num_workers: int
) -> Iterator[Tensor]:
    """uint8 [batch_size, 3, H, W] for each step from `start` on."""
    numbers = range(start * batch_size, steps * batch_size)
    loader = DataLoader(
        Examples(files, config, seed),
        batch_size=batch_size,
        sampler=numbers,
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one is not touched
    )
    return iter(loader)


def held_out_batches(files: list[Path], config: PicturesConfig, batch_size: int) -> Iterator[Tensor]:
    """All of them, in their order, cut in the middle."""
    for first in range(0, len(files), batch_size):
        some = files[first : first + batch_size]
        yield torch.stack([crop(load_image(file), config.sides) for file in some])
