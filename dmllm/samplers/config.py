"""How a canvas is denoised, as plain values: what `chat`, `generate` and a checkpoint's `generation_config.json` take.

A canvas of `max_new_tokens` tokens is filled block by block, left to right, each block in `steps / blocks` model calls;
within a step the surest tokens are committed (Nie et al., LLaDA, arXiv:2502.09992, algorithms 4 and 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dmllm.registry import Table, nearest

REMASKING = Table(
    "remasking rule",
    {
        "low_confidence": "dmllm.samplers.rules:low_confidence",
        "margin": "dmllm.samplers.rules:margin",
        "entropy": "dmllm.samplers.rules:entropy",
        "random": "dmllm.samplers.rules:random_order",
    },
)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Everything that decides which token is committed when; randomness is a generator, passed beside it."""

    max_new_tokens: int = 64
    """Length of the canvas in tokens; a reply that ends earlier is cut there."""
    steps: int | None = None
    """Model calls for the whole canvas, shared equally by the blocks; None is one token a call. An upper bound where
    `threshold` or an end of sequence finishes sooner."""
    block_length: int | None = None
    """Tokens of a block; a block is filled before the next begins, and the last may be shorter. None is one block."""
    remasking: str = "low_confidence"
    """Which tokens come first: low_confidence (those of highest probability), margin (over the runner-up), entropy
    (lowest), random; or your own rule as "module:function"."""
    threshold: float | None = None
    """Also commit every token at least this probable, so that a step may commit many; None is the quota alone."""
    temperature: float = 0.0
    """0 takes the most probable token; above, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this much probability; 1 is all of them."""
    cfg_scale: float = 0.0
    """Guidance away from the unprompted answer: un + (cfg_scale + 1)(cond - un), twice the work; 0 is none."""
    eos_token_id: int | list[int] | None = None
    """Tokens that end a reply; None is the checkpoint's own, [] never ends one early."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "steps", "block_length"):
            value = getattr(self, name)
            optional = name != "max_new_tokens"
            if not (value is None and optional) and (type(value) is not int or value < 1):
                raise ValueError(
                    f"{name}={value!r} must be a whole number, at least 1{' or None' if optional else ''}."
                )
        for name in ("threshold", "temperature", "top_p", "cfg_scale"):
            value = getattr(self, name)
            if not (value is None and name == "threshold") and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ValueError(f"{name}={value!r} must be a number{' or None' if name == 'threshold' else ''}.")
        if any(type(i) is not int for i in self.stop_ids):
            raise ValueError(f"eos_token_id={self.eos_token_id!r} must be a token id, a list of them, or None.")
        if self.remasking not in REMASKING and ":" not in str(self.remasking):
            raise ValueError(
                f"remasking={self.remasking!r} is not a known rule; {nearest(str(self.remasking), REMASKING)}"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} is a probability between 0 and 1, or None for the quota alone."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (most probable token) or above; 1.0 is the model's."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie above 0 and at most at 1 (all tokens).")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"top_p={self.top_p} has no effect at temperature=0; set a temperature or top_p=1.0.")
        if not 0 <= self.cfg_scale < float("inf"):
            raise ValueError(f"cfg_scale={self.cfg_scale} must be 0 (no guidance) or above.")
        self.steps_per_block(self.max_new_tokens)

    def block_of(self, length: int) -> int:
        """The block length for a canvas of `length` tokens."""
        return min(self.block_length or length, length)

    def steps_per_block(self, length: int) -> int:
        """Model calls for each block of a canvas of `length` tokens. Raises ValueError if `steps` does not divide."""
        block = self.block_of(length)
        blocks = -(-length // block)
        if self.steps is None:
            return block
        if self.steps % blocks:
            below = self.steps // blocks * blocks
            raise ValueError(
                f"steps={self.steps} is not divisible by the {blocks} blocks of {block} tokens; "
                f"try {f'{below} or ' if below else ''}{below + blocks}."
            )
        return self.steps // blocks

    @property
    def draws_tokens(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0

    @property
    def draws_order(self) -> bool:
        """Whether the order in which tokens are committed is; a rule of one's own may draw."""
        return self.remasking not in ("low_confidence", "margin", "entropy")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def decode_config(options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> DecodeConfig:
    """The configuration for one call: `options` over a checkpoint's `defaults`.

    Of the defaults only the fields above count: a `generation_config.json` carries other keys for other programs.

    Raises:
        ValueError: an option is unknown (the nearest known one is named), or a value is refused.
    """
    known = [f.name for f in fields(DecodeConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"Unknown decode option {name!r}; {nearest(name, known)}")
    chosen = {k: v for k, v in (defaults or {}).items() if k in known}
    return DecodeConfig(**{**chosen, **options})
