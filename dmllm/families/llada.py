"""LLaDA 8B: base, instruct and 1.5. Llama blocks under OLMo's names, full attention, no logit shift.

Source: Nie et al., arXiv:2502.09992; code ML-GSAI/LLaDA (generate.py) and the hub's modeling_llada.py.
"""

from __future__ import annotations

from typing import Any

from dmllm.families.family import Family, Fields, Rename, need, require

BLOCK = "model.transformer.blocks.{n}."
KEYS = (
    Rename("model.transformer.wte.weight", "backbone.embed_tokens.weight"),
    Rename("model.transformer.ln_f.weight", "backbone.norm.weight"),
    Rename("model.transformer.ff_out.weight", "backbone.lm_head.weight"),
    Rename(BLOCK + "attn_norm.weight", "backbone.layers.{n}.input_layernorm.weight"),
    Rename(BLOCK + "ff_norm.weight", "backbone.layers.{n}.post_attention_layernorm.weight"),
    *(
        Rename(BLOCK + f"{part}_proj.{kind}", f"backbone.layers.{{n}}.self_attn.{part}_proj.{kind}")
        for part in "qkv"
        for kind in ("weight", "bias")
    ),
    Rename(BLOCK + "attn_out.weight", "backbone.layers.{n}.self_attn.o_proj.weight"),
    Rename(BLOCK + "ff_proj.weight", "backbone.layers.{n}.mlp.gate_proj.weight"),
    Rename(BLOCK + "up_proj.weight", "backbone.layers.{n}.mlp.up_proj.weight"),
    Rename(BLOCK + "ff_out.weight", "backbone.layers.{n}.mlp.down_proj.weight"),
)
# The tokenizer's template, which opens the answer whether asked to or not, without that habit.
CHAT_TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
EXAMPLE = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "d_model": 64,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 96,
    "vocab_size": 320,
    "embedding_size": 320,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "mask_token_id": 302,
    "eos_token_id": 300,
    "pad_token_id": 300,
}


def backbone(config: Fields) -> dict[str, Any]:
    """The fields of `TransformerConfig`."""
    require(
        config,
        activation_type="silu",
        block_type="llama",
        layer_norm_type="rms",
        rope=True,
        alibi=False,
        include_bias=False,
        attention_layer_norm=False,
        input_emb_norm=False,
        scale_logits=False,
        layer_norm_with_affine=True,
        bias_for_layer_norm=(False, None),
        clip_qkv=None,
        multi_query_attention=(None, False),
    )
    return {
        "vocab_size": need(config, "embedding_size", "vocab_size"),
        "hidden_size": need(config, "d_model"),
        "num_hidden_layers": need(config, "n_layers"),
        "num_attention_heads": need(config, "n_heads"),
        "num_key_value_heads": config.get("n_kv_heads") or need(config, "n_heads"),
        "intermediate_size": config.get("mlp_hidden_size") or need(config, "mlp_ratio") * need(config, "d_model"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_theta": config.get("rope_theta", 10000.0),
        "qkv_bias": bool(config.get("include_qkv_bias")),
        "tie_word_embeddings": bool(config.get("weight_tying")),
    }


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    eos = need(config, "eos_token_id")
    return {
        "backbone": backbone(config),
        "mask_token_id": need(config, "mask_token_id"),
        "eos_token_id": eos,
        "pad_token_id": config.get("pad_token_id", eos),
        "visibility": "full",
    }


LLADA = Family(
    name="llada",
    title="LLaDA 8B base, instruct, 1.5",
    source="arXiv:2502.09992; ML-GSAI/LLaDA",
    recognise=lambda config: config.get("model_type") == "llada" and "d_model" in config,
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq",),
    chat_template=CHAT_TEMPLATE,
    decode={"max_new_tokens": 128, "block_length": 32, "count_mask": True},
    verified="logits, generations, forwards, guidance, likelihood: tests/families/test_llada.py",
    quirks=(
        (
            "The mask token may be produced; its place then stays masked to the end",
            "fixed",
            "a mask is no part of an answer: it is never produced",
        ),
        (
            "The mask token's probability counts against that of the others, by which they are ranked",
            "count_mask: true, the default here",
            "it decides the order of tokens; false shares its probability out",
        ),
        (
            "confidence_eos_eot_inf spares the end of sequence at temperatures above 0",
            "fixed",
            "distrust_ids hold at every temperature",
        ),
        (
            "generate.py with cfg_scale but no attention_mask stops with UnboundLocalError",
            "fixed",
            "without a mask nothing is padding",
        ),
        (
            "The chat template opens an answer whether asked to or not",
            "fixed",
            "a conversation that ends with an answer, as in training, must not open another",
        ),
    ),
    example=EXAMPLE,
)
