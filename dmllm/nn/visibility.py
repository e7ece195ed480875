"""The one rule of attention: who sees whom, from an integer rank, a stream and a document per row.

Within one document, a row sees another when

    canvas  -> canvas  : rank_k == rank_q          context -> context : rank_k <= rank_q
    canvas  -> context : rank_k <  rank_q          context -> canvas  : never

Every document also sees the rows of document PREFIX by the same comparison of ranks; PREFIX rows see only each other.
A PADDING row sees only itself. Autoregressive, masked, prefix, block and permutation models differ in their ranks
alone: the table stands in `layout` and, for training block models, in their objective. What is seen by the rule may
be narrowed by a mask over places, which carries attention annealing (causal to full, in training).

Sources: the masks of BD3-LM (arXiv:2503.09573, section 3.2), LaViDa's prefix-DLM (arXiv:2505.16839) and XLNet
(arXiv:1906.08237, section 2.3) as one function. Shapes: B rows of a batch, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    place: Tensor | None = None  # [B, L] int64: where each row stands in `extra`
    extra: Tensor | None = None  # [P, P] bool: a row at q sees one at k only where extra[q, k]; None: as the rule says

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """What the rule compares, [B, L] each: rank, stream, document and, with `extra`, place."""
        place = () if self.extra is None or self.place is None else (self.place,)
        return self.rank, self.canvas, self.document, *place

    def sees(self, query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
        """The rule for columns of queries and keys, of any shapes that broadcast, without a row's sight of itself."""
        seen = visible(*query[:3], *key[:3])
        return seen if self.extra is None else seen & self.extra[query[3], key[3]]

    def dense(self, keys: Visibility | None = None, own: Tensor | None = None) -> Tensor:
        """The mask for SDPA, [B, 1, Q, K] bool, True where row q sees row k.

        Args:
            keys: the rows that may be seen; None is these rows themselves.
            own: [B, Q], which of the keys each row is; None is the last Q in order.
        """
        keys, own = self._among(keys, own)
        q, k = ([x.unsqueeze(d) for x in rows.columns] for rows, d in ((self, -1), (keys, -2)))
        itself = own[..., None] == torch.arange(keys.rank.shape[1], device=own.device)
        return (self.sees(q, k) | itself)[:, None]

    def flex(self, keys: Visibility | None = None, own: Tensor | None = None) -> BlockMask:
        """The same mask for flex attention, which skips the blocks in which nothing is seen."""
        keys, own = self._among(keys, own)
        mine, theirs = self.columns, keys.columns

        def shown(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self.sees([x[b, q] for x in mine], [x[b, k] for x in theirs]) | (own[b, q] == k)

        batch, length = self.rank.shape
        return create_block_mask(shown, batch, None, length, keys.rank.shape[1], device=str(self.rank.device))

    def _among(self, keys: Visibility | None, own: Tensor | None) -> tuple[Visibility, Tensor]:
        keys = self if keys is None else keys
        if (self.extra is None) != (keys.extra is None):
            raise ValueError("A mask over places holds for rows that are fed together; leave the cache out.")
        if own is None:
            length, offset = self.rank.shape[1], keys.rank.shape[1] - self.rank.shape[1]
            own = torch.arange(offset, offset + length, device=self.rank.device).expand_as(self.rank)
        return keys, own

    def biased(self) -> Tensor:
        """`dense` with `faint` rows, as what is added to the scores: float32 [B, 1, Q, K]."""
        assert self.faint is not None
        fainter = ~self.faint[:, None, :, None] & self.faint[:, None, None]
        return (-fainter.float()).masked_fill(~self.dense(), -torch.inf)

    def select(self, rows: Tensor | slice) -> Visibility:
        """The same rule for some rows of the batch."""
        return self._each(lambda column: column[rows])

    def take(self, columns: Tensor) -> Visibility:
        """The same rule for the rows at `columns` [B, K] of each stream."""
        return self._each(lambda column: column.gather(1, columns))

    def repeat(self, times: int) -> Visibility:
        """The same rule for so many copies of the batch, one below the other."""
        return self._each(lambda column: torch.cat([column] * times))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Visibility:
        known = ((name, getattr(self, name)) for name in ("rank", "canvas", "document", "faint", "place"))
        return replace(self, **{name: change(column) for name, column in known if column is not None})

    @staticmethod
    def cat(*parts: Visibility) -> Visibility:
        """Streams laid one after another along the length, which no mask over places narrows."""
        assert all(p.extra is None for p in parts)
        return Visibility(*(torch.cat(c, 1) for c in zip(*(p.columns[:3] for p in parts), strict=True)))


def visible(q_rank, q_canvas, q_document, k_rank, k_canvas, k_document) -> Tensor:  # type: ignore[no-untyped-def]
    """The rule itself, on anything that broadcasts. A row's sight of itself is added by the caller."""
    by_rank = torch.where(
        q_canvas,
        torch.where(k_canvas, k_rank == q_rank, k_rank < q_rank),
        ~k_canvas & (k_rank <= q_rank),
    )
    together = (q_document == k_document) | (k_document == PREFIX)
    return by_rank & together & (q_document != PADDING) & (k_document != PADDING)


ORDERED = "permutation"
LAYOUTS = ("full", "prefix", "causal", ORDERED)


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
            the blocks before it (SDAR, LLaDA2). "permutation": what is given sees what is given, and each row of the
            canvas that and itself; whoever knows the order of tokens gives them its ranks, from 0 on (XLNet).
        documents: [B, L] int64.
        canvas: [B, L] bool, the rows that are (or may be) noised.
        positions: [B, L], counted from each document's start; needed where rows are not laid out in order.

    Raises:
        ValueError: unknown kind, or PREFIX rows under "full", where the prefix would have to see every document.
    """
    rank = torch.zeros_like(documents)
    if kind == "full":
        return Visibility(rank, torch.ones_like(canvas), documents)
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    place = place if positions is None else positions
    if kind in ("prefix", ORDERED):
        noised = place if kind == ORDERED else rank
        rank = torch.where(documents == PREFIX, -2, torch.where(canvas, noised, -1))
        return Visibility(rank, canvas & (documents != PREFIX), documents)
    rank = place if kind == "causal" else place // (check_layout(kind) or 1)
    return Visibility(rank, torch.zeros_like(canvas), documents)
