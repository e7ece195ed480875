"""The model card, README.md of a checkpoint: what it is, how it is loaded, its shape; only what is known is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmllm.models.multimodal import MultimodalModel

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
}


def model_card(name: str, model: MultimodalModel, generation: Mapping[str, Any], card: str | None) -> str:
    """The text of README.md.

    Args:
        name: what the model is called.
        generation: its decode defaults.
        card: what the owner adds: training data, measured results, limits.
    """
    config = model.config
    shape = model.backbone.config
    rows = {
        "backbone": f"{shape.num_hidden_layers} layers, width {shape.hidden_size}, {shape.num_attention_heads} heads, "
        f"{shape.vocab_size} tokens",
        "attention": ATTENTION.get(config.visibility, config.visibility),
    }
    if model.vision is not None:
        (height, width), (down, across) = model.vision.image_size, model.image_grid
        rows["vision encoder"] = f"`{config.vision['name']}`, {height} x {width} pixels, layer {config.vision['layer']}"
        rows["projector"] = f"{config.projector['name']}, {down} x {across} rows for a tile"
    decode = {key: value for key, value in generation.items() if value is not None}
    if decode:
        rows["decoding"] = ", ".join(f"{key}={value}" for key, value in decode.items())
    images = model.vision is not None
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
