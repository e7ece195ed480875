"""LLaDA-UI: Qwen2.5-VL's tower at native resolution, its rows straight into LLaDA2.0-mini's experts, block diffusion.

Positions count on through pictures: the code has three-axis rotary positions and does not call them. Blocks of 32 are
counted from the first token of the prompt, as in LLaDA2.

Source: inclusionAI/LLaDA-UI, inference/inference_hf.py (model, generate_bd, the names of config.json's fields) and
inference/sglang_server (names of weights, chat template). The published config.json, weights, preprocessor_config.json
and tokenizer were not seen; the experts' gate is taken to be LLaDA2's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmllm.families import dimple, llada2, qwen_vl
from dmllm.families.family import Family, Fields, Key, Rename, need, require

TEXT_TYPES = ("llada2_vl", "llada2_moe_veomni", "llada2_moe")
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<role>SYSTEM</role>You are a helpful assistant.\n' }}{% endif %}"
    "{% for message in messages %}{% set role = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} %}"
    "{{ '<role>' + role[message['role']] + '</role>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '\n' if message['role'] == 'system' else '<|role_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)


def text_keys() -> tuple[Key, ...]:
    """LLaDA2's weights where they lie in the whole; the vocabulary projection stands beside or inside the model."""
    inside = tuple(replace(key, theirs=key.theirs.replace("model.", "model.language_model.")) for key in llada2.KEYS)
    return (*inside, Rename("model.lm_head.weight", "backbone.lm_head.weight"))


def to_dmllm(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    text, said = need(config, "text_config"), need(config, "vision_config")
    scaling = text.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    require({"rope_scaling": kind}, rope_scaling=(None, "default", "mrope"))  # of these the attention sees nothing
    shape = {name: said.get(name, value) for name, value in dimple.TOWER.items()}
    return {
        **llada2.to_dmllm({**text, "rope_scaling": None, "use_qk_norm": True}),
        **qwen_vl.to_dmllm(config, "qwen2_5_vl", shape, max_pixels=dimple.MAX_PIXELS),
        "projector": {"name": "identity"},
        "image_token_id": need(config, "image_token_id"),
    }


LLADA_UI = Family(
    name="llada_ui",
    title="LLaDA-UI",
    source="inclusionAI/LLaDA-UI",
    recognise=lambda config: (
        "vision_config" in config and (config.get("text_config") or {}).get("model_type") in TEXT_TYPES
    ),
    config=to_dmllm,
    keys=(*text_keys(), *qwen_vl.tower_keys("model.visual", qwen_vl.QWEN2_5)),
    ignored=(r".*rotary_(pos_)?emb\.inv_freq",),
    beside=qwen_vl.BESIDE,
    chat_template=CHAT_TEMPLATE,
    processor={"max_length": 32768},
    decode={**llada2.LLADA2.decode, "max_new_tokens": 2048, "eos_early_stop": True},
    verified="nothing recorded; its parts are those of llada2 and of transformers' Qwen2.5-VL: tests/families/"
    "test_llada_ui.py",
    quirks=(
        (
            "Pictures have no positions in height and width, though the code computes them",
            "the same here",
            "the attention's call of three-axis rotary positions is commented out, as in training",
        ),
    ),
    example={
        "architectures": ["LLaDA2MoE_VLForConditionalGeneration"],
        "model_type": "llada2vl",
        "image_token_id": 261,
        "text_config": {**llada2.LLADA2.example, "model_type": "llada2_vl"},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 56,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
    },
)
