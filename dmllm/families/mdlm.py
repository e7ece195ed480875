"""MDLM: a diffusion transformer that denoises the whole text, in the two forms in which it is stored.

"mdlm" is the authors' network with their training configuration, "mdlm_hub" the model on the hub (mdlm-owt), whose
weights lie under `backbone.` and whose config.json is flat. The mask token is no word of the tokenizer; it is the last
row of the vocabulary, unless the configuration says which.

Source: Sahoo et al., arXiv:2406.07524; code kuleshov-group/mdlm (diffusion.py, models/dit.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmllm.families.family import Family, Fields, Key, Rename, Split, need, require

GPT2_EOS = 50256
ROPE_THETA = 10000.0
PROCESS = {"schedule": "time", "remasking": "origin", "eps": 1e-5}  # ancestral sampling, the corruption run backwards


def keys(prefix: str) -> tuple[Key, ...]:
    """The weights of the authors' transformer, which lie under `prefix`."""
    block, ours = f"{prefix}blocks.{{n}}.", "backbone.layers.{n}."
    return (
        Rename(f"{prefix}vocab_embed.embedding", "backbone.embed_tokens.weight"),
        Rename(f"{prefix}output_layer.norm_final.weight", "backbone.norm.weight"),
        Rename(f"{block}norm1.weight", f"{ours}input_layernorm.weight"),
        Rename(f"{block}norm2.weight", f"{ours}post_attention_layernorm.weight"),
        Rename(f"{block}attn_out.weight", f"{ours}self_attn.o_proj.weight"),
        Split(
            f"{block}attn_qkv.weight",
            tuple(f"{ours}self_attn.{part}_proj.weight" for part in "qkv"),
            rows=lambda backbone: (backbone["hidden_size"],) * 3,
        ),
        *(
            Rename(f"{theirs}.{kind}", f"{place}.{kind}")
            for theirs, place in (
                (f"{prefix}sigma_map.mlp.0", "backbone.noise_embedding.up_proj"),
                (f"{prefix}sigma_map.mlp.2", "backbone.noise_embedding.down_proj"),
                (f"{prefix}output_layer.adaLN_modulation", "backbone.modulation"),
                (f"{prefix}output_layer.linear", "backbone.lm_head"),
                (f"{block}adaLN_modulation", f"{ours}modulation"),
                (f"{block}mlp.0", f"{ours}mlp.up_proj"),
                (f"{block}mlp.2", f"{ours}mlp.down_proj"),
            )
            for kind in ("weight", "bias")
        ),
    )


def wavelengths(prefix: str, width: str) -> Callable[[Fields], dict[str, Tensor]]:
    """The rotary frequencies that the authors' checkpoints carry; `width` is the field of the hidden size."""

    def computed(config: Fields) -> dict[str, Tensor]:
        shape = config.get("model", config)
        head_dim = need(shape, width) // need(shape, "n_heads")
        exponent = torch.arange(0, head_dim, 2).float() / head_dim
        return {f"{prefix}rotary_emb.inv_freq": 1.0 / (ROPE_THETA**exponent)}

    return computed


def backbone(shape: Fields, width: str, vocab_size: int, time_conditioning: Any) -> dict[str, Any]:
    """The fields of `DiTConfig`; `width` is the field of the hidden size."""
    return {
        "type": "dit",
        "vocab_size": vocab_size,
        "hidden_size": need(shape, width),
        "num_hidden_layers": need(shape, "n_blocks"),
        "num_attention_heads": need(shape, "n_heads"),
        "cond_dim": need(shape, "cond_dim"),
        "time_conditioning": bool(time_conditioning),
        "rope_theta": ROPE_THETA,
    }


def special_ids(config: Fields, mask: int) -> dict[str, int]:
    """The ids of `DmllmConfig`. Without an end of sequence the mask stands for it: it is never predicted."""
    eos = config.get("eos_token_id")
    if eos is None:
        eos = GPT2_EOS if mask == GPT2_EOS + 1 else mask
    return {"mask_token_id": mask, "eos_token_id": eos, "pad_token_id": config.get("pad_token_id", eos)}


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`, from the authors' training configuration."""
    require(config, parameterization="subs", backbone=("dit", None), change_of_variables=False)
    require(config.get("noise", {}), type="loglinear", eps=1e-3)
    require(config.get("training", {}), change_of_variables=False)
    vocab_size, mask = need(config, "vocab_size"), need(config, "mask_index")
    return {
        "backbone": backbone(need(config, "model"), "hidden_size", vocab_size, config.get("time_conditioning")),
        **special_ids(config, mask),
        "visibility": "full",
    }


def hub_to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`, from the hub's config.json."""
    vocab_size = need(config, "vocab_size")
    return {
        "backbone": backbone(config, "hidden_dim", vocab_size, config.get("time_conditioning")),
        **special_ids(config, config.get("mask_token_id") or vocab_size - 1),
        "visibility": "full",
    }


MDLM = Family(
    name="mdlm",
    title="MDLM, as trained by its authors' code",
    source="arXiv:2406.07524; kuleshov-group/mdlm",
    recognise=lambda config: "parameterization" in config and "n_blocks" in (config.get("model") or {}),
    config=to_dmllm,
    keys=keys(""),
    computed=wavelengths("", "hidden_size"),
    decode={**PROCESS, "max_new_tokens": 128, "steps": 128, "temperature": 1.0},
    verified="logits, losses: tests/families/test_mdlm.py; sampler: tests/families/test_recorded_samplers.py",
    quirks=(
        ("noise.eps is not read; the log-linear schedule has 1e-3", "fixed", "another value in config.json is refused"),
        ("Sampling ends with a call at which what is left takes its most probable token", "fixed", "it is drawn too"),
    ),
    example={
        "model": {"hidden_size": 64, "cond_dim": 16, "length": 64, "n_blocks": 2, "n_heads": 4, "dropout": 0.1},
        "backbone": "dit",
        "parameterization": "subs",
        "time_conditioning": False,
        "T": 0,
        "vocab_size": 320,
        "mask_index": 319,
        "eos_token_id": 318,
        "noise": {"type": "loglinear", "eps": 0.001},
    },
)
MDLM_HUB = replace(
    MDLM,
    name="mdlm_hub",
    title="MDLM on the hub: mdlm-owt",
    recognise=lambda config: config.get("model_type") == "mdlm" and "hidden_dim" in config,
    config=hub_to_dmllm,
    keys=keys("backbone."),
    computed=wavelengths("backbone.", "hidden_dim"),
    example={
        "model_type": "mdlm",
        "hidden_dim": 64,
        "cond_dim": 16,
        "model_length": 64,
        "n_blocks": 2,
        "n_heads": 4,
        "dropout": 0.1,
        "time_conditioning": False,
        "vocab_size": 320,
        "eos_token_id": 318,
    },
)
