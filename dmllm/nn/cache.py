"""Keys and values of rows that need not be computed again, as an object passed to the backbone.

`KVCache` is exact where what is stored cannot see what comes later: the prompt of a prefix model, finished blocks of a
block-causal model, everything of a causal one. The stored rows keep their rank, stream and document, so that the
visibility rule alone decides who sees them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmllm.nn.visibility import Visibility


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
