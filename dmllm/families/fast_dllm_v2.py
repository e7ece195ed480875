"""Fast-dLLM v2: Qwen2.5 in blocks of 32, each seen whole and those before it; the row before a position predicts it.

Of generate's arguments small_block_size is `sub_block_length`, block_size `block_length`, use_block_cache
`sub_block_cache`; so are batch_sample's. It fills max_new_tokens // block_size blocks, the one in which the prompt of P
tokens ends being the first, and adds the token after them: here max_new_tokens = blocks * block_size - P % block_size
+ 1, in as many calls.

The configuration adds `bd_size`, the block. The mask and stop tokens are arguments of the authors' `generate`; their
defaults, words of Qwen2.5's vocabulary, hold where config.json does not say (`mask_token_id`, `eos_token_id`).

Source: Wu et al., arXiv:2509.26328; code Efficient-Large-Model/Fast_dLLM_v2_7B (modeling.py) and NVlabs/Fast-dLLM.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from dmllm.families.dream import KEYS, backbone
from dmllm.families.family import Family, Fields, need, require

MASK, STOP = 151665, 151645  # |<MASK>|, <|im_end|>


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(config, attention_bias=(True, None))
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"config.json: layer_types={config['layer_types']} is not supported; only full_attention is.")
    block_size, known = config.get("bd_size", 32), need(config, "vocab_size")
    mask = config.get("mask_token_id")
    if mask is None:
        if known <= MASK:
            raise ValueError(
                f"config.json lacks mask_token_id; the usual {MASK} is beyond vocab_size={known}. Type: "
                'load(..., config={"mask_token_id": N}).'
            )
        mask = MASK
    eos = config.get("eos_token_id")
    if eos is None:
        eos = STOP if known > STOP else mask  # the mask is never predicted, so nothing ends before the canvas does
    pad = config.get("pad_token_id")
    return {
        "backbone": {**backbone(config), "qkv_bias": True},
        "mask_token_id": mask,
        "eos_token_id": eos,
        "pad_token_id": eos if pad is None else pad,
        "visibility": f"block:{block_size}",
        "shift": True,
    }


FAST_DLLM_V2 = Family(
    name="fast_dllm_v2",
    title="Fast-dLLM v2 1.5B, 7B",
    source="arXiv:2509.26328; Efficient-Large-Model/Fast_dLLM_v2_7B",
    recognise=lambda config: str(config.get("model_type", "")).lower() == "fast_dllm_qwen",
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq",),
    decode={
        "max_new_tokens": 128,
        "sub_block_length": 8,
        "threshold": 0.9,
        "count_mask": True,
        "store_calls": True,
        "prompt_first": True,
    },
    decode_of=lambda config: {"sub_block_length": gcd(8, config.get("bd_size", 32))},
    verified="logits in blocks and causal: tests/families/test_fast_dllm_v2.py; generations, forwards and batches: "
    "tests/families/test_fast_dllm_v2_decode.py",
    quirks=(
        ("A prompt of exactly one block is not read: it is neither stored nor fed", "fixed", "it is the context"),
        ("Inside a block the calls use blocks of 32, whatever block_size is", "fixed", "they use bd_size"),
        (
            "batch_sample overwrites the last prompt token of the longest row where it is the first of a block that "
            "another row has yet to reach",
            "fixed",
            "a row of a batch is what generate gives for it alone",
        ),
        (
            "batch_sample predicts the first token behind a prompt of whole blocks from its own place, where another "
            "row is shorter by a block and another longer",
            "fixed",
            "as above",
        ),
        (
            "batch_sample goes on behind a stop token that is the first of a block, and feeds whole blocks while the "
            "first token of a sub-block is open in any row, with use_block_cache",
            "fixed",
            "as above",
        ),
    ),
    example={
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "model_type": "Fast_dLLM_Qwen",
        "bd_size": 8,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 320,
        "bos_token_id": 301,
        "eos_token_id": 300,
        "mask_token_id": 302,
    },
)
