"""Vision encoders by name; a name carries its source: "timm:NAME", "open_clip:NAME[/PRETRAINED]", "hf:NAME_OR_PATH";
"native:NAME" is a tower of native resolution whose architecture the options say.

A library is imported when one of its names is built, never before.
"""

from __future__ import annotations

from dmllm.models.vision.encoder import VisionConfig, VisionEncoder
from dmllm.registry import Table

__all__ = ["VISION_SOURCES", "VisionConfig", "VisionEncoder", "build_vision", "resolve_vision"]

VISION_SOURCES = Table(
    "vision source",
    {
        "timm": "dmllm.models.vision.timm:TimmEncoder",
        "open_clip": "dmllm.models.vision.open_clip:OpenClipEncoder",
        "hf": "dmllm.models.vision.hugging_face:HuggingFaceEncoder",
        "native": "dmllm.models.vision.native:NativeEncoder",
    },
)


def resolve_vision(config: VisionConfig) -> VisionConfig:
    """The same encoder as a self-contained configuration: size, normalisation and architecture filled in.

    What is already there stays; a resolved configuration resolves to itself and touches neither files nor network.

    Raises:
        ValueError: an unknown source or name, or an option that the library refuses.
        FileNotFoundError: the configuration is neither on disk nor in the cache nor to be had; says how to get it.
        ImportError: the library is missing or broken; says what to install.
    """
    return VISION_SOURCES.load(config.source).resolve(config)


def build_vision(config: VisionConfig, *, load_weights: bool) -> VisionEncoder:
    """The encoder; with the published weights if `load_weights` and `config.pretrained`, else randomly initialised.

    With `load_weights=False` and a resolved configuration nothing is downloaded: the weights come from a checkpoint.
    Raises as `resolve_vision`.
    """
    adapter = VISION_SOURCES.load(config.source)
    return adapter(adapter.resolve(config), load_weights=load_weights and config.pretrained)
