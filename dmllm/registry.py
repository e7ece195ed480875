"""A table maps names to "module:attribute", loaded on use, so that an absent extra costs nothing until asked for.

A dotted path ("my_package.module:thing") is a name too: that is how users add a part without touching this project.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any


class Table(Mapping[str, str]):
    """Names of one kind of part, e.g. `Table("projector", {"linear": "dmllm.models.projectors:Linear"})`."""

    def __init__(self, kind: str, entries: Mapping[str, str]):
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> Any:
        """The object called `name`. Raises ValueError for an unknown name, naming the nearest ones."""
        target = self._entries.get(name, name if ":" in name else None)
        if target is None:
            raise ValueError(
                f"{name!r} is not a known {self.kind}; {nearest(name, self)}. "
                "Your own is named by its path: 'package.module:attribute'."
            )
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def nearest(name: str, known: Iterator[str] | Mapping[str, Any] | list[str]) -> str:
    """'did you mean ...' when something is close, else the whole list: the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known are: {', '.join(sorted(known))}"
