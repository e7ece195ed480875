"""What commands read of their own: settings that are passed on, and the pictures that come with dmllm."""

from __future__ import annotations

from pathlib import Path

import yaml

PACKAGED = Path(__file__).parent.parent / "assets"


def decode_options(rest: list[str]) -> tuple[dict, list[str]]:
    """`--steps=8 --threshold 0.9 question` as (values by name, other words); DecodeConfig judges the names."""
    options: dict = {}
    others: list[str] = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            others.append(word)
            continue
        name, given, value = word[2:].partition("=")
        value = value if given else next(words, None)
        if value is None:
            raise ValueError(f"--{name} needs a value, e.g. --{name}=8.")
        options[name.replace("-", "_")] = yaml.safe_load(value)
    return options, others


def example(path: str) -> str:
    """A path as given, or the packaged picture of that name: examples/scene.png works wherever dmllm is installed."""
    packaged = PACKAGED / path
    return str(packaged) if not Path(path).exists() and path.startswith("examples/") and packaged.exists() else path
