"""What a checkpoint is: by name, for the command line, and as its model card README.md; only what is known is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmllm.families import FAMILIES
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.nn.visibility import check_layout
from dmllm.tiling import TilingConfig, plan

TEMPLATE = """\
---
library_name: dmllm
pipeline_tag: {task}
tags:
- diffusion-language-model
- masked-diffusion
---

# {name}

A {kind} masked-diffusion language model with {parameters:.1f}M parameters, made with dmllm.
Text is produced by denoising a canvas of masked tokens, all positions at once{condition}.

```python
import dmllm

pipeline = dmllm.load("path/to/{name}")
{example}
```

After `import dmllm`, transformers' `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` load it too.

| part | what it is |
|---|---|
{table}
{card}"""

ATTENTION = {
    "full": "prompt and answer see each other",
    "prefix": "the answer sees the prompt, the prompt only itself",
    "causal": "each token sees those before it",
    "permutation": "the prompt sees itself, each token what is given and what became known before it",
}


def model_card(name: str, model: MultimodalModel, generation: Mapping[str, Any], card: str | None) -> str:
    """The text of README.md.

    Args:
        name: what the model is called.
        generation: its decode defaults.
        card: what the owner adds: training data, measured results, limits.
    """
    config = model.config
    shape = vars(model.backbone.config) if hasattr(model, "backbone") else config.backbone
    rows = {
        "backbone": f"{shape['num_hidden_layers']} layers, width {shape['hidden_size']}, "
        f"{shape['num_attention_heads']} heads, {shape['vocab_size']} tokens",
        "attention": ATTENTION.get(config.visibility, config.visibility),
    }
    if (vision := getattr(model, "vision", None)) is not None:
        (height, width), (down, across) = vision.image_size, model.image_grid
        rows["vision encoder"] = f"`{config.vision['name']}`, {height} x {width} pixels, layer {config.vision['layer']}"
        rows["projector"] = f"{config.projector['name']}, {down} x {across} rows for a tile"
    decode = {key: value for key, value in generation.items() if value is not None}
    if decode:
        rows["decoding"] = ", ".join(f"{key}={value}" for key, value in decode.items())
    images = config.vision is not None
    return TEMPLATE.format(
        name=name,
        task="image-text-to-text" if images else "text-generation",
        kind="multimodal" if images else "text-only",
        condition=", conditioned on the images of the prompt" if images else "",
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        example=f'print(pipeline.chat("{"What is in the picture?" if images else "Who are you?"}"'
        + (', images=["picture.png"]' if images else "")
        + ").text)",
        table="\n".join(f"| {part} | {what} |" for part, what in rows.items()),
        card=f"\n{card.strip()}\n" if card else "",
    )


def describe(model: MultimodalModel, tiling: TilingConfig | None) -> dict[str, str]:
    """Family, parts, sizes, ids and caches, by name; `tiling` is how images are cut for it, None for text only."""
    config, count = model.config, lambda m: sum(p.numel() for p in m.parameters())
    parts = {n: m for n in ("backbone", "vision", "projector") if (m := getattr(model, n, None)) is not None}
    family = None if config.family is None else FAMILIES.load(config.family)
    image = "none" if tiling is None else f"{tiling.mode}, tiles {tiling.tile_size}, rows {tiling.grid}"
    if codes := getattr(config, "images", None):
        image = f"{codes.size} codes of an image tokenizer, from id {codes.offset} on"
    return {
        "family": "none: made with dmllm" if family is None else f"{family.name}: {family.title}",
        "parameters": f"{count(model):,}",
        **{name: f"{count(module):,}" for name, module in parts.items()},
        "shape": ", ".join(f"{k} {v}" for k, v in config.backbone.items()),
        "vision tower": (config.vision or {}).get("name", "none: text only"),
        "image": image,
        "tokens per image": "none" if tiling is None else _rows_of_images(tiling),
        "visibility": config.visibility + (", each token predicted by the row before it" if config.shift else ""),
        "process": config.process + (", told the time" if _timed(config) else ""),
        **({"heads": ", ".join(config.heads)} if config.heads else {}),
        "cache": _caches(config),
        "special ids": ", ".join(f"{k} {v}" for k, v in vars(config.special).items()),
    }


def _timed(config: Any) -> bool:
    return bool(config.backbone.get("time_conditioning"))


def _caches(config: Any) -> str:
    """Which calls need not compute everything."""
    if check_layout(config.visibility) is not None or (config.visibility != "full" and not _timed(config)):
        return "exact: what is known is computed once"
    if config.visibility == "full" and config.process == DmllmConfig().process:
        return "approximate, on demand: cache=prefix or dual; none is exact, as the prompt sees the canvas"
    return "none: what a call computes of the prompt depends on the canvas or on the time"


def _rows_of_images(tiling: TilingConfig) -> str:
    """Stream rows of pictures of some shapes; one number where they are the same."""
    sizes = ((1000, 1000), (2000, 1000), (1000, 2000))
    rows = {f"{width} x {height}": len(plan(width, height, tiling).slots) for width, height in sizes}
    return (
        ", ".join(f"{n} ({size})" for size, n in rows.items()) if len({*rows.values()}) > 1 else f"{min(rows.values())}"
    )
