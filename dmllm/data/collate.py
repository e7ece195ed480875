"""Examples -> one Batch: rows padded to one length, image slots counted over the batch's tiles.

Padding holds the pad id, no label, no slot, document PADDING and position 0. With `eos_padding="batch"` the fill is
instead end tokens that continue the row's last document, as LLaDA trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from dmllm.tiling import Resize
from dmllm.types import IGNORE, PADDING, TEXT, Batch, Example, SpecialTokens


def collate(
    examples: Sequence[Example],
    special: SpecialTokens,
    *,
    rows_per_tile: int = 0,
    pad_to_multiple: int = 1,
    side: Literal["right", "left"] = "right",
    eos_padding: Literal["none", "batch"] = "none",
    score_padding: bool = True,
) -> Batch:
    """The examples as one batch of length max(len), rounded up to `pad_to_multiple`.

    Args:
        rows_per_tile: rows of image features of one tile; needed when an example has images.
        eos_padding: "batch" fills rows with end tokens of their last document; only on the right.
        score_padding: whether those end tokens are labelled.

    Raises:
        ValueError: no examples, images without `rows_per_tile`, or end tokens on the left.
    """
    if not examples:
        raise ValueError("A batch needs at least one example.")
    if eos_padding == "batch" and side == "left":
        raise ValueError("eos_padding='batch' continues the last document, so it goes with side='right'.")
    if not rows_per_tile and any(example.pixel_values is not None for example in examples):
        raise ValueError("Examples with images need rows_per_tile, the rows of features that one tile yields.")
    shape = (len(examples), -(-max(map(len, examples)) // pad_to_multiple) * pad_to_multiple)
    input_ids = np.full(shape, special.pad)
    labels = np.full(shape, IGNORE)
    image_slots = np.full(shape, TEXT)
    documents = np.full(shape, PADDING)
    axes = (4,) if any(example.positions.ndim == 2 for example in examples) else ()
    positions = np.zeros((*axes, *shape), dtype=np.int64)
    tiles = 0
    resizes = []
    for row, example in enumerate(examples):
        n = len(example)
        at = slice(0, n) if side == "right" else slice(shape[1] - n, shape[1])
        input_ids[row, at] = example.input_ids.numpy()
        labels[row, at] = example.labels.numpy()
        documents[row, at] = example.documents.numpy()
        positions[..., row, at] = example.positions.numpy()
        if example.pixel_values is not None:
            slots = example.image_slots.numpy()
            image_slots[row, at] = np.where(slots >= 0, slots + tiles * rows_per_tile, slots)
            if example.image_resizes is not None:
                resizes.append(example.image_resizes + torch.tensor([tiles] + [0] * (len(Resize._fields) - 1)))
            tiles += example.pixel_values.shape[0]
        if eos_padding == "batch" and n < shape[1]:
            input_ids[row, n:] = special.eos
            labels[row, n:] = special.eos if score_padding else IGNORE
            documents[row, n:] = documents[row, n - 1]
            positions[..., row, n:] = positions[..., row, n - 1 : n] + 1 + np.arange(shape[1] - n)
    pixels = [example.pixel_values for example in examples if example.pixel_values is not None]
    grids = [example.image_grids for example in examples if example.image_grids is not None]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        image_slots=torch.from_numpy(image_slots),
        documents=torch.from_numpy(documents),
        positions=torch.from_numpy(positions),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_resizes=torch.cat(resizes) if resizes else None,
        image_grids=torch.cat(grids) if grids else None,
        indices=torch.tensor([example.index for example in examples], dtype=torch.int64),
    )
