"""Training: a visible loop on accelerate. `train(config)` here; `python train.py RECIPE.yaml` on the command line."""

from dmllm.training.config import TrainConfig
from dmllm.training.loop import Result, train

__all__ = ["Result", "TrainConfig", "train"]
