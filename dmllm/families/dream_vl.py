"""Dream-VL 7B: Dream with Qwen2-VL's tower at native resolution and a projector behind its merger.

A picture stands in the text as its image tokens alone, without Qwen's start and end tokens around it. By these the
authors' code finds the pictures whose rows take positions in time, height and width; it finds none, and all positions
count on, as they do in training. `mrope_section` of config.json is so never felt.

Source: Ye et al., arXiv:2512.22615; code DreamLM/Dream-VLX: vl/train/dreamvl (config.json and preprocessor_config.json
too) and vl/train/export.py, which names the weights and the chat template. The published weights and tokenizer were
not seen.
"""

from __future__ import annotations

from typing import Any

from dmllm.families import dream, qwen_vl
from dmllm.families.family import Family, Fields, require

TOWER = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MAX_PIXELS = 3_211_264


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(config, projector_hidden_act="gelu", full_attn_mask=True)
    said = config.get("vision_config") or {}
    require(said, in_chans=3)
    shape = {name: said.get(name, value) for name, value in TOWER.items()}
    ids = {"mask_token_id": qwen_vl.MASK, "pad_token_id": qwen_vl.PAD, "eos_token_id": qwen_vl.PAD}
    own = dream.to_dmllm({**ids, **config})
    return {
        **own,
        **qwen_vl.to_dmllm(config, "qwen2_vl", shape, max_pixels=MAX_PIXELS),
        "projector": {"name": "mlp2x_gelu"},
    }


DREAM_VL = Family(
    name="dream_vl",
    title="Dream-VL 7B",
    source="arXiv:2512.22615; DreamLM/Dream-VLX",
    recognise=lambda config: str(config.get("model_type", "")).lower() in ("dream-vl", "dream_vl"),
    config=to_dmllm,
    keys=(*dream.KEYS, *qwen_vl.tower_keys("visual", qwen_vl.QWEN2), *qwen_vl.projector_keys("projector")),
    ignored=(r".*rotary_(pos_)?emb\.inv_freq",),
    beside=qwen_vl.BESIDE,
    chat_template=qwen_vl.template("<|image_pad|>"),
    tokenizer="Qwen2Tokenizer",
    processor={"max_length": 32768},
    decode={
        "max_new_tokens": 128,
        "steps": 128,
        "schedule": "time",
        "remasking": "low_confidence",
        "temperature": 0.1,
        "count_mask": True,
    },
    verified="pixels, logits, generations, forwards: tests/families/test_dream_vl.py",
    quirks=(
        (
            "diffusion_generate takes top_k=50 from transformers' defaults, and confidence from what that leaves",
            "fixed; theirs with top_k=None",
            "nothing in the paper or the examples asks for it",
        ),
        (
            "Pictures have no positions in height and width, though mrope_section is set",
            "the same here",
            "its template lacks the start token by which the code finds pictures, and its training had none either",
        ),
        (
            "On a CPU the attention mask must be boolean: whole numbers raise RuntimeError",
            "fixed",
            "it is made a mask on CUDA only",
        ),
    ),
    example={
        **dream.EXAMPLE,
        "architectures": ["DreamVLModel"],
        "model_type": "dream-vl",
        "full_attn_mask": True,
        "image_token_id": 305,
        "mrope_section": [2, 3, 3],
        "projector_hidden_act": "gelu",
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "hidden_act": "quick_gelu",
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 14,
        },
    },
)
