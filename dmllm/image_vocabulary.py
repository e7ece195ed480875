"""Pictures as tokens: where a vocabulary keeps the codes of an image tokenizer, and the ids that frame them.

A model that reads and draws pictures with one softmax numbers the codes 0 .. size - 1 of its image tokenizer from
`offset` on. The ids are data, so that building a question about a picture and drawing one share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dmllm.registry import nearest


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
    draw_end: tuple[int, ...] = ()
    """What stands behind it."""
    draw_length: int | None = None
    """The longest description, with these two; of a longer one what comes before its end is cut. None: any."""
    draw_text: str = "{}"
    """The text around a description."""
    edit_text: str = "{}"
    """The text around one of what a picture is to be made into."""
    edit_end: int | None = None
    """How many of the ids of that stand behind the picture; None: all, the picture stands before what opens it."""
    pad: int | None = None
    """On the left of a description that is to be drawn."""
    unconditional: int | None = None
    """In the place of a description where it is left out, for guidance; None: an empty one."""
    answer: tuple[int, int] | None = None
    """Before and behind an answer, text or picture; None: nothing stands there."""

    def __post_init__(self) -> None:
        for name in ("understand", "draw", "draw_end", "answer"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.offset < 0 or self.size < 1:
            raise ValueError(f"offset={self.offset}, size={self.size}: codes need ids from 0 on, and one at least.")
        if self.offset <= self.mask < self.offset + self.size:
            raise ValueError(f"mask={self.mask} is the id of code {self.mask - self.offset}; it must be another.")

    @staticmethod
    def of(values: Mapping[str, Any] | ImageVocabulary) -> ImageVocabulary:
        """From plain values, as a config.json has them. Raises ValueError for a field that there is not."""
        if isinstance(values, ImageVocabulary):
            return values
        known = [f.name for f in fields(ImageVocabulary)]
        for name in values:
            if name not in known:
                raise ValueError(f"image_vocabulary has no field {name!r}; {nearest(name, known)}")
        return ImageVocabulary(**values)

    @property
    def codes_of(self) -> tuple[int, int]:
        """The rows of the vocabulary that may stand where a code does, from the first to behind the last."""
        return self.offset, self.offset + self.size

    @property
    def text_of(self) -> tuple[int, int]:
        """Those that may stand where a text does: all before the codes."""
        return 0, self.offset

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

    def drawing(self, description: Iterable[int]) -> list[int]:
        """The ids up to the first code of a picture that is to be drawn; left out, the description is []."""
        ids = [*self.draw, *description]
        if self.draw_length is not None:
            ids = ids[: self.draw_length - len(self.draw_end)]
        return [*ids, *self.draw_end, *(self.answer or ())[:1], self.begin]

    def editing(self, pictures: Iterable[Tensor], description: Iterable[int]) -> list[int]:
        """As `drawing`, of what pictures, codes as for `picture`, are to be made into."""
        given = [number for codes in pictures for number in self.picture(codes).tolist()]
        if self.edit_end is None:
            return [*given, *self.drawing(description)]
        ids = [*description]
        at = len(ids) - self.edit_end
        return self.drawing([*ids[:at], *given, *ids[at:]])

    def canvas(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """What stands behind `drawing`: ids [N], masks in the place of codes; and where these stand, [rows * columns].

        The other ids are given: the ends of rows, of the picture and of the answer.
        """
        ids = torch.full((rows, columns), self.mask)
        if self.newline is not None:
            ids = torch.cat([ids, torch.full((rows, 1), self.newline)], 1)
        slots = (torch.arange(rows)[:, None] * ids.shape[1] + torch.arange(columns)).flatten()
        return torch.cat([ids.flatten(), _ids([self.end, *(self.answer or ())[1:]], ids)]), slots

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
