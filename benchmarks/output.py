"""What a benchmark says, and where it writes it down."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def say(*said: str) -> None:
    """Lines of the result."""
    sys.stdout.write("\n".join([*said, ""]))
    sys.stdout.flush()


def tell(said: str) -> None:
    """How far it is."""
    sys.stderr.write(said + "\n")
    sys.stderr.flush()


def conclude(found: dict[str, Any], lines: Sequence[str], out: str, module: str, argv: Sequence[str] | None) -> None:
    """Write JSON with the command that made it, and print the lines."""
    found["command"] = " ".join(["python -m", module, *(sys.argv[1:] if argv is None else argv)])
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    say(*lines, f"written to {path}")
