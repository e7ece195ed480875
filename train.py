"""Train a multimodal diffusion language model: python train.py RECIPE.yaml [--field=value ...]"""

import sys

from dmllm.training.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
