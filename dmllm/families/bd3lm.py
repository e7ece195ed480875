"""BD3-LM: MDLM's transformer, blocks one after another, each denoised given those before it.

Every row sees its own block and the blocks before it. A checkpoint carries the noise probabilities between which its
training drew last (`sampling_eps_min`, `sampling_eps_max`); they do not change the network and are kept.

Source: Arriola et al., arXiv:2503.09573; code kuleshov-group/bd3lms (diffusion.py, models/hf).
"""

from __future__ import annotations

from typing import Any

from dmllm.families.family import Family, Fields, Rename, need, require
from dmllm.families.mdlm import backbone, keys, special_ids, wavelengths

KEYS = (
    *keys("backbone."),
    Rename("sampling_eps_min", "backbone.noise_min"),
    Rename("sampling_eps_max", "backbone.noise_max"),
)


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(config, adaln=True, causal=False, time_conditioning=False)
    vocab_size, block_size = need(config, "vocab_size"), need(config, "block_size")
    shape = backbone(config, "hidden_dim", vocab_size, False)
    mask = config.get("mask_token_id")
    return {
        "backbone": {**shape, "noise_range": bool(config.get("var_min", True))},
        **special_ids(config, vocab_size - 1 if mask is None else mask),
        "visibility": f"block:{block_size}" if config.get("cross_attn", True) else "full",
    }


BD3LM = Family(
    name="bd3lm",
    title="BD3-LM, block sizes 4, 8, 16",
    source="arXiv:2503.09573; kuleshov-group/bd3lms",
    recognise=lambda config: config.get("model_type") == "bd3lm",
    config=to_dmllm,
    keys=KEYS,
    computed=wavelengths("backbone.", "hidden_dim"),
    decode={"max_new_tokens": 128, "remasking": "random", "temperature": 1.0, "top_p": 0.9},
    verified="logits in training and in decoding, losses: tests/families/test_bd3lm.py; first-hitting sampler: "
    "tests/families/test_recorded_samplers.py",
    quirks=(
        (
            "Of top_p, the token with which the sum passes it is left out",
            "fixed",
            "it is kept: the smallest set that reaches top_p",
        ),
    ),
    example={
        "model_type": "bd3lm",
        "block_size": 4,
        "vocab_size": 320,
        "eos_token_id": 318,
        "model_length": 64,
        "cross_attn": True,
        "adaln": True,
        "attn_backend": "sdpa",
        "causal": False,
        "hidden_dim": 64,
        "cond_dim": 16,
        "n_blocks": 2,
        "n_heads": 4,
        "dropout": 0.1,
        "time_conditioning": False,
        "var_min": True,
        "sampling_eps_min": 0.001,
        "sampling_eps_max": 1.0,
    },
)
