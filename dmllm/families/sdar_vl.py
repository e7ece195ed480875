"""SDAR-VL 4B and 8B: SDAR behind a SigLIP tower, in the frame of transformers' LLaVA-OneVision.

The whole tower is read, without the norm behind its last layer; pictures are cut as LLaVA-OneVision cuts them, their
map made smaller beyond nine tiles; blocks run over the whole sequence, pictures included. Where a
preprocessor_config.json names a "fast" processor, as the authors' does, pixels are resized by torch as that does it;
else by Pillow.

Source: Cheng et al., arXiv:2512.14068; code JetAstra/SDAR-VL (inference/sdar_v_4b, sdar_v_8b, generate.py).
"""

from __future__ import annotations

from typing import Any

from dmllm.families import dream, llava, sdar
from dmllm.families.family import Family, Fields, Rename, need, require

MASK, IMAGE = 151669, 151655
LANGUAGE, TOWER, PROJECTOR = "model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector."


def _renamed(key: Rename, before: str, after: str) -> Rename:
    return Rename(key.theirs.replace(before, after, 1), key.ours)


KEYS = (
    *(_renamed(key, "model.", LANGUAGE) for key in dream.KEYS if not key.theirs.endswith(".bias")),
    *(_renamed(key, llava.THEIR_TOWER, TOWER) for key in llava.TOWER_KEYS),
    *(
        Rename(f"{PROJECTOR}linear_{number}.{kind}", f"projector.{place}.{kind}")
        for number, place in ((1, 0), (2, 2))
        for kind in ("weight", "bias")
    ),
)


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(
        config,
        projector_hidden_act="gelu",
        multimodal_projector_bias=(True, None),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    text, tower = need(config, "text_config"), need(config, "vision_config")
    require(tower, model_type="siglip_vision_model", vision_use_head=(False, None))
    width, layers = need(tower, "hidden_size"), need(tower, "num_hidden_layers")
    common = {name: config.get(name) for name in ("mask_token_id", "eos_token_id", "pad_token_id", "block_size")}
    language = {**{name: value for name, value in common.items() if value is not None}, **text}
    if language.get("mask_token_id") is None and need(text, "vocab_size") > MASK:
        language["mask_token_id"] = MASK
    cut = {
        "image_aspect_ratio": config.get("vision_aspect_ratio") or "anyres_max_9",
        "image_grid_pinpoints": [[width, height] for height, width in need(config, "image_grid_pinpoints")],
    }
    ours = sdar.to_dmllm(language)
    fast = str((config.get("preprocessor_config") or {}).get("image_processor_type")).endswith("Fast")
    # What stands before the norm behind the last layer is what stands before one layer more.
    shape = {**tower, "num_hidden_layers": layers + 1}
    return {
        **ours,
        "backbone": {
            **ours["backbone"],
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings"))),
        },
        "vision": {"name": "hf:siglip", "layer": -2, "options": shape},
        "projector": {"name": "mlp2x_gelu"},
        "tiling": {
            **llava.tiling(cut, need(tower, "image_size")),
            **({"interpolation": "torch_bicubic"} if fast else {}),
        },
        "row_break": True,
        "image_token_id": config.get("image_token_index") or config.get("image_token_id") or IMAGE,
        "unused": {"post_layernorm_weight": [width], "post_layernorm_bias": [width]},
    }


SDAR_VL = Family(
    name="sdar_vl",
    title="SDAR-VL 4B and 8B, Instruct and Think",
    source="arXiv:2512.14068; JetAstra/SDAR-VL",
    recognise=lambda config: config.get("model_type") == "sdar_v",
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq", r".*position_ids"),
    beside=("preprocessor_config.json",),
    tokenizer="Qwen2Tokenizer",
    processor={"max_length": 16384},
    decode=sdar.SDAR.decode,
    decode_of=lambda config: sdar.ends(need(config, "text_config")),
    verified="pixels, features, logits, generations, forwards: tests/families/test_sdar_vl.py",
    quirks=(
        (
            "generate.py reads pictures in the call that stores the prompt's whole blocks; one that ends in the block "
            "behind them is a mismatch of rows (ValueError)",
            "fixed",
            "its rows are rows of the prompt wherever they stand",
        ),
        (
            "generate.py stops where the answer's tail repeats itself 20 times",
            "not done",
            "stop_sequences= says what ends",
        ),
    ),
    example={
        "architectures": ["SDARVForConditionalGeneration"],
        "model_type": "sdar_v",
        "image_token_index": 259,
        "image_grid_pinpoints": [[56 * i, 56 * j] for i in range(1, 4) for j in range(1, 4)],
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {**sdar.SDAR.example, "model_type": "sdar"},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
    },
)
