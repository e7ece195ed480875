"""Qwen2.5-VL, a causal model, as the start of a diffusion model: its logits aligned, its visibility free to be changed.

A training YAML continues it with `model: {checkpoint: FOLDER, visibility: block:8}`, as Fast-dVLM and DiffusionVL did
with these weights. It has no mask token: it gets the first id that its tokenizer leaves free, unless the tokenizer or
config.json (`mask_token_id`) has one.

Source: arXiv:2502.13923; transformers' models/qwen2_5_vl. Fields and weights are read as the hub has them (flat, and
under `visual.` and `model.`) and as transformers 5 writes them (nested, and under `model.visual.` and
`model.language_model.`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmllm.families import dimple, dream, qwen_vl
from dmllm.families.family import Family, Fields, Key, need, require

MASK, END = 151665, 151645
NESTED = tuple(replace(key, theirs=key.theirs.replace("model.", "model.language_model.")) for key in dream.KEYS)
KEYS: tuple[Key, ...] = (
    *dream.KEYS,
    *(key for key in NESTED if key.theirs.startswith("model.")),
    *qwen_vl.tower_keys("visual", qwen_vl.QWEN2_5),
    *qwen_vl.tower_keys("model.visual", qwen_vl.QWEN2_5),
)


def text_of(config: Fields, mask: int, section: tuple[int, ...]) -> dict[str, Any]:
    """The fields of `DmllmConfig` that concern text, for a causal model of Qwen2's or Qwen3's shape behind a tower.

    Args:
        mask: the mask token, and section: the frequencies that time, height and width turn, where nothing says them.
    """
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    require({"rope_scaling": kind}, rope_scaling=(None, "default", "mrope"))
    plain = {name: value for name, value in text.items() if name not in ("rope_scaling", "rope_parameters")}
    plain["rope_theta"] = text.get("rope_theta") or need(rope, "rope_theta")
    plain["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    last = need(text, "vocab_size") - 1  # of small models
    ids = {"mask_token_id": mask, "eos_token_id": min(END, last), "pad_token_id": min(qwen_vl.PAD, last)}
    ids |= {name: found for name in ids if (found := config.get(name, text.get(name))) is not None}
    own = dream.to_dmllm({**plain, **ids})
    turned = {"mrope_section": list(rope.get("mrope_section", section))}
    return {**own, "backbone": {**own["backbone"], **turned}, "visibility": "causal"}


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    said = need(config, "vision_config")
    shape = {name: said.get(name, value) for name, value in dimple.TOWER.items()}
    return {
        **text_of(config, MASK, qwen_vl.SECTION),
        **qwen_vl.to_dmllm(config, "qwen2_5_vl", shape, max_pixels=dimple.MAX_PIXELS),
        "projector": {"name": "identity"},
    }


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL 3B, 7B, 32B, 72B, as a start",
    source="arXiv:2502.13923; transformers",
    recognise=lambda config: config.get("model_type") == "qwen2_5_vl",
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_(pos_)?emb\.inv_freq",),
    beside=qwen_vl.BESIDE,
    chat_template=qwen_vl.template("<|vision_start|><|image_pad|><|vision_end|>"),
    processor={"max_length": 32768},
    start=True,
    decode={"max_new_tokens": 64, "block_length": 1},
    verified="logits against transformers: tests/families/test_qwen2_5_vl.py",
    example={
        **dream.EXAMPLE,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": 305,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 56,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    },
)
