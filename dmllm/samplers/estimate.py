"""What the model says of each position, in one pass over the logits: the choice, what speaks against it, and how sure.

Everything is measured relative to the most probable token, as mass against it, so that float32 does not tie at 1. The
logits are read a few rows at a time through one small float32 buffer: they are neither changed nor copied as a whole,
and what no rule asks for (the runner-up, the entropy, the change since the last call) is not computed.

Shapes: B rows of the batch, K positions asked for, V vocabulary, C rows read at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.samplers.config import DecodeConfig

MOST = 60.0  # exp of it is far from overflow, and beside it any other mass is nothing
LEAST = -1e4  # exp of it is 0, and 0 times it is 0
GROUP = 256  # scores among which a maximum is looked for
READ = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits read at a time: what a processor's cache holds, what fills a GPU


@dataclass(frozen=True)
class Estimate:
    """Of each position, [B, K]; mass is relative to the top token's."""

    tokens: Tensor  # int64, the token that would be committed
    top: Tensor  # int64, the most probable one
    chosen: Tensor  # float32, the mass of `tokens`; 1 at the top
    others: Tensor  # float32, the mass of all but the top
    runner_up: Tensor  # float32, the runner-up's logit less the top's; 0 where no rule asks for it
    entropy: Tensor  # float32, in nats; 0 where no rule asks for it
    change: Tensor  # float32, KL(now || last call) in nats; infinite where nothing is known of a last call

    @property
    def against(self) -> Tensor:
        """Probability of anything but `tokens`, [B, K]."""
        beside = torch.where(self.tokens == self.top, self.others, 1 + self.others - self.chosen)
        return beside / (1 + self.others)


@dataclass(frozen=True)
class Heard:
    """The logits of a call, for the next to compare with."""

    rows: Tensor  # [B, K] int64, the positions asked for
    logits: Tensor  # [B, K, V]

    def take(self, rows: Tensor) -> Heard:
        """Some rows of the batch, `rows` [B'] int64."""
        return Heard(self.rows[rows], self.logits[rows])

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where the positions `rows` [B, K] stand in these logits, counted over [B * K], and which of them do."""
        if not self.rows.shape[1]:  # a call that asked for nothing
            return torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        same = self.rows[:, None, :] == rows[:, :, None]
        of_row = torch.arange(len(rows), device=rows.device)[:, None] * self.rows.shape[1]
        return of_row + same.long().argmax(-1), same.any(-1)


def estimate(
    logits: Tensor,
    mask_id: int,
    config: DecodeConfig,
    uniform: Tensor | None = None,
    heard: Heard | None = None,
    rows: Tensor | None = None,
    given: Tensor | None = None,
) -> Estimate:
    """Choose a token for each position; the mask token (as a rule) and `config.suppress_ids` are never one.

    Args:
        logits: [B, K, V], left as they are.
        uniform: [B, K] float64 in [0, 1), one number a position; needed at temperature > 0. Or [B, K, V], what is added
            to the logarithm of each token's probability before the greatest is taken (Gumbel noise).
        heard: the last call's logits, to be compared with those of the same positions; `rows` [B, K] are these.
        given: [B, K] int64, tokens to be judged in place of a choice, which is made where this is -1.
    """
    flat, shape = logits.flatten(0, 1), logits.shape[:2]
    at_once = max(READ.get(logits.device.type, READ["cuda"]) // logits.shape[-1], 1)
    width = logits.shape[-1] if logits.is_cuda else -(-logits.shape[-1] // GROUP) * GROUP
    buffers = torch.empty(2, min(at_once, max(len(flat), 1)), width, device=logits.device)
    buffers[0, :, logits.shape[-1] :] = -torch.inf
    numbers = None if uniform is None else uniform.flatten(0, 1)
    place, met = (x.flatten() for x in heard.places(rows)) if heard is not None and rows is not None else (None, None)
    unknown = torch.full((len(flat),), torch.inf, device=logits.device)
    parts = []
    for start in range(0, max(len(flat), 1), at_once):
        part = slice(start, start + at_once)
        now, change = flat[part], unknown[part]
        if heard is not None and place is not None and met is not None:
            before = heard.logits.flatten(0, 1)[place[part]]
            change = torch.where(met[part], _divergence(now, before, mask_id, config), change)
        drawn = None if numbers is None else numbers[part]
        token = None if given is None else given.flatten()[part]
        parts.append((*_read(now, buffers[:, : len(now)], mask_id, config, drawn, token), change))
    whole = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
    return Estimate(*(column.view(shape) for column in whole))


def _read(
    logits: Tensor,
    buffers: Tensor,
    mask_id: int,
    config: DecodeConfig,
    uniform: Tensor | None,
    given: Tensor | None,
) -> tuple[Tensor, ...]:
    """The fields of an Estimate but the last, each [C], of logits [C, V]; two float32 `buffers` [2, C, V and more]."""
    padded, probs = buffers
    scores = padded[:, : logits.shape[1]]
    scores.copy_(logits)
    forbid(scores, mask_id, config)
    highest, top = _greatest(padded)
    tokens = top
    if config.draws_tokens and (given is None or uniform is not None):
        assert uniform is not None
        tokens = draw(scores, uniform, config.temperature, config.top_p)
    tokens = tokens if given is None else torch.where(given < 0, tokens, given)
    if config.distrust_ids:  # chosen or not, they have no part in the distribution by which choices are ranked
        for token in config.distrust_ids:
            scores[:, token] = -torch.inf
        highest, top = _greatest(padded)
    if config.count_mask and mask_id < scores.shape[1]:
        scores[:, mask_id] = logits[:, mask_id].float().minimum(highest + MOST)
    torch.softmax(padded, -1, out=probs)
    first = probs.gather(-1, top[:, None]).squeeze(-1)  # at least exp(-MOST) / V
    chosen = torch.ones_like(first) if tokens is top else probs.gather(-1, tokens[:, None]).squeeze(-1) / first
    others = probs.scatter_(-1, top[:, None], 0.0).sum(-1) / first
    runner_up = entropy = torch.zeros_like(highest)
    if config.reads_runner_up or config.reads_entropy:
        scores.scatter_(-1, top[:, None], -torch.inf)
    if config.reads_runner_up:
        runner_up = (scores.amax(-1) - highest).clamp_(min=LEAST)
    if config.reads_entropy:  # no term of the sum is above 0
        scores.sub_(highest[:, None]).clamp_(min=LEAST)
        inside = scores.mul_(probs[:, : logits.shape[1]]).sum(-1) / first
        entropy = others.log1p() - inside / (1 + others)
    return tokens, top, chosen, others, runner_up, entropy


def _greatest(padded: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each row of scores [C, n * GROUP], and where it first stands.

    In two looks, each at few: without a place to remember, a CPU finds a maximum ten times as fast.
    """
    if padded.is_cuda:
        return padded.max(-1)
    groups = padded.view(len(padded), padded.shape[1] // GROUP, GROUP)
    highest, group = groups.amax(-1).max(-1)
    inside = groups.gather(1, group[:, None, None].expand(-1, 1, GROUP)).squeeze(1).max(-1).indices
    return highest, group * GROUP + inside


def _divergence(now: Tensor, before: Tensor, mask_id: int, config: DecodeConfig) -> Tensor:
    """KL(now || before) in nats, [C], of what the logits [C, V] say of the tokens that may be chosen."""
    p, q = (logits.to(torch.float32, copy=True) for logits in (now, before))
    for scores in (p, q):
        if not config.count_mask and mask_id < scores.shape[1]:
            scores[:, mask_id] = -torch.inf
        for token in config.suppress_ids:
            scores[:, token] = -torch.inf
    p, q = (scores.log_softmax(-1).clamp_(min=LEAST) for scores in (p, q))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def forbid(scores: Tensor, mask_id: int, config: DecodeConfig) -> None:
    """Rules out, in scores [..., V] that are changed, what is never chosen. A mask of V or more is none of them."""
    if not config.choose_mask and mask_id < scores.shape[-1]:
        scores[..., mask_id] = -torch.inf
    for token in config.suppress_ids:
        scores[..., token] = -torch.inf


def draw(scores: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [...] from softmax(scores [..., V] / temperature), by inverting the cumulative distribution at `uniform`.

    One random number a position, in float64: a row of the batch draws the same whatever its neighbours are, and rare
    tokens keep their share. With top_p < 1 only the most probable tokens that together reach it remain. With `uniform`
    of the scores' shape it is what is added to them (see `estimate`).
    """
    if uniform.ndim == scores.ndim:
        scores = scores / temperature if top_p == 1 else distribution(scores, temperature, top_p).log()
        return (scores + uniform).argmax(-1)
    return invert(distribution(scores, temperature, top_p), uniform)


def distribution(scores: Tensor, temperature: float, top_p: float) -> Tensor:
    """softmax(scores [..., V] / temperature), with top_p < 1 without what is less probable than those that reach it."""
    mass = (scores / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = mass.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        mass = torch.zeros_like(mass).scatter_(-1, index, ordered.masked_fill(before >= top_p, 0.0))
    return mass


def invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulative sums of masses [..., V] reach the shares `uniform` [...] of the whole, [...] int64."""
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    target = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=mass.shape[-1] - 1)
