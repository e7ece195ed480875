"""How many tokens each call on a block commits, where a curve or the diffusion process says it.

A curve rises from 0 at the first call to 1 at the last; its steps, in whole tokens and at least one each, are taken
from the last to the first: `shift` above 1 commits few tokens at first, while little is known, and many at the end.

The process, run backwards from what is masked at time t, m_t = 1 - alpha_t, to time s, commits a masked token with
probability (m_t - m_s + sigma (1 - m_t)) / m_t and masks a known one again with sigma (ReMDM): at time s a token is
known with probability alpha_s whatever sigma is, from 0 (ancestral sampling) to min(1, m_s / (1 - m_t)).

Sources: curves, Li et al., LaViDa, arXiv:2505.16839, section 3.3 (timestep shifting, from arXiv:2403.03206); code
jacklishufan/LaViDa (llada/generate.py), whose rounding in float32 this keeps. Ancestral sampling, Sahoo et al., MDLM,
arXiv:2406.07524, equation 6. sigma, Wang et al., ReMDM, arXiv:2503.00307; forward_backward, Campbell et al.,
arXiv:2205.14987, a predictor and a corrector in one; psi denoises with probability eta and adds the noise of time s
anew. Code kuleshov-group/remdm (diffusion.py).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dmllm.diffusion.schedules import SCHEDULES as NOISE
from dmllm.registry import nearest

CURVES = ("linear", "shift", "cosine", "logit_normal")
MASKGIT = ("maskgit", "maskgit_fixed")
COOLING = ["linear", "compounding", "constant"]
SAMPLING = ["inverse", "multinomial", "gumbel"]
REMDM = ["cap", "rescale", "conf", "loop", "forward_backward", "psi"]
LOOP = (0.55, 0.05, 0.9)  # from which time to which so many tokens stay known: the authors' settings


@lru_cache(maxsize=4096)
def commit_counts(curve: str, shift: float, tokens: int, calls: int) -> tuple[int, ...]:
    """The tokens that each of at most `calls` calls commits, of `tokens` in all.

    Args:
        curve: a name of CURVES; `shift` is that curve's parameter, 1 is linear.
    """
    if not tokens:
        return ()
    reached = _curve(curve, shift, torch.linspace(0, 1, min(calls, tokens) + 1))
    counts = (reached * tokens).long().diff().clamp(min=1).tolist()
    excess, at = sum(counts) - tokens, 0
    counts[-1] -= min(excess, 0)  # a curve that rounding keeps below 1 leaves a token over
    while excess > 0:
        if counts[at] > 1:
            counts[at] -= 1
            excess -= 1
        at = (at + 1) % len(counts)
    return tuple(reversed(counts))


@lru_cache(maxsize=64)
def commit_table(curve: str, shift: float, length: int, calls: int, device: torch.device) -> Tensor:
    """`commit_counts` for every number of tokens up to `length`, [length + 1, calls + 1]; `length` after the last."""
    table = torch.full((length + 1, calls + 1), length)
    for tokens in range(1, length + 1):
        counts = commit_counts(curve, shift, tokens, calls)
        table[tokens, : len(counts)] = torch.tensor(counts)
    return table.to(device)


@lru_cache(maxsize=64)
def time_table(
    eps: float, calls: int, device: torch.device, noise: str = "linear", loop: bool = False
) -> tuple[Tensor, Tensor]:
    """The times between which the calls on a block lie, and how much is masked at each, both [calls + 1] float32.

    Args:
        noise: a noise schedule by name.
        loop: whether the calls between two times of `LOOP` are spent where so many tokens are known.
    """
    times, schedule = torch.linspace(1, eps, calls + 1).double(), NOISE.load(noise)()
    masked = 1 - schedule.alpha(times)
    if loop:
        on, off, known = LOOP
        masked = torch.where(times > on, 1 - (1 - times) / (1 - on) * known, times.clamp(max=off) / off * (1 - known))
        times = schedule.time(masked)
    return times.float().to(device), masked.float().to(device)


def remasked(rule: str | None, eta: float, now: Tensor, then: Tensor) -> Tensor:
    """sigma [B] of one of `REMDM`, where `now` is masked and `then` is to be, both [B]; None: 0."""
    most = (then / (1 - now)).clamp(max=1)
    if rule == "cap":
        return most.clamp(max=eta)
    if rule == "rescale":
        return eta * most
    if rule == "loop":
        return torch.where(now == then, most.clamp(max=eta), 0)
    if rule == "forward_backward":
        return ((now - then) / (1 - now)).minimum(most)
    if rule == "psi":
        return eta * then
    return most if rule == "conf" else torch.zeros_like(now)


@lru_cache(maxsize=64)
def open_shares(noise: str, calls: int, device: torch.device) -> Tensor:
    """The share gamma(r) of tokens that stays open after each call, once r of the calls are over, [calls] float32.

    Source: Chang et al., MaskGIT, arXiv:2202.04200, section 3.3; code Gen-Verse/MMaDA (models/sampling.py), whose
    rounding in float32 this keeps: 16 tokens of which half stay open may be 7.
    """
    ratio = torch.tensor([(call + 1) / calls for call in range(calls)])
    if noise == "cosine":
        shares = torch.cos(ratio * math.pi * 0.5)
    elif noise in ("linear", "square", "cubic"):
        shares = 1 - ratio ** {"linear": 1, "square": 2, "cubic": 3}[noise]
    elif noise == "sigmoid":
        low, high = torch.sigmoid(torch.tensor(-3.0)), torch.sigmoid(torch.tensor(3.0))
        shares = (high - torch.sigmoid(ratio * 6.0 - 3.0)) / (high - low)
    else:
        shares = 1 - NOISE.load(noise)().alpha(1 - ratio)
    return shares.to(device)


@lru_cache(maxsize=64)
def cooled(temperature: float, cooling: str, calls: int, device: torch.device) -> Tensor:
    """The scale of the noise on the order at each call, [calls] float32: times 1 - r where it is linear (MaskGIT), and
    times that at every call where it is compounding (MMaDA)."""
    scales = []
    for call in range(calls):
        left = 1 - (call + 1) / calls
        before = scales[-1] if scales and cooling == "compounding" else temperature
        scales.append(before * (1.0 if cooling == "constant" else left))
    return torch.tensor(scales, device=device)


def check_process(config: Any) -> None:
    """Raises ValueError where the settings (a `DecodeConfig`) ask of the process what it is not."""
    if config.noise_schedule not in NOISE and ":" not in config.noise_schedule:
        raise ValueError(f"noise_schedule={config.noise_schedule!r}: {nearest(config.noise_schedule, NOISE)}")
    if config.remdm is not None and config.remdm not in REMDM:
        raise ValueError(f"remdm={config.remdm!r} is not a known rule; {nearest(str(config.remdm), REMDM)}")
    if not 0 <= config.eta <= 1:
        raise ValueError(f"eta={config.eta} must lie between 0 (nothing is masked again) and 1.")
    if config.remdm is not None and (config.schedule, config.remasking) != ("time", "origin"):
        raise ValueError(
            f"remdm={config.remdm!r} runs the diffusion process backwards; say schedule='time', remasking='origin'."
        )
    for name, known in (("order_cooling", COOLING), ("sampling", SAMPLING)):
        if (value := getattr(config, name)) not in known:
            raise ValueError(f"{name}={value!r} is not known; {nearest(str(value), known)}")
    noisy = [f"order_temperature={config.order_temperature}"] if config.order_temperature else []
    noisy += [f"sampling={config.sampling!r}"] if config.sampling != "inverse" else []
    if config.order_temperature < 0 or (noisy and config.remasking != "low_confidence"):
        raise ValueError(f"{' and '.join(noisy)}: 0 or above, and with remasking='low_confidence'; leave it out.")
    if config.sampling != "inverse" and (config.remdm or config.revoke_threshold or config.sub_block_length):
        raise ValueError(f"{noisy[-1]} draws for a whole canvas; leave remdm, revoke_threshold, sub_block_length out.")
    if config.schedule == "carried" and config.threshold is None:
        raise ValueError("schedule='carried' carries over what threshold turns down; say it, e.g. threshold=0.9.")
    if config.schedule == "first_hitting":
        calls, block = config.steps_per_block(config.max_new_tokens), config.block_of(config.max_new_tokens)
        if config.remasking not in ("random", "origin") or config.sub_block_length:
            raise ValueError(
                "schedule='first_hitting' draws which token of a block is next; say remasking='random' and "
                "sub_block_length=None."
            )
        if calls < block or config.num_to_transfer not in (None, 1):
            raise ValueError("schedule='first_hitting' is one token a call; leave out steps and num_to_transfer.")


def until_something(open_rows: Tensor, opened: Tensor, calls: Tensor, steps: int, eps: float) -> Tensor:
    """The tokens of confident decoding's next time, [B]: at least one of `open_rows` [B], all of them at the last time.

    Of `opened` tokens m are open, so that it is time t = m / opened; to come are those of linspace(1, eps, steps + 1)
    that are below t and behind the calls spent. The first at which int(m (1 - s/t)) is not 0 says how many.

    Source: Yu, Ma and Wang, Dimple, arXiv:2505.16990, section 3.3; code yu-rp/Dimple (generation_utils.py).
    """
    times, _ = time_table(eps, steps, open_rows.device)
    now = (open_rows / opened.clamp(min=1))[:, None]
    counts = (open_rows[:, None] * (1 - times / now.clamp(min=eps))).long()  # [B, steps + 1]
    counts[:, -1] = open_rows
    coming = (times < now) & (torch.arange(steps + 1, device=times.device) > calls[:, None]) & (counts > 0)
    coming[:, -1] = True
    return counts.gather(1, coming.long().argmax(1, keepdim=True)).squeeze(1)


def _curve(name: str, shift: float, t: Tensor) -> Tensor:
    if name == "shift":
        return shift * t / (1 + (shift - 1) * t)
    if name == "cosine":
        return 1 - 0.5 * (1 + (math.pi * t).cos())
    if name == "logit_normal":
        return 0.5 * (1 + ((t / (1 - t)).log() / torch.tensor(2.0).sqrt()).erf())
    return t
