"""The one rule of attention: who sees whom, from an integer rank, a stream and a document per row.

Within one document, a row sees another when

    canvas  -> canvas  : rank_k == rank_q          context -> context : rank_k <= rank_q
    canvas  -> context : rank_k <  rank_q          context -> canvas  : never

Every document also sees the rows of document PREFIX by the same comparison of ranks; PREFIX rows see only each other.
A PADDING row sees only itself. Autoregressive, masked, prefix, block and permutation models differ in their ranks
alone: the table stands in `layout` and, for training block models, in their objective.

Sources: the masks of BD3-LM (arXiv:2503.09573, section 3.2), LaViDa's prefix-DLM (arXiv:2505.16839) and XLNet
(arXiv:1906.08237, section 2.3) as one function. Shapes: B rows of a batch, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dmllm.types import PADDING, PREFIX


@dataclass(frozen=True)
class Visibility:
    """What the rule needs to know of each row."""

    rank: Tensor  # [B, L] int64
    canvas: Tensor  # [B, L] bool: True on the canvas (being denoised), False in the context (given)
    document: Tensor  # [B, L] int64: 0, 1, ..., or PREFIX, or PADDING
    faint: Tensor | None = None  # [B, L] bool: rows that the others see with 1/e of their weight; None: no such rows

    def dense(self, keys: Visibility | None = None, own: Tensor | None = None) -> Tensor:
        """The mask for SDPA, [B, 1, Q, K] bool, True where row q sees row k.

        Args:
            keys: the rows that may be seen; None is these rows themselves.
            own: [B, Q], which of the keys each row is; None is the last Q in order.
        """
        keys, own = self._among(keys, own)
        q, k = self._columns(-1), keys._columns(-2)
        itself = own[..., None] == torch.arange(keys.rank.shape[1], device=own.device)
        return (visible(*q, *k) | itself)[:, None]

    def flex(self, keys: Visibility | None = None, own: Tensor | None = None) -> BlockMask:
        """The same mask for flex attention, which skips the blocks in which nothing is seen."""
        keys, own = self._among(keys, own)

        def sees(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
            query = (self.rank[b, q], self.canvas[b, q], self.document[b, q])
            key = (keys.rank[b, k], keys.canvas[b, k], keys.document[b, k])
            return visible(*query, *key) | (own[b, q] == k)

        batch, length = self.rank.shape
        return create_block_mask(sees, batch, None, length, keys.rank.shape[1], device=str(self.rank.device))

    def _among(self, keys: Visibility | None, own: Tensor | None) -> tuple[Visibility, Tensor]:
        keys = self if keys is None else keys
        if own is None:
            length, offset = self.rank.shape[1], keys.rank.shape[1] - self.rank.shape[1]
            own = torch.arange(offset, offset + length, device=self.rank.device).expand_as(self.rank)
        return keys, own

    def biased(self) -> Tensor:
        """`dense` with `faint` rows, as what is added to the scores: float32 [B, 1, Q, K]."""
        assert self.faint is not None
        fainter = ~self.faint[:, None, :, None] & self.faint[:, None, None]
        return (-fainter.float()).masked_fill(~self.dense(), -torch.inf)

    def _columns(self, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.rank.unsqueeze(dim), self.canvas.unsqueeze(dim), self.document.unsqueeze(dim)

    def select(self, rows: Tensor | slice) -> Visibility:
        """The same rule for some rows of the batch."""
        return Visibility(self.rank[rows], self.canvas[rows], self.document[rows])

    def take(self, columns: Tensor) -> Visibility:
        """The same rule for the rows at `columns` [B, K] of each stream."""
        return Visibility(*(value.gather(1, columns) for value in (self.rank, self.canvas, self.document)))

    @staticmethod
    def cat(*parts: Visibility) -> Visibility:
        """Streams laid one after another along the length."""
        return Visibility(
            torch.cat([p.rank for p in parts], 1),
            torch.cat([p.canvas for p in parts], 1),
            torch.cat([p.document for p in parts], 1),
        )


def visible(q_rank, q_canvas, q_document, k_rank, k_canvas, k_document) -> Tensor:  # type: ignore[no-untyped-def]
    """The rule itself, on anything that broadcasts. A row's sight of itself is added by the caller."""
    by_rank = torch.where(
        q_canvas,
        torch.where(k_canvas, k_rank == q_rank, k_rank < q_rank),
        ~k_canvas & (k_rank <= q_rank),
    )
    together = (q_document == k_document) | (k_document == PREFIX)
    return by_rank & together & (q_document != PADDING) & (k_document != PADDING)


LAYOUTS = ("full", "prefix", "causal")


def check_layout(kind: str) -> int | None:
    """N of "block:N", None of another name. Raises ValueError for what is no layout."""
    if kind in LAYOUTS:
        return None
    name, _, number = kind.partition(":")
    if name != "block" or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"visibility={kind!r} is not one of {', '.join(LAYOUTS)}, or block:N such as block:4.")
    return int(number)


def layout(kind: str, *, documents: Tensor, canvas: Tensor, positions: Tensor | None = None) -> Visibility:
    """Ranks for a stream of given and noised rows, by the name a checkpoint carries.

    Args:
        kind: "full": every row on one canvas, all see all of their document (LLaDA, MDLM). "prefix": the canvas sees
            all, what is given sees only what is given (LaViDa); rows of document PREFIX see only each other.
            "causal": every row sees itself and what precedes it. "block:N": every row sees its block of N positions and
            the blocks before it (SDAR, LLaDA2).
        documents: [B, L] int64.
        canvas: [B, L] bool, the rows that are (or may be) noised.
        positions: [B, L], counted from each document's start; needed where rows are not laid out in order.

    Raises:
        ValueError: unknown kind, or PREFIX rows under "full", where the prefix would have to see every document.
    """
    rank = torch.zeros_like(documents)
    if kind == "full":
        return Visibility(rank, torch.ones_like(canvas), documents)
    if kind == "prefix":
        rank = torch.where(documents == PREFIX, -2, torch.where(canvas, 0, -1))
        return Visibility(rank, canvas & (documents != PREFIX), documents)
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    place = place if positions is None else positions
    rank = place if kind == "causal" else place // (check_layout(kind) or 1)
    return Visibility(rank, torch.zeros_like(canvas), documents)
