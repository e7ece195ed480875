"""Denoising vectors: a canvas of noise is moved to where tokens are, all places at once, and rounded at the end.

A call says x-hat, what the vectors would be without noise; a step moves z from its time to the next earlier one:

    ddpm    a draw from q(z_s | z_t, x-hat)                     new noise in every call
    ddim    the same marginals, the noise of z_t kept           none but the first
    euler   along dz/dt; on the linear path, alone, it is ddim  none but the first

Until the last call the canvas shows what x-hat would be rounded to, as a draft; then everything is known at once. What
is given stays tokens, and enters as such in every call. The model's own x-hat goes with z into the next call, where it
was trained so.

Sources: Ho et al., DDPM, arXiv:2006.11239; Song et al., DDIM, arXiv:2010.02502; the clamping trick, Li et al.,
Diffusion-LM, arXiv:2205.14217, section 4.2. Time: t = 0 is clean, t = 1 is noise.
Shapes: B rows, N canvas tokens, d features of a vector, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dmllm.diffusion.gaussian import ddim, ddpm, euler
from dmllm.registry import nearest
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.process import Process

STEPS = 32  # calls, where nothing else is said
SAMPLERS = ["ddpm", "ddim", "euler"]
USED = (
    *("max_new_tokens", "steps", "suppress_ids", "visibility", "cfg_scale", "cfg_masks_draft", "suffix_ids"),
    *("eos_token_id", "stop_sequences", "gaussian"),
)


@dataclass(frozen=True, kw_only=True)
class GaussianDecoding:
    """How vectors are denoised, beside `steps` (32 where nothing is said), the number of calls."""

    sampler: str = "ddim"
    """ddpm, ddim, or euler, which is for models of the linear path (form: flow)."""
    clamp: bool = False
    """Whether x-hat is the vector that is nearest to it, in every step: fewer rounding errors, less variety."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"gaussian.sampler={self.sampler!r} is not known; {nearest(str(self.sampler), SAMPLERS)}")
        if not isinstance(self.clamp, bool):
            raise ValueError(f"gaussian.clamp={self.clamp!r} must be true or false.")

    @staticmethod
    def of(options: Mapping[str, Any] | None) -> GaussianDecoding:
        """From the decode option `gaussian`. Raises ValueError for an unknown key or a wrong value."""
        known = [f.name for f in fields(GaussianDecoding)]
        for name in options or {}:
            if name not in known:
                raise ValueError(f"gaussian has no option {name!r}; {nearest(name, known)}")
        return GaussianDecoding(**(options or {}))


@torch.no_grad()
def begin(canvas: Canvas, config: DecodeConfig, draws: list[Generator]) -> Canvas:
    """Noise in every place.

    Raises:
        ValueError: the model has no vectors, or a setting means nothing here.
    """
    space = canvas.space
    if canvas.block_length is not None:
        raise ValueError("This model denoises one canvas, not blocks; set visibility='full' or 'prefix'.")
    for name, value in config.chosen.items():
        if name not in USED:
            raise ValueError(
                f"{name}={value!r} is for models that commit token after token; this one denoises all of them at once, "
                f"by steps and gaussian={{'sampler': ..., 'clamp': ...}}. Leave it out."
            )
    if space is None:
        raise ValueError("This model says that it denoises vectors and has none: config.json needs heads.latent.")
    if GaussianDecoding.of(config.gaussian).sampler == "euler" and space.config.schedule != "linear":
        raise ValueError(f"gaussian.sampler='euler' is for the linear path, not {space.config.schedule}; try 'ddim'.")
    z = _normal(draws, (canvas.ids.shape[1], space.width), canvas.ids.device)
    latents = F.pad(z, (0, space.features - space.width))
    return replace(canvas, latents=latents, calls=torch.where(canvas.committed.all(1), _steps(config), canvas.calls))


def finished(canvas: Canvas, config: DecodeConfig) -> Tensor:
    """[B] bool: all calls are spent."""
    return canvas.calls >= _steps(config)


@torch.no_grad()
def advance(
    predict: Any, canvas: Canvas, config: DecodeConfig, draws: list[Generator], constraint: Any = None
) -> Canvas:
    """One model call and the step that it allows.

    Args:
        predict: for a model that regresses vectors has `said_by` beside, (canvas, rows [B, K], head) -> [B, K, d].

    Raises:
        ValueError: a constraint, which needs tokens that are known one after the other.
    """
    if constraint is not None:
        raise ValueError("A constraint needs tokens that are known one by one; leave constraint and choices out.")
    space, how, steps = canvas.space, GaussianDecoding.of(config.gaussian), _steps(config)
    assert canvas.latents is not None
    z, _ = canvas.latents.split([space.width, space.features - space.width], -1)
    places = torch.arange(canvas.ids.shape[1], device=canvas.ids.device).expand_as(canvas.ids)
    t, s = 1 - canvas.calls / steps, 1 - (canvas.calls + 1) / steps
    canvas = replace(canvas, time=t)
    said = predict(canvas, places) if space.head is None else predict.said_by(canvas, places, space.head)
    vectors = space.vectors()
    x_hat, scores = space.read(_never(said, canvas, config) if space.head is None else said, vectors)
    tokens = _never(scores, canvas, config).argmax(-1)
    if how.clamp:
        x_hat = F.embedding(tokens, vectors)
    t, s = (time[:, None].expand_as(places) for time in (t, s))
    now, then = space.level(t, places), space.level(s, places)
    if how.sampler == "ddpm":
        z = ddpm(z, x_hat, now, then, _normal(draws, z.shape[1:], z.device))
    else:
        z = euler(z, x_hat, t, s) if how.sampler == "euler" else ddim(z, x_hat, now, then)
    last = (canvas.calls + 1 >= steps)[:, None]
    return replace(
        canvas,
        latents=torch.cat([z, x_hat], -1)[..., : space.features],
        ids=torch.where(canvas.committed, canvas.ids, tokens),
        committed=canvas.committed | last,
        calls=canvas.calls + 1,
        forwards=canvas.forwards + 1,
        accepted=(last & ~canvas.committed).sum(1),
    )


def _steps(config: DecodeConfig) -> int:
    return STEPS if config.steps is None else config.steps


def _never(scores: Tensor, canvas: Canvas, config: DecodeConfig) -> Tensor:
    """Logits [..., V] in which what is no token of an answer has no share."""
    never = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    for token in (canvas.mask_id, *config.suppress_ids):
        never = never | (torch.arange(len(never), device=never.device) == token)
    return scores.float().masked_fill(never, -torch.inf)


def _normal(draws: list[Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers from each row's generator, [B, *shape]; the host waits for nothing."""
    found = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in draws])
    return found if found.device == device else found.pin_memory().to(device, non_blocking=True)


GAUSSIAN = Process(advance, finished, begin)
