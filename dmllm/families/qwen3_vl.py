"""Qwen3-VL, a causal model, as the start of a diffusion model: its logits aligned, its visibility free to be changed.

What three of the tower's layers say is added to the stream behind the language model's first three (DeepStack), and
time, height and width turn its rotary frequencies in turns. It has no mask token: it gets the first id that
its tokenizer leaves free, unless the tokenizer or config.json (`mask_token_id`) has one.

Source: arXiv:2511.21631; transformers' models/qwen3_vl and models/qwen3_vl_moe. The hub's experts of a layer are stacks
with a row for each input, those that transformers writes have one for each output; either is read. The chat template is
that of the Instruct models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmllm.families import dream, qwen2_5_vl, qwen_vl
from dmllm.families.family import Family, Fields, Key, Rename, Split, need, require

MASK = 151669
SECTION = (24, 20, 20)
TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
MIN_PIXELS, MAX_PIXELS = 256 * 256, 4096 * 4096  # of its preprocessor_config.json
HALF = (0.5, 0.5, 0.5)

LAYER, OURS = "model.language_model.layers.{n}.mlp.", "backbone.layers.{n}.mlp."
KEYS: tuple[Key, ...] = (
    *(key for key in qwen2_5_vl.NESTED if not key.theirs.endswith("bias")),
    *qwen_vl.tower_keys("model.visual", qwen_vl.QWEN3),
)
EXPERTS: tuple[Key, ...] = (
    Rename(f"{LAYER}gate.weight", f"{OURS}router.weight"),
    Split(
        f"{LAYER}experts.gate_up_proj",
        (f"{OURS}experts.gate_proj", f"{OURS}experts.up_proj"),
        lambda ours: (ours["moe"]["moe_intermediate_size"],) * 2,
        transposed=True,
    ),
    Split(
        f"{LAYER}experts.down_proj",
        (f"{OURS}experts.down_proj",),
        lambda ours: (ours["hidden_size"],),
        transposed=True,
    ),
)


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    text, said = need(config, "text_config"), need(config, "vision_config")
    require(text, attention_bias=False)
    require(text.get("rope_parameters") or text.get("rope_scaling") or {}, mrope_interleaved=True)
    require(said.get("rope_parameters") or {}, rope_type="axial", rope_theta=10000.0)
    shape = {name: said.get(name, value) for name, value in TOWER.items()}
    pictures = qwen_vl.to_dmllm(config, "qwen3_vl", shape, max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS, scale=HALF)
    ours = qwen2_5_vl.text_of(config, MASK, SECTION)
    own = {"qkv_bias": False, "qk_norm": True, "mrope_interleaved": True}
    return {**ours, **pictures, "backbone": {**ours["backbone"], **own}, "projector": {"name": "identity"}}


def to_dmllm_moe(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`, with experts."""
    text, ours = need(config, "text_config"), to_dmllm(config)
    require(text, norm_topk_prob=True)
    step, dense = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or ()
    moe = {
        "num_experts": need(text, "num_experts", "num_local_experts"),
        "num_experts_per_tok": need(text, "num_experts_per_tok"),
        "moe_intermediate_size": need(text, "moe_intermediate_size"),
        "norm_topk_prob": True,
        "dense_layers": [n for n in range(text["num_hidden_layers"]) if n in dense or (n + 1) % step],
    }
    return {**ours, "backbone": {**ours["backbone"], "moe": moe}}


EXAMPLE = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": 305,
    "tie_word_embeddings": False,
    "text_config": {
        **{name: value for name, value in dream.EXAMPLE.items() if name not in ("architectures", "rope_theta")},
        "model_type": "qwen3_vl_text",
        "head_dim": 16,
        "attention_bias": False,
        "num_hidden_layers": 3,
        "rope_theta": 5000000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
}

QWEN3_VL = Family(
    name="qwen3_vl",
    title="Qwen3-VL 2B, 4B, 8B, 32B, as a start",
    source="arXiv:2511.21631; transformers",
    recognise=lambda config: config.get("model_type") == "qwen3_vl",
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_(pos_)?emb\.inv_freq",),
    beside=qwen_vl.BESIDE,
    chat_template=qwen_vl.template("<|vision_start|><|image_pad|><|vision_end|>", system=None),
    processor={"max_length": 32768},
    start=True,
    decode={"max_new_tokens": 64, "block_length": 1},
    verified="logits against transformers: tests/families/test_qwen3_vl.py",
    example=EXAMPLE,
)
QWEN3_VL_MOE = replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    title="Qwen3-VL 30B-A3B, 235B-A22B, as a start",
    recognise=lambda config: config.get("model_type") == "qwen3_vl_moe",
    config=to_dmllm_moe,
    keys=(*KEYS, *EXPERTS),
    example={
        **EXAMPLE,
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "text_config": {
            **EXAMPLE["text_config"],
            "model_type": "qwen3_vl_moe_text",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    },
)
