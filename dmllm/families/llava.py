"""What the descendants of LLaVA share: a SigLIP tower, a projector, tiles with row breaks, and the fields that say so.

    config.json            here
    mm_vision_tower        vision: "hf:" with the shape of a known tower, or of a vision_config.json beside config.json
    mm_projector_type      projector
    image_aspect_ratio     tiling: anyres, anyres_max_N, pad; anything else is one resized tile
    image_grid_pinpoints   its pinpoints, (width, height) there and (height, width) here
    mm_patch_merge_type    its row breaks and whether padding is left out

The tower is read before its last layer, without the norm behind it: the authors delete that layer and keep the norm's
weights, which nothing reads.

Source: LLaVA-NeXT, arXiv:2407.07895, and LLaVA-OneVision, arXiv:2408.03326; code as forked by ML-GSAI/LLaDA-V and
jacklishufan/LaViDa (llava_arch.py, mm_utils.py, siglip_encoder.py).
"""

from __future__ import annotations

import ast
import re
from typing import Any

from dmllm.families.family import Fields, Rename, need, require

IMAGE = -200  # stands for a picture among the ids; no row of the vocabulary
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
BESIDE = ("vision_config.json",)
SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
TOWERS = {"google/siglip-so400m-patch14-384": SO400M, "google/siglip2-so400m-patch14-384": SO400M}

THEIR_TOWER, OUR_TOWER = "model.vision_tower.vision_tower.vision_model.", "vision.tower."
TOWER_KEYS = (
    *(
        Rename(f"{THEIR_TOWER}{name}", f"{OUR_TOWER}{name}")
        for name in (
            "embeddings.patch_embedding.weight",
            "embeddings.patch_embedding.bias",
            "embeddings.position_embedding.weight",
            *(
                f"encoder.layers.{{n}}.{part}.{kind}"
                for part in (
                    *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
                    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
                )
                for kind in ("weight", "bias")
            ),
        )
    ),
    *(Rename(f"{THEIR_TOWER}post_layernorm.{kind}", f"unused.post_layernorm_{kind}") for kind in ("weight", "bias")),
    Rename("model.image_newline", "row_break"),
)


def projector_keys(ours: str) -> tuple[Rename, ...]:
    """The projector's weights, in our module of that name."""
    places = (f"{layer}{kind}" for layer in ("{n}.", "") for kind in ("weight", "bias"))
    return tuple(Rename(f"model.mm_projector.{place}", f"{ours}.{place}") for place in places)


def template(chat_template: str) -> str:
    """A chat template that opens with the authors' system message where the conversation has none of its own."""
    return (
        "{% if messages and messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': '"
        + SYSTEM
        + "'}] + messages %}{% endif %}"
        + chat_template
    )


def to_dmllm(config: Fields, *, tower: str | None = None, pooled: bool = False, threads: int = 1) -> dict[str, Any]:
    """The fields of `DmllmConfig` that concern pictures.

    Args:
        tower: the vision tower where config.json names none.
        pooled: whether 2 x 2 patches become one, behind the projector.
        threads: the number of threads whose rounding the GELUs have on a CPU: of the run that was recorded.

    Raises:
        ValueError: an unknown tower, or a field whose value our parts do not compute.
    """
    require(
        config,
        mm_projector_type=("mlp2x_gelu", "linear"),
        mm_patch_merge_type=("spatial_unpad", "spatial"),
        mm_resampler_type=None,
        mm_vision_select_feature=("patch", None),
        mm_use_im_start_end=(False, None),
        mm_use_im_patch_token=(False, None),
        mm_spatial_pool_mode=("bilinear", "average", "max", None),
        add_faster_video=(False, None),
    )
    name = config.get("mm_vision_tower") or tower or need(config, "mm_vision_tower")
    shape = config.get("vision_config") or TOWERS.get(name)
    if shape is None:
        raise ValueError(
            f"config.json: mm_vision_tower={name!r} is not known; {', '.join(TOWERS)} are. Put its configuration "
            f"beside config.json as {BESIDE[0]}, with model_type siglip_vision_model."
        )
    require(shape, model_type="siglip_vision_model")
    width = need(shape, "hidden_size")
    if config.get("mm_hidden_size", width) != width:
        raise ValueError(f"config.json: mm_hidden_size={config['mm_hidden_size']}, but the tower is {width} wide.")
    projection = config.get("mm_projector_type", "mlp2x_gelu")
    mode = config.get("mm_spatial_pool_mode") or "bilinear"
    own = {"gelu_parts": threads} if projection == "mlp2x_gelu" else {}
    options = {"factor": 2, "mode": mode, "then": projection, "projected": True, "whole": mode != "bilinear", **own}
    steady = {"attn_implementation": "eager", "gelu_parts": threads}
    return {
        "vision": {"name": f"hf:{name}", "layer": -2, "options": {**shape, **steady}},
        "projector": {"name": "pool", "options": options} if pooled else {"name": projection, "options": own},
        "tiling": tiling(config, need(shape, "image_size")),
        "row_break": unpadded(config),
        "image_token_id": IMAGE,
        "unused": {"post_layernorm_weight": [width], "post_layernorm_bias": [width]},
    }


def unpadded(config: Fields) -> bool:
    """Whether feature rows end in a learned vector and padding is left out."""
    return config.get("mm_patch_merge_type", "spatial_unpad") == "spatial_unpad"


def tiling(config: Fields, side: int) -> dict[str, Any]:
    """The fields of `TilingConfig` for tiles of `side` pixels. Raises ValueError for a way of cutting that we lack."""
    aspect = config.get("image_aspect_ratio") or "square"
    if aspect in ("highres", "crop_split"):
        raise ValueError(f"config.json: image_aspect_ratio={aspect!r} is not supported; anyres, anyres_max_4, pad are.")
    if "anyres" not in aspect:
        return {"mode": "pad" if aspect == "pad" else "resize"}
    limit = re.match(r"anyres_max_(\d+)", aspect)
    if limit is None and aspect != "anyres":
        raise ValueError(
            f"config.json: image_aspect_ratio={aspect!r} is not anyres, or anyres_max_N such as anyres_max_4."
        )
    sizes = pinpoints(need(config, "image_grid_pinpoints"), side)
    return {
        "mode": "anyres",
        "pinpoints": [[height, width] for width, height in sizes],
        "unpad": unpadded(config),
        "max_tiles": int(limit[1]) if limit and unpadded(config) else None,
    }


def pinpoints(said: Any, side: int) -> list[tuple[int, int]]:
    """The (width, height) to choose from: a list, its text, or "(1x1),...,(6x6)", all of these in tiles of `side`."""
    if isinstance(said, str) and (pairs := re.findall(r"\((\d+)x(\d+)\)", said)):
        (a, b), (c, d) = (tuple(map(int, pairs[i])) for i in (0, -1))
        return [(i * side, j * side) for i in range(a, c + 1) for j in range(b, d + 1)]
    try:
        listed = ast.literal_eval(said) if isinstance(said, str) else said
        return [(int(width), int(height)) for width, height in listed]
    except (ValueError, TypeError, SyntaxError):
        raise ValueError(
            f"config.json: image_grid_pinpoints={said!r} is neither a list of [width, height] nor '(1x1),...,(6x6)'."
        ) from None
