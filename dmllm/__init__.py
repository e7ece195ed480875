"""dmllm: the framework for multimodal diffusion language models.

>>> import dmllm
>>> pipeline = dmllm.load("dmllm-tiny")
>>> pipeline.chat("how many objects are there?", images=["scene.png"]).text

Importing it is cheap, and makes transformers' Auto classes know its checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmllm.auto import install as _install

if TYPE_CHECKING:
    from dmllm.pipeline import Pipeline, Reply, load

__version__ = "0.1.0"
__all__ = ["Pipeline", "Reply", "__version__", "load"]

_install()


def __getattr__(name: str) -> Any:
    if name in ("Pipeline", "Reply", "load"):
        return getattr(import_module("dmllm.pipeline"), name)
    raise AttributeError(f"module 'dmllm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
