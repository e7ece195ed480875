"""What the descendants of Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: a tower of native resolution, the names of its
weights, how pictures are resized for it, three-axis positions, and the ChatML template with pictures.

Sources: arXiv:2409.12191 (Qwen2-VL), arXiv:2502.13923 (Qwen2.5-VL), arXiv:2511.21631 (Qwen3-VL).
"""

from __future__ import annotations

from typing import Any

from dmllm.families.family import Fields, Rename, require

BESIDE = ("preprocessor_config.json",)
IMAGE, MASK, PAD = 151655, 151666, 151643  # <|image_pad|>, <|mask|> of Dream's tokenizer, <|endoftext|>
SECTION = (16, 24, 24)
MIN_PIXELS = 56 * 56

WEIGHT, BOTH = ("weight",), ("weight", "bias")
MERGER = {"patch_embed.proj": WEIGHT, "merger.mlp.0": BOTH, "merger.mlp.2": BOTH}
QWEN2 = {
    **{f"blocks.{{n}}.{part}": BOTH for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
    "merger.ln_q": BOTH,
    **MERGER,
}
QWEN2_5 = {
    **{f"blocks.{{n}}.{part}": WEIGHT for part in ("norm1", "norm2")},
    **{f"blocks.{{n}}.attn.{part}": BOTH for part in ("qkv", "proj")},
    **{f"blocks.{{n}}.mlp.{part}_proj": BOTH for part in ("gate", "up", "down")},
    "merger.ln_q": WEIGHT,
    **MERGER,
}
QWEN3 = {
    "patch_embed.proj": BOTH,
    "pos_embed": WEIGHT,
    **{
        f"blocks.{{n}}.{part}": BOTH
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    },
    **{
        f"{merger}.{part}": BOTH
        for merger in ("merger", "deepstack_merger_list.{n}")
        for part in ("norm", "linear_fc1", "linear_fc2")
    },
}


def tower_keys(theirs: str, parts: dict[str, tuple[str, ...]]) -> tuple[Rename, ...]:
    """The tower's weights, published under `theirs`; `parts` is QWEN2, QWEN2_5 or QWEN3."""
    names = [f"{name}.{kind}" for name, kinds in parts.items() for kind in kinds]
    return tuple(Rename(f"{theirs}.{name}", f"vision.tower.{name}") for name in names)


def projector_keys(theirs: str) -> tuple[Rename, ...]:
    """Two linear layers between the tower's merger and the stream."""
    places = (("linear_1", "0"), ("linear_2", "2"))
    return tuple(Rename(f"{theirs}.{a}.{kind}", f"projector.{b}.{kind}") for a, b in places for kind in BOTH)


def template(picture: str, system: str | None = "You are a helpful assistant.") -> str:
    """Qwen2.5-VL's chat template, with the text that stands for a picture; no videos.

    Args:
        system: what stands before a conversation that has no system message; None: nothing (Qwen3-VL).
    """
    before = (
        "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
        + (system or "")
        + "<|im_end|>\n' }}{% endif %}"
    )
    return (
        "{% for message in messages %}"
        + ("" if system is None else before)
        + "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + picture + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def to_dmllm(
    config: Fields,
    kind: str,
    shape: Fields,
    *,
    max_pixels: int,
    min_pixels: int = MIN_PIXELS,
    scale: tuple[float, float, float] | None = None,
) -> dict[str, Any]:
    """The fields of `DmllmConfig` that concern pictures.

    Args:
        kind: the tower, "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".
        shape: its fields, by the names that transformers gives them.
        max_pixels, min_pixels: what larger pictures are shrunk to and smaller ones enlarged to, where neither
            config.json nor preprocessor_config.json says.
        scale: means and deviations of pixels, where they do not say; None is CLIP's.

    Raises:
        ValueError: a picture's preprocessing that our parts do not compute.
    """
    said = {**config.get("preprocessor_config", {}), **config}
    require(said, do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, resample=3, in_channels=3)
    for name, own in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
        require(config.get("preprocessor_config", {}), **{name: shape[own]})
    size = said.get("size") or {}
    least = said.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge") or min_pixels
    most = said.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge") or max_pixels
    return {
        "vision": {
            "name": f"native:{kind}",
            "pretrained": False,
            "layer": -1,
            "mean": said.get("image_mean") or scale,
            "std": said.get("image_std") or scale,
            "options": {"model_type": kind, **shape},
        },
        "tiling": {"min_pixels": least, "max_pixels": most},
        "image_token_id": config.get("image_token_id", IMAGE),
    }


def sections(config: Fields) -> list[int]:
    """How many rotary frequencies time, height and width turn."""
    return list(config.get("mrope_section", SECTION))
