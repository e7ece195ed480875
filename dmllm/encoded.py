"""Pictures that are encoded once: within a batch, and for later calls and turns as long as there is room.

Features are known by what they depend on: the picture's pixels, and the model's weights as they are, so that training
never meets stale ones. They are kept where they were computed, the longest unused ones leaving first.

Shapes: T tiles or N pictures of a batch, D features.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from dmllm.models.projectors import resize_maps
from dmllm.requests import fingerprint
from dmllm.types import Batch

ROOM = 256 * 2**20  # bytes


class EncodedImages:
    """`images(model, batch)`: the features of a batch's pictures, those of earlier calls among them.

    Args:
        room: bytes of features that are kept for later calls; 0 keeps none.
    """

    def __init__(self, room: int = ROOM):
        if type(room) is not int or room < 0:
            raise ValueError(f"image_room={room!r} must be a whole number of bytes; 0 keeps no encoded pictures.")
        self.room = room
        self.hits = self.misses = 0  # distinct tiles, or pictures of native size
        self.bytes = 0
        self._weights: Any = None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, model: Any, batch: Batch) -> Tensor | None:
        """The features [T * rows, D], each distinct tile (or picture of native size) encoded once; None without."""
        if batch.pixel_values is None:
            return None
        grids = batch.image_grids
        if grids is None:
            pictures = list(batch.pixel_values)
            keys = [fingerprint(tile) for tile in pictures]
        else:
            pictures = list(batch.pixel_values.split(grids.prod(1).tolist()))
            keys = [fingerprint(picture, grid) for picture, grid in zip(pictures, grids, strict=True)]
        weights = weights_of(model) if self.room else None
        found = self._look_up(weights, list(dict.fromkeys(keys)))
        if missing := [keys.index(key) for key in dict.fromkeys(keys) if key not in found]:
            some = None if grids is None else grids[missing]
            encoded = _encode(model, [pictures[i] for i in missing], some)
            new = {keys[i]: features for i, features in zip(missing, encoded, strict=True)}
            found.update(new)
            self._keep(weights, new)
        features = torch.cat([found[key] for key in keys])
        return features if batch.image_resizes is None else resize_maps(features, batch.image_resizes, model.image_grid)

    def clear(self) -> None:
        """Forgets all pictures."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def _look_up(self, weights: Any, keys: list[str]) -> dict[str, Tensor]:
        if weights is None:
            return {}
        if weights != self._weights:
            self.clear()
            self._weights = weights
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            self.hits, self.misses = self.hits + len(found), self.misses + len(keys) - len(found)
        return found

    def _keep(self, weights: Any, new: dict[str, Tensor]) -> None:
        if weights is None:
            return
        with self._lock:
            for key, features in new.items():
                if features.nbytes > self.room or key in self._kept:
                    continue
                self._kept[key] = features.clone()  # not the whole batch's memory
                self.bytes += features.nbytes
            while self.bytes > self.room:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes


def weights_of(model: Any) -> Any:
    """What tells the model's weights from others and from themselves before they were changed; None where that cannot
    be told: in training mode, and for weights that are no plain tensors (sharded, quantised).

    A change behind autograd's back, through `.data` in the same memory, is not seen: `clear` after it.
    """
    if not isinstance(model, nn.Module) or model.training:
        return None
    tensors = [*model.parameters(), *model.buffers()]
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return None
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors)


def _encode(model: Any, pictures: list[Tensor], grids: Tensor | None) -> list[Tensor]:
    """The features of each tile, or of each picture of native size."""
    if grids is None:
        features = model.encode_images(torch.stack(pictures).to(model.device))
        return list(features.view(len(pictures), -1, features.shape[-1]))
    pixels = torch.cat(pictures).to(model.device)
    return list(model.encode_images(pixels, image_grids=grids).split(grids.prod(1).tolist()))
