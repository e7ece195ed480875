"""LaViDa: LLaDA 8B or Dream 7B behind a SigLIP tower whose 27 x 27 patches are pooled to 14 x 14.

The prompt sees only itself (prefix-DLM), so that its keys and values are computed once; `visibility="full"` lets it see
the answer, as checkpoints without that training stage had it. Both are the authors', and give different tokens.

Source: Li et al., arXiv:2505.16839; code jacklishufan/LaViDa (llava/**, predict.py).
"""

from __future__ import annotations

from typing import Any

from dmllm.families import dream, llada, llava
from dmllm.families.family import Family, Fields, require
from dmllm.families.llada_v import TOWER_EXAMPLE

TOWER = "google/siglip-so400m-patch14-384"  # their loader is told, config.json need not be
LLADA_MASK, DREAM_MASK = 126336, 151666

# ChatML with the pictures before the question.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DECODE = {"max_new_tokens": 64, "block_length": 64, "block_steps": 32, "schedule": "shift", "count_mask": True}


def of_llada(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    require(config, d_model_gen=None)  # LaViDa-O, which draws
    return _prefix({"mask_token_id": LLADA_MASK, **config}, llada.to_dmllm)


def of_dream(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`."""
    return _prefix({"mask_token_id": DREAM_MASK, **config}, dream.to_dmllm)


def _prefix(config: Fields, text: Any) -> dict[str, Any]:
    return {**text(config), "visibility": "prefix", **llava.to_dmllm(config, tower=TOWER, pooled=True)}


def _pictures(config: Fields, kind: str) -> bool:
    said = str(config.get("model_type", "")).lower()
    return said == f"llava_{kind}" or (said == kind and "mm_vision_tower" in config)


PICTURES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    "mm_hidden_size": 16,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
    "mm_vision_tower": TOWER,
    "vision_config": TOWER_EXAMPLE,
}
POOLED = llava.projector_keys("projector.project")
COMMON: dict[str, Any] = {
    "ignored": (r".*rotary_emb\.inv_freq",),
    "beside": llava.BESIDE,
    "processor": {"max_length": 8192, "tiling": {"several": "pad"}},
}

LAVIDA = Family(
    name="lavida",
    title="LaViDa-LLaDA: instruct, FIM, low resolution, reason",
    source="arXiv:2505.16839; jacklishufan/LaViDa",
    recognise=lambda config: "d_model" in config and _pictures(config, "llada"),
    config=of_llada,
    keys=(*llada.KEYS, *llava.TOWER_KEYS, *POOLED),
    chat_template=llava.template(llada.CHAT_TEMPLATE),
    decode=DECODE,
    verified="tiles, features, merged streams, logits, generations, forwards: tests/families/test_lavida.py; losses: "
    "tests/families/test_losses.py",
    quirks=(
        (
            "In training, padding is attended to, at rows of zeros",
            "objective.options.padding: hidden, the default; seen is theirs",
            "a loss then depends on the longest row of its batch",
        ),
    ),
    example={
        **llada.EXAMPLE,
        "architectures": ["LlavaLladaForMaskedDiffusion"],
        "model_type": "llava_llada",
        **PICTURES,
    },
    **COMMON,
)
LAVIDA_DREAM = Family(
    name="lavida_dream",
    title="LaViDa-Dream: instruct",
    source="arXiv:2505.16839; jacklishufan/LaViDa",
    recognise=lambda config: _pictures(config, "dream"),
    config=of_dream,
    keys=(*dream.KEYS, *llava.TOWER_KEYS, *POOLED),
    tokenizer="Qwen2Tokenizer",
    chat_template=llava.template(CHATML),
    decode={
        "max_new_tokens": 64,
        "schedule": "time",
        "remasking": "margin",
        "count_mask": True,
        "prompt_first": True,
    },
    verified="tiles, features, merged streams, logits, generations, forwards: tests/families/test_lavida_dream.py",
    quirks=(
        (
            "step_ratio leaves the times of schedule: time those of all steps, so that the last call commits the rest",
            "eps: 1 - step_ratio * (1 - eps), which gives theirs",
            "fewer steps are meant to share the whole time; with step_ratio=0.5 the last of 8 calls commits 10 of 16",
        ),
        (
            "a schedule with prefix_lm and step_ratio=1 stops with an IndexError in the last step",
            "fixed",
            "the prompt gives the first token, so there is one call less than places",
        ),
        (
            "diffusion_generate takes top_k=50 from transformers' defaults, generate top_p=0.95, and confidence from "
            "what these leave, at temperature 0 too",
            "fixed; theirs with top_k=None, top_p=None",
            "they say what may be drawn; the authors' evaluation asks for no top_p",
        ),
        (
            "the mask token may be chosen, with prefix_lm as the first token too; its place stays open",
            "choose_mask: true gives theirs but for the first token",
            "a mask is no part of an answer",
        ),
        (
            "generate drops the attention mask, and the rows of a batch share one quota, or the first row's table",
            "fixed",
            "a row gives the same tokens alone and in a batch",
        ),
    ),
    example={
        **dream.EXAMPLE,
        "architectures": ["LlavaDreamForMaskedDiffusion"],
        "model_type": "llava_dream",
        **PICTURES,
    },
    **COMMON,
)
