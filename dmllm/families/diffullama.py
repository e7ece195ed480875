"""DiffuLLaMA: LLaMA-2 adapted to full attention; the row before a position predicts it.

The weights are named as the authors' wrapper (`DiscreteDiffusionModel`) saves them or, on the hub, as Llama's. What
tells config.json from a Llama's is the id of the mask token, `mask_token_id`: for the released 7B model, whose
config.json lacks it, write 811 there, the old word of the vocabulary that the authors took.

Source: Gong et al., arXiv:2410.17891; code HKUNLP/DiffuLLaMA (model.py, attention_patch.py, inf_diffullama.py).
"""

from __future__ import annotations

from typing import Any

from dmllm.families.dream import backbone
from dmllm.families.family import Family, Fields, Rename, need, require
from dmllm.families.mdlm import PROCESS


def keys(base: str, embedding: str) -> tuple[Rename, ...]:
    """The weights of a Llama whose layers lie under `base`, and its embedding."""
    parts = (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        "input_layernorm",
        "post_attention_layernorm",
    )
    return (
        Rename(embedding, "backbone.embed_tokens.weight"),
        Rename(f"{base}.norm.weight", "backbone.norm.weight"),
        *(Rename(f"{base}.layers.{{n}}.{part}.weight", f"backbone.layers.{{n}}.{part}.weight") for part in parts),
    )


KEYS = (
    Rename("lm_head.weight", "backbone.lm_head.weight"),
    *keys("denoise_model", "embed_tokens.weight"),
    *keys("model", "model.embed_tokens.weight"),
)


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(config, attention_bias=(False, None))
    eos, pad = need(config, "eos_token_id"), config.get("pad_token_id")
    return {
        "backbone": backbone(config),
        "mask_token_id": need(config, "mask_token_id"),
        "eos_token_id": eos,
        "pad_token_id": eos if pad is None else pad,
        "visibility": "full",
        "shift": True,
    }


DIFFULLAMA = Family(
    name="diffullama",
    title="DiffuLLaMA 7B",
    source="arXiv:2410.17891; HKUNLP/DiffuLLaMA",
    recognise=lambda config: config.get("model_type") == "llama" and {"mask_token_id", "hidden_size"} <= set(config),
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq",),
    decode={**PROCESS, "max_new_tokens": 256, "steps": 64, "temperature": 0.9, "top_p": 0.9},
    verified="logits with full and causal attention, loss: tests/families/test_diffullama.py; sampler: "
    "tests/families/test_recorded_samplers.py",
    quirks=(
        (
            "The loss is divided by the number of hidden tokens",
            "reduction: masked",
            "weighted by 1/t that is no bound; reduction: tokens is one",
        ),
    ),
    example={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 320,
        "bos_token_id": 301,
        "eos_token_id": 300,
        "mask_token_id": 302,
    },
)
