"""LLaDA-V 8B: LLaDA under Llama's names behind a SigLIP 2 tower; pictures in up to 36 tiles, their map made smaller.

Source: You et al., arXiv:2505.16933; code ML-GSAI/LLaDA-V (train/llava/**).

The ids of the mask and of what is never produced are constants of the code, not fields of config.json: for another
vocabulary, config.json or load(config=...) says `mask_token_id`, and `suppress_ids` is a decode option.
"""

from __future__ import annotations

from typing import Any

from dmllm.families import dream, llada, llava
from dmllm.families.family import Family, Fields, need, require

MASK = 126336
SUPPRESSED = [126080, 126081, 126346, 126347]  # start and end of text, start and end of a header


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(config, attention_bias=(False, None), pretraining_tp=(1, None))
    eos = need(config, "eos_token_id")
    return {
        "backbone": {**dream.backbone(config), "attention": "eager"},
        "mask_token_id": config.get("mask_token_id", MASK),
        "eos_token_id": eos,
        "pad_token_id": eos,
        "visibility": "full",
        **llava.to_dmllm(config, threads=2),
    }


def decode_of(config: Fields) -> dict[str, Any]:
    """What is never produced: the authors' ids, or in another vocabulary those that config.json names."""
    known = [config.get(name) for name in ("bos_token_id", "eos_token_id")]
    ids = SUPPRESSED if need(config, "vocab_size") > max(SUPPRESSED) else sorted({i for i in known if type(i) is int})
    return {"suppress_ids": ids}


EXAMPLE = {
    "architectures": ["LlavaLLaDAModelLM"],
    "model_type": "llava_llada",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 320,
    "mask_token_id": 302,
    "bos_token_id": 299,
    "eos_token_id": 300,
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "mm_hidden_size": 16,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "google/siglip2-so400m-patch14-384",
}
TOWER_EXAMPLE = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}

LLADA_V = Family(
    name="llada_v",
    title="LLaDA-V 8B",
    source="arXiv:2505.16933; ML-GSAI/LLaDA-V",
    recognise=lambda config: (
        "d_model" not in config
        and "hidden_size" in config
        and (
            config.get("model_type") == "llava_llada"
            or (config.get("model_type") == "llada" and "mm_vision_tower" in config)
        )
    ),
    config=to_dmllm,
    keys=(*dream.KEYS, *llava.TOWER_KEYS, *llava.projector_keys("projector")),
    ignored=(r".*rotary_emb\.inv_freq",),
    beside=llava.BESIDE,
    chat_template=llava.template(llada.CHAT_TEMPLATE),
    processor={"max_length": 16384, "tiling": {"several": "pad"}},
    decode={"max_new_tokens": 128, "block_length": 128, "count_mask": True, "fill_behind_eos": False},
    decode_of=decode_of,
    verified="tiles, features, merged streams, logits, generations, forwards: tests/families/test_llada_v.py; losses: "
    "tests/families/test_losses.py",
    example={**EXAMPLE, "vision_config": TOWER_EXAMPLE},
    quirks=(
        (
            "What is masked is found by comparing embeddings, so a mask token that is produced stays masked",
            "choose_mask",
            "the call that produced it is lost, and what is left so at a block's end is a hole in the answer",
        ),
        (
            "tokenizer_image_token drops the first token behind each <image> where the text opens with the start token",
            "fixed",
            "it takes that token for a start token, which the tokenizer would have added",
        ),
        (
            "Several pictures: the training data and the evaluation pad each, the model's own code tiles each",
            "tiling.several: same or pad",
            "a conversation pads them; ids alone, without a processor, are cut as config.json says",
        ),
    ),
)
