"""DiffusionGemma 26B-A4B: canvases of random tokens denoised behind a causal prompt; transformers' own class.

Source: google/diffusiongemma-26B-A4B-it; code transformers, models/diffusion_gemma. Its modules are not rebuilt here:
`dmllm.models.diffusion_gemma` calls them. How many rows a picture may become is what its processor_config.json (or
preprocessor_config.json) says, or `max_soft_tokens` given beside config.json; 280 where none does. A checkpoint without
the vision tower is read too, and refuses pictures.
"""

from __future__ import annotations

from dmllm.families.family import Family, Native

EXAMPLE = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 16,
    "image_token_id": 302,
    "boi_token_id": 303,
    "eoi_token_id": 304,
    "max_soft_tokens": 70,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "top_k_experts": 2,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "eos_token_id": 300,
        "pad_token_id": 301,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "patch_size": 4,
        "position_embedding_size": 64,
    },
}

DIFFUSION_GEMMA = Family(
    name="diffusion_gemma",
    title="DiffusionGemma 26B-A4B",
    source="google/diffusiongemma-26B-A4B-it; transformers, models/diffusion_gemma",
    recognise=lambda config: config.get("model_type") == "diffusion_gemma",
    config=dict,
    keys=(),
    beside=("preprocessor_config.json", "processor_config.json"),
    native=Native(
        model="DiffusionGemmaForBlockDiffusion",
        adapter="dmllm.models.diffusion_gemma:DiffusionGemma",
        optional=r"model\.encoder\.(vision_tower|embed_vision)\..*",
    ),
    decode={"max_new_tokens": 256, "steps": 48, "entropy_bound": 0.1, "t_max": 0.8, "t_min": 0.4},
    quirks=(
        (
            "eager attention raises TypeError in generate() for a padded prompt",
            "fixed",
            "the mask is built from an integer tensor's type",
        ),
        (
            "a prompt's left padding counts as positions in generate(): rounding is not that of the prompt alone, and "
            "feeding logits back lets it grow (1e-5 in the first call, 0.14 in the fourth of tiny random weights)",
            "generator=None",
            "with a seed a row's positions count from its first token",
        ),
        (
            "a canvas that is begun draws its tokens from the batch as a whole",
            "generator=None",
            "with a seed every row draws what it would draw alone",
        ),
        (
            "a picture's rows see each other in generate(), but in a plain call that mask is made and dropped",
            "text_config.use_bidirectional_attention=null",
            "logits() are those of generation",
        ),
    ),
    example=EXAMPLE,
    verified="pictures, logits with and without self-conditioning, generations: tests/families/test_diffusion_gemma.py",
)
