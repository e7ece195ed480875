"""Dimple 7B: Dream with Qwen2.5-VL's tower at native resolution, a projector behind its merger, three-axis positions.

The prompt sees the answer: the authors' evaluation code masks padding alone, and the mask in which prompt rows see the
prompt alone (in their training code) is nowhere called. With `use_cache=True` they keep the keys and values that
prompt rows had beside the all-mask canvas of the first call; that is another result, and not computed here.

Source: Yu, Ma and Wang, arXiv:2505.16990; code yu-rp/Dimple (lmms-eval/lmms_eval/models/dimple_model). The published
config.json, preprocessor_config.json and tokenizer were not seen: what they say is read, and defaults are those of the
code and of Qwen2.5-VL, from which the authors' init.py takes them.
"""

from __future__ import annotations

from typing import Any

from dmllm.families import dream, qwen_vl
from dmllm.families.family import Family, Fields, require

TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
MAX_PIXELS = 12_845_056  # Qwen2.5-VL's


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(config, full_attn_mask=(True, False))
    said = config.get("vision_config") or {}
    shape = {name: said.get(name, value) for name, value in TOWER.items()}
    ids = {"mask_token_id": qwen_vl.MASK, "pad_token_id": qwen_vl.PAD}
    ids |= {"eos_token_id": config.get("pad_token_id", qwen_vl.PAD)}
    own = dream.to_dmllm({**ids, **config})
    return {
        **own,
        **qwen_vl.to_dmllm(config, "qwen2_5_vl", shape, max_pixels=MAX_PIXELS),
        "backbone": {**own["backbone"], "mrope_section": qwen_vl.sections(config)},
        "projector": {"name": "mlp2x_silu"},
        "visibility": "full" if config.get("full_attn_mask", True) else "causal",
    }


DIMPLE = Family(
    name="dimple",
    title="Dimple 7B",
    source="arXiv:2505.16990; yu-rp/Dimple",
    recognise=lambda config: config.get("model_type") == "dimple",
    config=to_dmllm,
    keys=(*dream.KEYS, *qwen_vl.tower_keys("visual", qwen_vl.QWEN2_5), *qwen_vl.projector_keys("img_projector")),
    ignored=(r".*rotary_(pos_)?emb\.inv_freq",),
    beside=qwen_vl.BESIDE,
    chat_template=qwen_vl.template("<|vision_start|><|image_pad|><|vision_end|>"),
    tokenizer="Qwen2Tokenizer",
    processor={"max_length": 32768},
    decode={
        "max_new_tokens": 64,
        "steps": 64,
        "schedule": "confident",
        "remasking": "origin",
        "threshold": 0.95,
        "temperature": 0.2,
        "top_p": 0.95,
        "count_mask": True,
    },
    verified="pixels, positions, logits; tokens and forwards of Dream's decoding, and of the threshold one token at a "
    "time: tests/families/test_dimple.py",
    quirks=(
        (
            "diffusion_generate takes top_k=50 from transformers' defaults, and confidence from what that leaves",
            "fixed; theirs with top_k=None",
            "nothing in the paper or the examples asks for it",
        ),
        (
            "With alg=entropy a threshold is compared with a negative entropy, and nothing ever exceeds it",
            "fixed; threshold: null is theirs",
            "the threshold is of a probability",
        ),
        (
            "use_cache=True keeps the prompt's keys and values of the first call, when the answer was all masks",
            "fixed",
            "with full attention they depend on the answer, so that the cache changes the result",
        ),
        (
            "Without a cache the next call fails once an answer holds the image token",
            "fixed",
            "the code looks for image places in the answer too",
        ),
    ),
    example={
        **dream.EXAMPLE,
        "architectures": ["DimpleModel"],
        "model_type": "dimple",
        "full_attn_mask": True,
        "image_token_id": 305,
        "mrope_section": [2, 3, 3],
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "hidden_act": "silu",
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 56,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    },
)
