"""Which keys and values a model with full attention keeps although they would change, and when they are made anew.

Sources: prefix and dual cache, Wu et al., Fast-dLLM, arXiv:2505.22618, sections 3.1 and 3.2 (code NVlabs/Fast-dLLM,
llada/generate.py); refreshing some rows around the block, Ma et al., dInfer, arXiv:2510.08666 (vicinity refresh).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dmllm.registry import nearest

KINDS = ["prefix", "dual"]


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """What each call feeds: everything in a call that refreshes, else the rows about the block that is being filled."""

    kind: str
    """prefix: keep what stands before the active block, feed all from there on. dual: keep what stands behind it too,
    feed the block alone."""
    refresh: int = 1
    """Blocks from one refresh to the next: 1 refreshes at the first call on each block, 2 on every other one."""
    images: bool = True
    """Whether a refresh makes the rows of images anew too; False: they are what the first call made of them."""
    vicinity: int = 0
    """Rows before the block, and behind it under dual, that every call feeds too."""

    exact = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cache kind={self.kind!r} is not one of {', '.join(KINDS)}; {nearest(self.kind, KINDS)}")
        for name, least in (("refresh", 1), ("vicinity", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"cache {name}={value!r} must be a whole number of at least {least}.")

    @staticmethod
    def of(value: CachePolicy | Mapping[str, Any] | str | None) -> CachePolicy | None:
        """A policy from its kind or its fields. Raises ValueError for what is no policy."""
        if value is None or isinstance(value, CachePolicy):
            return value
        if isinstance(value, str):
            return CachePolicy(kind=value)
        known = [f.name for f in fields(CachePolicy)]
        if not isinstance(value, Mapping) or "kind" not in value:
            raise ValueError(f"cache={value!r} must be {' or '.join(KINDS)}, or these fields: {', '.join(known)}.")
        for name in value:
            if name not in known:
                raise ValueError(f"Unknown cache option {name!r}; {nearest(name, known)}")
        return CachePolicy(**value)
