"""Pictures as tokens: where a vocabulary keeps the codes of an image tokenizer, and the ids that frame them.

A model that reads and draws pictures with one softmax numbers the codes 0 .. size - 1 of its image tokenizer from
`offset` on. The ids are data, so that building a question about a picture and drawing one share them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageVocabulary:
    """The ids of pictures in one vocabulary."""

    offset: int
    """Id of code 0."""
    size: int
    """Number of codes."""
    begin: int
    """Before a picture's codes."""
    end: int
    """Behind them."""
    mask: int
    """A code that is not known yet; the text's mask token."""
    newline: int | None = None
    """Behind each row of codes; None: rows are not told apart."""
    understand: tuple[int, ...] = ()
    """What opens a question about a picture."""
    draw: tuple[int, ...] = ()
    """What opens a description that is to be drawn."""
    pad: int | None = None
    """On the left of a description that is to be drawn."""
    unconditional: int | None = None
    """In the place of a description where it is left out, for guidance; None: an empty one."""
    answer: tuple[int, int] | None = None
    """Before and behind an answer, text or picture; None: nothing stands there."""

    def picture(self, codes: Tensor) -> Tensor:
        """The ids of a picture: begin, its codes, end.

        Args:
            codes: [rows, columns] int64, or [N] where rows are not told apart.

        Raises:
            ValueError: a code outside 0 .. size - 1, or rows that are not known but have to be told apart.
        """
        if codes.ndim != 2 and (codes.ndim != 1 or self.newline is not None):
            wanted = "[rows, columns]" if self.newline is not None else "[N] or [rows, columns]"
            raise ValueError(f"codes are {list(codes.shape)}; this vocabulary takes {wanted}.")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.size:
            raise ValueError(f"codes lie in {int(codes.min())} .. {int(codes.max())}; allowed: 0 .. {self.size - 1}.")
        ids = codes + self.offset
        if self.newline is not None:
            ids = torch.cat([ids, torch.full_like(ids[:, :1], self.newline)], 1)
        return torch.cat([_ids([self.begin], ids), ids.flatten(), _ids([self.end], ids)])

    def codes(self, ids: Tensor) -> Tensor:
        """The codes [N] among ids [L], in their order; what frames them is left out."""
        return ids[(ids >= self.offset) & (ids < self.offset + self.size)] - self.offset

    def understanding(self, codes: Tensor, prompt: Iterable[int], before: Iterable[int] = ()) -> Tensor:
        """The ids [L] of a question about a picture, behind which the answer goes.

        Args:
            codes: as for `picture`.
            prompt: ids behind the picture.
            before: ids between what opens the question and the picture.
        """
        opening, closing = [*self.understand, *before], [*prompt, *(self.answer or ())[:1]]
        return torch.cat([_ids(opening, codes), self.picture(codes), _ids(closing, codes)])


def _ids(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)
