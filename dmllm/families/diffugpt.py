"""DiffuGPT: GPT-2 adapted to full attention; the row before a position predicts it.

The weights are named as the authors' wrapper (`DiscreteDiffusionModel`) saves them, or as GPT-2's. What tells
config.json from a GPT-2's is that class, or the id of the mask token, `mask_token_id`: small took an old word of the
vocabulary, medium a new one, for which the embedding, if not vocab_size, grew to an even number of rows.

Source: Gong et al., arXiv:2410.17891; code HKUNLP/DiffuLLaMA (model.py, attention_patch.py, inf_diffugpt.py, and in
LLaMA-Factory model/loader.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmllm.families.diffullama import DIFFULLAMA
from dmllm.families.family import Columns, Fields, Key, Rename, Split, need, require

MASKS = {768: 10541, 1024: 50257}  # of the released models, which their config.json does not name; by width


def keys(base: str, embedding: str) -> tuple[Key, ...]:
    """The weights of a GPT-2 whose layers lie under `base`, and its embedding; matrices are stored input by output."""
    block, ours = f"{base}h.{{n}}.", "backbone.layers.{n}."
    fused = tuple(f"{ours}self_attn.{part}_proj" for part in "qkv")
    plain = (
        (f"{base}ln_f", "backbone.norm"),
        (f"{block}ln_1", f"{ours}input_layernorm"),
        (f"{block}ln_2", f"{ours}post_attention_layernorm"),
    )
    matrices = (
        (f"{block}attn.c_attn", fused, lambda shape: (shape["hidden_size"],) * 3),
        (f"{block}attn.c_proj", (f"{ours}self_attn.o_proj",), lambda shape: (shape["hidden_size"],)),
        (f"{block}mlp.c_fc", (f"{ours}mlp.up_proj",), lambda shape: (shape["intermediate_size"],)),
        (f"{block}mlp.c_proj", (f"{ours}mlp.down_proj",), lambda shape: (shape["hidden_size"],)),
    )
    return (
        Rename(embedding, "backbone.embed_tokens.weight"),
        Rename(f"{base}wpe.weight", "backbone.embed_positions.weight"),
        *(Rename(f"{theirs}.{kind}", f"{place}.{kind}") for theirs, place in plain for kind in ("weight", "bias")),
        *(
            held(f"{theirs}.{kind}", tuple(f"{part}.{kind}" for part in parts), rows)
            for theirs, parts, rows in matrices
            for kind, held in (("weight", Columns), ("bias", Split))
        ),
    )


KEYS = (
    Rename("lm_head.weight", "backbone.lm_head.weight"),
    *keys("denoise_model.", "embed_tokens.weight"),
    *keys("transformer.", "transformer.wte.weight"),
)


def backbone(config: Fields) -> dict[str, Any]:
    """The fields of `GPT2Config` from those of a GPT-2."""
    require(
        config,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
    )
    return {
        "type": "gpt2",
        "vocab_size": need(config, "vocab_size"),
        "hidden_size": need(config, "n_embd"),
        "num_hidden_layers": need(config, "n_layer"),
        "num_attention_heads": need(config, "n_head"),
        "intermediate_size": config.get("n_inner") or 4 * need(config, "n_embd"),
        "max_position_embeddings": need(config, "n_positions", "n_ctx"),
        "layer_norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": config.get("tie_word_embeddings") is not False,
    }


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    shape, eos, pad = backbone(config), need(config, "eos_token_id"), config.get("pad_token_id")
    mask = MASKS.get(shape["hidden_size"]) if config.get("mask_token_id") is None else config["mask_token_id"]
    mask = need({"mask_token_id": mask}, "mask_token_id")
    if mask >= shape["vocab_size"]:
        shape["vocab_size"] = mask + 1 + (mask + 1) % 2
    return {
        "backbone": shape,
        "mask_token_id": mask,
        "eos_token_id": eos,
        "pad_token_id": eos if pad is None else pad,
        "visibility": "full",
        "shift": True,
    }


def recognise(config: Fields) -> bool:
    """A GPT-2 that is the authors' class, or has a mask token."""
    named = "mask_token_id" in config or "DiscreteDiffusionModel" in (config.get("architectures") or ())
    return config.get("model_type") == "gpt2" and named


DIFFUGPT = replace(
    DIFFULLAMA,
    name="diffugpt",
    title="DiffuGPT small and medium",
    recognise=recognise,
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*\.attn\.(bias|masked_bias)",),
    tokenizer="GPT2Tokenizer",
    decode={**DIFFULLAMA.decode, "max_new_tokens": 512, "temperature": 0.95},
    verified="logits with full and causal attention, loss, generation: tests/families/test_diffugpt.py",
    quirks=(
        *DIFFULLAMA.quirks,
        (
            "A position may draw the mask token, and keeps it",
            "fixed",
            "it is no word; the probability goes to the others",
        ),
        (
            "The first position is never generated: it keeps what was given there, and is left out of the result",
            "fixed",
            "without a prompt, the first token is predicted by its own row",
        ),
    ),
    example={
        "architectures": ["DiscreteDiffusionModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 1024,
        "vocab_size": 320,
        "bos_token_id": 300,
        "eos_token_id": 300,
        "mask_token_id": 302,
    },
)
