"""`python train.py RECIPE.yaml --a.b=c ...` and `dmllm train`: arguments in, exit status out."""

from __future__ import annotations

import logging
import sys

import transformers

from dmllm.config import load_config
from dmllm.training.config import TrainConfig
from dmllm.training.loop import train

USAGE = """\
usage: train.py RECIPE.yaml [--field=value ...]

A field is a dotted name of the configuration, e.g. --steps=1000 --optimiser.lr=1e-4 --data=data.yaml.
Several processes: torchrun --nproc-per-node 2 train.py RECIPE.yaml
"""
INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Train as told. Returns 0 when the run is complete, 130 when it was stopped, 2 for what the caller can mend."""
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        sys.stderr.write(USAGE)
        return 0 if arguments else 2
    recipe = arguments[0] if not arguments[0].startswith("--") else None
    transformers.logging.disable_progress_bar()  # of writing weights, across the run's own
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dmllm").setLevel(logging.INFO)
    try:
        result = train(load_config(TrainConfig, recipe, arguments[1:] if recipe else arguments))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0 if result.model is not None else INTERRUPTED
