"""Evaluate a model: `python eval/run.py SUITE.yaml --model PATH --out DIR --a.b=c`, the same as `dmllm eval`."""

import sys

from dmllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
