"""The masked-diffusion objective: a weighted cross-entropy that bounds -log p(answer | prompt, image).

Each answer draws a time t; each of its tokens is hidden with probability 1 - alpha(t); the model fills in what is
hidden. With `weight: elbo` and the reduction "tokens" this is a bound, tight for exact conditionals
(tests/objectives/test_masked.py); the other weights and reductions are those of published systems.

Source: Sahoo et al., MDLM, arXiv:2406.07524, equation 11; the linear schedule gives LLaDA's 1/t (arXiv:2502.09992).
Complementary views: LaViDa, arXiv:2505.16839, section 3.2. Time: t = 0 is clean, t = 1 is noise.
Shapes: B rows, L tokens, N hidden tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmllm.diffusion.absorbing import draw_hidden, hide
from dmllm.diffusion.schedules import SCHEDULES, elbo_weight
from dmllm.nn.visibility import Visibility, layout
from dmllm.objectives.draws import Draws
from dmllm.objectives.loss import REDUCTIONS, normalise, padding_as_one, weighted_cross_entropy
from dmllm.types import IGNORE, PADDING, TEXT, Batch, LossSum, SpecialTokens

WEIGHTS = ("elbo", "clipped", "none")


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """What is hidden, how often, and what it weighs."""

    schedule: str = "linear"
    """Noise schedule by name: linear, cosine, polynomial."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. {power: 2} for polynomial."""
    weight: str = "elbo"
    """elbo: -alpha'/(1 - alpha), 1/t for linear. clipped: that, at most `weight_clip`. none: 1 (not a bound)."""
    weight_clip: float = 10.0
    """Greatest weight under `clipped`."""
    reduction: str = "tokens"
    """What the sum is divided by: tokens, batch_length, answer_length, masked (see objectives/loss.py)."""
    complementary: bool = False
    """Two views of each answer, the second hiding exactly what the first shows; images are encoded once."""
    padding_as_one: bool = False
    """The end tokens that pad an answer weigh as much as one token together, not each: in a long canvas for a short
    answer nearly all tokens are padding, and hardly anything of the loss would be left for the answer."""
    at_least_one: bool = False
    """Hide at least one token of every answer (LaViDa); with weight elbo the loss is then no longer a bound."""
    zero_masking: bool = False
    """The mask token gets no probability (SUBS: MDLM, section 3.2.3); LLaDA's loss leaves it a share."""
    min_noise: float = 1e-3
    """Smallest noise probability drawn, LLaDA's and MDLM's epsilon; the weight 1/t is at most 1/min_noise."""

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise ValueError(f"weight={self.weight!r} is not one of {', '.join(WEIGHTS)}.")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not one of {', '.join(REDUCTIONS)}.")
        if not 0 < self.min_noise < 1:
            raise ValueError(f"min_noise={self.min_noise} must lie between 0 and 1; 1e-3 is usual.")
        SCHEDULES.load(self.schedule)(**self.schedule_options)


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A corrupted batch and what is to be predicted. Complementary views make it taller or longer than the batch."""

    batch: Batch  # input_ids hold the mask token where hidden
    visibility: Visibility
    time: Tensor  # [B, L], each row's time
    rows: Tensor  # [N] int64 into B * L
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32
    counts: dict[str, Tensor]  # by loss name, scalars: known before the forward, to be summed over the whole step


class Masked:
    """Masked diffusion as two steps: corrupt a batch, then score a model on it."""

    def __init__(self, config: MaskedConfig, special: SpecialTokens, visibility: str):
        self.config, self.special, self.visibility = config, special, visibility
        self.schedule = SCHEDULES.load(config.schedule)(**config.schedule_options)
        self.t_min = float(self.schedule.time(torch.tensor(config.min_noise, dtype=torch.float64)))

    def prepare(self, batch: Batch, draws: Draws) -> Noised:
        """Hide tokens of each answer. Deterministic in (batch, draws); the batch is left as it is."""
        scorable = batch.labels != IGNORE  # [B, L]
        t = self._times(batch.documents, draws).to(batch.labels.device)  # [B, L]
        uniform = draws.uniform(batch.labels.shape[1]).to(t.device)
        hidden = draw_hidden(1 - self.schedule.alpha(t), uniform, scorable)
        if self.config.at_least_one:
            hidden = hidden | _lowest(uniform, hidden, scorable, batch.documents)
        look = layout(self.visibility, documents=batch.documents, canvas=scorable)
        if self.config.complementary:
            other = self.schedule.time(self.schedule.alpha(t)).clamp(self.t_min, 1)
            views = append_views if self.visibility == "prefix" else double_batch
            batch, look, scorable, hidden, t = views(batch, look, scorable, hidden, t, other)
        share = scorable.float()
        if self.config.padding_as_one:
            share = padding_as_one(batch.labels, batch.documents, self.special.eos)
        weights, count = normalise(self.config.reduction, self._weights(t), share, hidden, batch.documents)
        rows = hidden.flatten().nonzero().squeeze(1)
        return Noised(
            batch=replace(batch, input_ids=hide(batch.input_ids, hidden, self.special.mask)),
            visibility=look,
            time=t,
            rows=rows,
            targets=batch.labels.flatten()[rows],
            weights=weights.flatten()[rows],
            counts={"masked": count.cpu()},
        )

    def loss(self, model: Callable[..., Any], noised: Noised) -> dict[str, LossSum]:
        """The loss before division; `counts["masked"]` of all micro-batches together is the divisor."""
        batch = noised.batch
        logits = model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            image_resizes=batch.image_resizes,
            image_grids=batch.image_grids,
            image_slots=batch.image_slots,
            positions=batch.positions,
            visibility=noised.visibility,
            time=noised.time,
            rows=noised.rows,
        ).logits
        if self.config.zero_masking:
            mask = torch.arange(logits.shape[-1], device=logits.device) == self.special.mask
            logits = logits.masked_fill(mask, -torch.inf)
        return {"masked": weighted_cross_entropy(logits, noised.targets, noised.weights, noised.counts["masked"])}

    def _times(self, documents: Tensor, draws: Draws) -> Tensor:
        """One time per document, stratified over the whole step, spread to its rows: [B, L]."""
        per_document = draws.stratified(max(int(documents.max()) + 1, 1))
        t = self.t_min + (1 - self.t_min) * per_document
        return t.gather(1, documents.clamp(min=0).cpu())

    def _weights(self, t: Tensor) -> Tensor:
        if self.config.weight == "none":
            return torch.ones_like(t)
        # drawing from [t_min, 1] alone, this factor keeps a constant cost unbiased; it is 1 for the linear schedule
        weight = elbo_weight(self.schedule, t) * ((1 - self.t_min) / (1 - self.config.min_noise))
        return weight.clamp(max=self.config.weight_clip) if self.config.weight == "clipped" else weight


def _lowest(uniform: Tensor, hidden: Tensor, scorable: Tensor, documents: Tensor) -> Tensor:
    """For each document in which nothing is hidden, the scorable row with the smallest draw: [B, L] bool."""
    width = max(int(documents.max()) + 1, 1)
    place = documents.clamp(min=0)
    empty = torch.zeros(len(documents), width, device=documents.device).scatter_add_(1, place, hidden.float()) == 0
    draws = uniform.masked_fill(~scorable, 2.0)
    least = torch.full((len(documents), width), 3.0, device=documents.device)
    least = least.scatter_reduce_(1, place, draws, "amin", include_self=True)
    return scorable & empty.gather(1, place) & (draws == least.gather(1, place))


Views = tuple[Batch, Visibility, Tensor, Tensor, Tensor]
STREAMS = ("input_ids", "labels", "image_slots", "documents", "positions")


def double_batch(
    batch: Batch, look: Visibility, scorable: Tensor, hidden: Tensor, time: Tensor, other: Tensor
) -> Views:
    """Every row a second time below the first, the complement hidden. Both share the image features."""
    repeated = {name: torch.cat([getattr(batch, name)] * 2, getattr(batch, name).ndim - 2) for name in STREAMS}
    batch = replace(batch, indices=torch.cat([batch.indices] * 2), **repeated)
    rule = Visibility(*(torch.cat([x, x]) for x in (look.rank, look.canvas, look.document)))
    return batch, rule, torch.cat([scorable] * 2), torch.cat([hidden, scorable & ~hidden]), torch.cat([time, other])


def append_views(
    batch: Batch, look: Visibility, scorable: Tensor, hidden: Tensor, time: Tensor, other: Tensor
) -> Views:
    """Only the canvas a second time, behind the row, the complement hidden: what is given does not see the canvas.

    The second view has the next rank: it sees what is given and itself, not the first view, and is not seen by it.
    """
    place = scorable.int().argsort(dim=1, descending=True, stable=True)[:, : int(scorable.sum(1).max())]  # [B, C]
    there = scorable.gather(1, place)

    def extend(stream: Tensor, filler: int | bool | float) -> Tensor:
        if stream.ndim == 3:
            return torch.stack([extend(axis, filler) for axis in stream])
        return torch.cat([stream, stream.gather(1, place).masked_fill(~there, filler)], 1)

    fillers = {"input_ids": 0, "labels": IGNORE, "image_slots": TEXT, "documents": PADDING, "positions": 0}
    batch = replace(batch, **{name: extend(getattr(batch, name), fillers[name]) for name in STREAMS})
    rule = Visibility(extend(look.rank, 0), extend(look.canvas, False), batch.documents)
    rule.rank[:, time.shape[1] :] += 1
    hidden = torch.cat([hidden, (scorable & ~hidden).gather(1, place) & there], 1)
    return batch, rule, extend(scorable, False), hidden, torch.cat([time, other.gather(1, place)], 1)


MASKED = (Masked, MaskedConfig)
