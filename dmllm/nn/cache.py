"""Keys and values of rows that need not be computed again, as an object passed to the backbone.

Every row of the stream has a place. A forward writes the rows it is fed into theirs, and they see what stands in all
of them: their own keys and those of earlier calls. Whether that changes the result is for the caller to say (`exact`):
it does not where what is kept cannot see what is fed. The rows in place keep their rank, stream and document, so that
the visibility rule alone decides who sees them.

Shapes: B rows of the batch, L rows fed, S places, K rows asked for, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmllm.nn.fused import place, rotate_both, write
from dmllm.nn.visibility import Visibility
from dmllm.types import PADDING

EMPTY = {"document": PADDING, "positions": -1}  # what is kept by these names where nothing stands; 0 by others


class KVCache:
    """Per-layer keys and values [B, heads, S, head_dim], allocated once and written in place.

    Args:
        size: S. What is to be kept nowhere has the place S.
        exact: whether the rows to come are as they would be with everything fed anew.
    """

    def __init__(self, size: int, *, exact: bool = True) -> None:
        self.size, self.exact = size, exact
        self.plan: dict[str, Any] = {}  # what follows from the places alone: the mask, rotary tables
        self.graphs: dict[Any, Any] = {}  # calls captured on these buffers, by their shapes
        self.owner: Any = None  # whom it goes back to when its request has ended
        self._places: Tensor | None = None
        self._run: slice | None = None  # the places, where they are the same run in every row
        self._reach = 0  # places in use
        self._rows: Tensor | None = None
        self._kept: dict[str, Tensor] = {}  # by name: [B, S + 1], [B, S + 1, D]
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def length(self) -> int:
        """Places in use, from the first on."""
        return self._reach

    def clear(self) -> None:
        """Nothing is in place, for another request of the same size; buffers stay where they are."""
        self._places, self._rows, self._run, self._reach, self.plan = None, None, None, 0, {}
        if "document" in self._kept:
            self._kept["document"].fill_(PADDING)
            self._kept["rank"].zero_()

    def put(self, places: Tensor, rows: Tensor | None = None) -> None:
        """Where the next forwards write: `places` [B, L] int64; of the batch rows `rows` [B] alone, if given.

        Given the same tensors again, what was derived from them is kept.
        """
        if places is self._places and rows is self._rows:
            return
        self._places, self._rows, self.plan, self._run = places, rows, {}, None
        if not places.numel():
            return
        if places.device.type != "cpu":
            self._reach = self.size
            return
        first, last = int(places[0, 0]), int(places[0, -1])
        if last < self.size and bool((places == torch.arange(first, first + places.shape[1])).all()):
            self._run = slice(first, last + 1)
        self._reach = max(self._reach, int(places.masked_fill(places == self.size, -1).max()) + 1)

    def keys(self, visibility: Visibility) -> tuple[Visibility, Tensor]:
        """The rule for all places in use once the rows of `visibility` [B, L] stand in theirs, and these places."""
        rank, canvas, document = (
            self._write(name, getattr(visibility, name)) for name in ("rank", "canvas", "document")
        )
        return Visibility(rank, canvas, document), self._at(visibility.rank)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps a layer's new keys and values [B, heads, L, head_dim]; returns those of all places in use."""
        batch = self._batch(keys)
        for kept, new in ((self._keys, keys), (self._values, values)):
            self._of_layer(kept, layer, new, batch)
        return self._exchange(self._keys[layer], keys), self._exchange(self._values[layer], values)

    def place(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turns queries and keys [B, heads, L, head_dim] by their positions; then as `extend`."""
        if self._rows is None and self._places is not None and q.device.type != "cpu" and len(self._keys) > layer:
            kept = self._keys[layer], self._values[layer]
            if (turned := place(q, k, v, rotary, *kept, self._places)) is not None:
                return turned, kept[0][:, :, : self._reach], kept[1][:, :, : self._reach]
        q, k = rotate_both(q, k, *rotary)
        return q, *self.extend(layer, k, v)

    def predicting(self, hidden: Tensor, positions: Tensor, visibility: Visibility, rows: Tensor) -> Tensor:
        """For models of which a row predicts the token after it: the hidden rows that predict `rows` [B, K].

        A token is predicted by the row that it sees at the position before its own, in the place it has been left in;
        the first of a document, which sees none, by its own row. Returns [B, K, D].
        """
        known = self._write("hidden", hidden)
        where = self._write("positions", positions)
        if "before" not in self.plan:
            sees, own = self.keys(visibility)
            before = visibility.dense(sees, own)[:, 0] & (where[:, None] == positions[:, :, None] - 1)  # [B, L, S]
            self.plan["before"] = torch.where(before.any(-1), before.int().argmax(-1), own)
        row = self.plan["before"].gather(1, rows)
        return known.gather(1, row[..., None].expand(-1, -1, hidden.shape[-1]))

    def select(self, rows: Tensor) -> KVCache:
        """A copy for some rows of the batch (`rows` [B'] int64), when the others are finished."""
        chosen = KVCache(self.size, exact=self.exact)
        chosen._reach = self._reach
        chosen._kept = {name: kept.index_select(0, rows) for name, kept in self._kept.items()}
        chosen._keys = [kept.index_select(0, rows) for kept in self._keys]
        chosen._values = [kept.index_select(0, rows) for kept in self._values]
        return chosen

    @property
    def bytes(self) -> int:
        """What stands in one place of one row."""
        layers = [x[0, :, 0] for x in (*self._keys, *self._values)]
        return sum(x.nbytes for x in (*layers, *(kept[0, 0] for kept in self._kept.values())))

    def save(self, row: int, count: int) -> dict[str, Tensor]:
        """A copy of what stands in the first `count` places of a row of the batch, by name: [count, ...] each."""
        saved = {name: kept[row, :count].clone() for name, kept in self._kept.items()}
        layers = {"keys": self._keys, "values": self._values}
        of_layers = {n: torch.stack([x[row, :, :count].transpose(0, 1) for x in kept], 1) for n, kept in layers.items()}
        return {**saved, **of_layers}

    def load(self, rows: Sequence[Mapping[str, Tensor]]) -> None:
        """Puts what was saved, or the first places of it, back into each row of the batch; of {} nothing."""
        layers = {"keys": self._keys, "values": self._values}
        for row, saved in enumerate(rows):
            for name, value in saved.items():
                self._reach = max(self._reach, len(value))
                if name not in layers:
                    self._named(name, value[None], len(rows))[row, : len(value)] = value
                    continue
                for layer, part in enumerate(value.unbind(1)):  # [n, heads, head_dim]
                    new = part.transpose(0, 1)
                    self._of_layer(layers[name], layer, new[None], len(rows))[row, :, : len(value)] = new

    def _at(self, like: Tensor) -> Tensor:
        """The places of the rows now fed, [B, L]."""
        assert self._places is not None, "put() says where rows are written"
        assert self._places.shape == like.shape[:2], (self._places.shape, like.shape)
        return self._places

    def _batch(self, new: Tensor) -> int:
        """Rows of the batch, all of which were fed first."""
        known = next(iter(self._kept.values()), new)
        return known.shape[0]

    def _named(self, name: str, like: Tensor, batch: int) -> Tensor:
        """The buffer of values like [B', L, ...], made if there is none."""
        if name not in self._kept:
            shape = batch, self.size + 1, *like.shape[2:]
            self._kept[name] = like.new_full(shape, EMPTY.get(name, 0))
        return self._kept[name]

    def _of_layer(self, kept: list[Tensor], layer: int, like: Tensor, batch: int) -> Tensor:
        """The buffer of a layer's keys or values like [B', heads, L, head_dim], made if there is none."""
        if layer == len(kept):
            kept.append(like.new_zeros(batch, like.shape[1], self.size + 1, like.shape[3]))
        return kept[layer]

    def _write(self, name: str, new: Tensor) -> Tensor:
        """Keeps values [B, L, ...] by name; returns those of all places in use."""
        places = self._at(new)
        kept = self._named(name, new, self._batch(new))
        row = self._rows if self._rows is not None else torch.arange(len(new), device=new.device)
        kept[row[:, None], places] = new
        return (kept if self._rows is None else kept[self._rows])[:, : self._reach]

    def _exchange(self, kept: Tensor, new: Tensor) -> Tensor:
        if self._run is not None and self._rows is None:
            kept[:, :, self._run] = new
            return kept[:, :, : self._reach]
        assert self._places is not None
        part = kept if self._rows is None else kept[self._rows]
        write(part, new, self._places)
        if self._rows is not None:
            kept[self._rows] = part
        return part[:, :, : self._reach]
