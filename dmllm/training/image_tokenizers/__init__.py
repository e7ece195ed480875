"""Training image tokenizers: pictures in, pictures out, and codes between them that are all in use.

A loop of its own, since nothing of a language model's is in it; runs, checkpoints and metrics are those of
`dmllm.training`.
"""

from __future__ import annotations

from dmllm.training.image_tokenizers.config import ImageTokenizerConfig
from dmllm.training.image_tokenizers.loop import Trained, train_image_tokenizer
from dmllm.training.image_tokenizers.quality import Quality, measure

__all__ = ["ImageTokenizerConfig", "Quality", "Trained", "measure", "train_image_tokenizer"]
