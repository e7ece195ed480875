"""The table of families as text: for the command line, and as docs/models.md, which is written from here."""

from __future__ import annotations

from collections.abc import Iterator

from dmllm.families import FAMILIES
from dmllm.families.family import Family

HEAD = """\
# Published models

Written by `dmllm models --markdown`; do not edit. Every family below is data (`dmllm/families/`), loaded by one
strict loader without any code from the checkpoint:

```python
import dmllm

pipeline = dmllm.load("path/to/checkpoint")  # the authors' folder: config.json and safetensors, whole or in shards
```

A family is verified against tensors that its authors' code produced, on tiny random weights in their own format; the
test that does it stands in the last column. `dmllm init --family NAME --out DIR` writes such a random model,
`dmllm convert IN OUT` turns a published folder into one of dmllm's, and `--to published` turns it back to the bit.
"""
QUIRKS = """\
## Quirks of the authors' code

What the published code does besides what its paper means. *Fixed*: done as meant here. Otherwise the option that gives
the authors' behaviour is named.
"""


def families() -> Iterator[Family]:
    """Every family, in the order of the table."""
    for name in FAMILIES:
        yield FAMILIES.load(name)


def markdown() -> str:
    """The text of docs/models.md."""
    rows = [("family", "models", "source", "decode defaults", "verified"), ("---",) * 5]
    rows += [(f"`{f.name}`", f.title, f.source, _settings(f), f.verified) for f in families()]
    parts = [HEAD, _table(rows), QUIRKS]
    for family in families():
        if family.quirks:
            quirks = [("what", "here", "why"), ("---",) * 3, *family.quirks]
            parts += [f"### {family.name}\n", _table(quirks)]
    return "\n".join(parts)


def _settings(family: Family) -> str:
    return ", ".join(f"{name}={value}" for name, value in family.decode.items())


def _table(rows: list[tuple[str, ...]]) -> str:
    return "".join("| " + " | ".join(map(_cell, row)) + " |\n" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")
