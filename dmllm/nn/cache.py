"""Keys and values of rows that need not be computed again, as an object passed to the backbone.

`KVCache` is exact where what is stored cannot see what comes later: the prompt of a prefix model, finished blocks of a
block-causal model, everything of a causal one. The stored rows keep their rank, stream and document, so that the
visibility rule alone decides who sees them. `PlacedCache` has a place for every row there will be, which each row of
the batch fills at its own pace and may fill again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.nn.visibility import Visibility
from dmllm.types import PADDING


class KVCache:
    """Per-layer keys and values [B, heads, K, head_dim] of the rows stored so far.

    While `storing` is True a forward adds its rows; else it only looks: the same canvas can be fed again and again.
    """

    exact = True

    def __init__(self) -> None:
        self.visibility: Visibility | None = None
        self.storing = True
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._hidden: Tensor | None = None
        self._positions: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of stored rows."""
        return 0 if self.visibility is None else self.visibility.rank.shape[1]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer attends to: the stored rows followed by the new ones, [B, heads, K + L, head_dim]."""
        if layer < len(self._keys):
            keys = torch.cat([self._keys[layer], keys], 2)
            values = torch.cat([self._values[layer], values], 2)
        if self.storing:
            if layer < len(self._keys):
                self._keys[layer], self._values[layer] = keys, values
            else:
                self._keys.append(keys)
                self._values.append(values)
        return keys, values

    def finish(self, visibility: Visibility) -> None:
        """Called by the backbone once all layers have seen the rows of `visibility`."""
        if self.storing:
            known = self.visibility
            self.visibility = visibility if known is None else Visibility.cat(known, visibility)

    def recall(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The stored rows' last hidden states and positions followed by these, [B, K + L, D] and [B, K + L].

        For models in which a row predicts the token after it: the last stored row predicts the first new one.
        """
        if self._hidden is not None and self._positions is not None:
            hidden, positions = torch.cat([self._hidden, hidden], 1), torch.cat([self._positions, positions], 1)
        if self.storing:
            self._hidden, self._positions = hidden, positions
        return hidden, positions

    def select(self, rows: Tensor) -> KVCache:
        """The cache of some rows of the batch (`rows` [B'] int64), when the others are finished."""
        chosen = KVCache()
        chosen.storing = self.storing
        chosen.visibility = None if self.visibility is None else self.visibility.select(rows)
        chosen._keys = [k.index_select(0, rows) for k in self._keys]
        chosen._values = [v.index_select(0, rows) for v in self._values]
        chosen._hidden = None if self._hidden is None else self._hidden.index_select(0, rows)
        chosen._positions = None if self._positions is None else self._positions.index_select(0, rows)
        return chosen


class PlacedCache(KVCache):
    """Keys and values in `size` places of each batch row: a forward writes row l of its stream at `places[:, l]`.

    What is to be stored nowhere has the place `size`. Places not yet written are PADDING, which no row sees; layers
    attend to as many as are in use by any row.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.places: Tensor | None = None  # [B, L], set before each forward
        self._in_use = self._recalled = 0
        self._stored: Visibility | None = None

    @property
    def visibility(self) -> Visibility | None:
        """The rows that layers attend to besides the new ones, [B, in use]."""
        if self._stored is None or not self._in_use:
            return None
        rule, now = self._stored, slice(self._in_use)
        return Visibility(rule.rank[:, now], rule.canvas[:, now], rule.document[:, now])

    @visibility.setter
    def visibility(self, value: Visibility | None) -> None:
        self._stored = value

    def forget(self, first: Tensor, end: Tensor) -> None:
        """No row sees what is stored at the places `first` to `end` [B] from now on, until it is written anew."""
        if self._stored is not None:
            rule, place = self._stored, torch.arange(self.size + 1, device=first.device)
            gone = (place >= first[:, None]) & (place < end[:, None])
            self._stored = Visibility(rule.rank, rule.canvas, rule.document.masked_fill(gone, PADDING))

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer attends to: the places in use followed by the new rows, [B, heads, K + L, head_dim]."""
        if layer == len(self._keys):
            shape = (*keys.shape[:2], self.size + 1, keys.shape[3])
            self._keys.append(keys.new_zeros(shape))
            self._values.append(values.new_zeros(shape))
        seen = [torch.cat([kept[layer][:, :, : self._in_use], new], 2)
                for kept, new in ((self._keys, keys), (self._values, values))]  # fmt: skip
        assert self.places is not None
        where = self.places[:, None, :, None].expand_as(keys)
        self._keys[layer].scatter_(2, where, keys)
        self._values[layer].scatter_(2, where, values)
        return seen[0], seen[1]

    def finish(self, visibility: Visibility) -> None:
        """Called by the backbone once all layers have seen the rows of `visibility`."""
        assert self.places is not None
        if self._stored is None:
            none = visibility.document.new_zeros(len(visibility.document), self.size + 1)
            self._stored = Visibility(none, none.bool(), torch.full_like(none, PADDING))
        old, new = self._stored, visibility
        self._stored = Visibility(
            old.rank.scatter(1, self.places, new.rank),
            old.canvas.scatter(1, self.places, new.canvas),
            old.document.scatter(1, self.places, new.document),
        )
        written = self.places.masked_fill(self.places == self.size, -1)
        self._in_use = max(self._in_use, int(written.max()) + 1 if written.numel() else 0)

    def recall(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As of `KVCache`: the last hidden states and positions of the places in use before, followed by these."""
        assert self.places is not None
        if self._hidden is None or self._positions is None:
            self._hidden = hidden.new_zeros(len(hidden), self.size + 1, hidden.shape[2])
            self._positions = positions.new_full((len(hidden), self.size + 1), -1)
        known = torch.cat([self._hidden[:, : self._recalled], hidden], 1)
        places = torch.cat([self._positions[:, : self._recalled], positions], 1)
        self._hidden = self._hidden.scatter(1, self.places[..., None].expand_as(hidden), hidden)
        self._positions = self._positions.scatter(1, self.places, positions)
        self._recalled = self._in_use
        return known, places

    def select(self, rows: Tensor) -> PlacedCache:
        """The cache of some rows of the batch (`rows` [B'] int64), when the others are finished."""
        chosen = PlacedCache(self.size)
        chosen._in_use, chosen._recalled = self._in_use, self._recalled
        chosen._stored = None if self._stored is None else self._stored.select(rows)
        chosen._keys = [k.index_select(0, rows) for k in self._keys]
        chosen._values = [v.index_select(0, rows) for v in self._values]
        chosen._hidden = None if self._hidden is None else self._hidden.index_select(0, rows)
        chosen._positions = None if self._positions is None else self._positions.index_select(0, rows)
        return chosen
