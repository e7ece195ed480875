"""Any-length diffusion: a text grows from nothing, masks are inserted and filled, and its length need not be known.

Corruption   each token of an answer is shown, a mask, or gone: the stream becomes shorter (`diffusion.insertion`).
Visibility   full: the prompt's last row carries the gap in front of the answer, so it must see what is there.
Target       of each mask its token; of each gap, also before the first token and behind the last, how many are missing.
Weight       -alpha'/(1 - alpha) of either schedule: CE on masks, y - g + g log(g / y) on gaps where y are expected.
Sampler      `samplers.insertion`: a canvas that grows; infilling with holes of any length ([MASK:*]).
Source       Kim et al., FlexMDM, arXiv:2509.01025, section 4.2; its code divides by B x 1024, this by `reduction`.
Use it where lengths vary and matter, and to fill in; learn `spans` for that. Pitfalls: without the time a model cannot
tell how much is missing; end tokens that pad answers are as many tokens to be inserted; prompts are computed anew in
every call, since they see the canvas; an answer without a labelled token is not learned from.

    model: {visibility: full}
    objective: {name: insertion, options: {spans: 0.5}}
    samples: {decode: {max_new_tokens: 64, steps: 32}}

The model is told n = 1 - alpha(t) of the insertion schedule, the share that is gone, in place of t: what is missing
depends on nothing else of either schedule, so that sampling may take any of its own.
Time: t = 0 is clean, t = 1 is nothing. Shapes: B rows, L tokens, M <= L rows that are left, N masks, G gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.diffusion.insertion import GONE, MASKED, Insertion, divergence
from dmllm.diffusion.schedules import SCHEDULES, elbo_weight
from dmllm.nn.visibility import Visibility, layout
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import normalise, per_document, weighted_cross_entropy
from dmllm.objectives.views import FILLERS
from dmllm.types import IGNORE, PADDING, Batch, LossSum, SpecialTokens

HEAD = "insertion"
REDUCTIONS = ("tokens", "batch_length", "answer_length")
SPAN = 1  # the stream of draws that says where spans are


@dataclass(frozen=True, kw_only=True)
class InsertionConfig:
    """Which tokens are gone or masked, and what the two losses weigh."""

    schedule: str = "linear"
    """Noise schedule of insertion by name: linear, cosine, polynomial."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of it, e.g. {power: 2} for polynomial."""
    unmask_schedule: str = "linear"
    """Noise schedule of unmasking."""
    unmask_schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of it."""
    reduction: str = "tokens"
    """What the sums are divided by: tokens, batch_length, answer_length (see objectives/loss.py)."""
    tight: bool = False
    """Leave g log g out of the insertion loss. Gradients stay; the sum of both losses is then a tight bound in nats,
    and with it above by `diffusion.insertion.orders` of the answer's length, which FlexMDM's loss is."""
    time_conditioning: bool = True
    """Whether the model is told how much is gone; without, it cannot tell complete texts from those that are not."""
    spans: float = 0.0
    """How likely only a random span of an answer is noised, what stands around it being given: for infilling."""
    insertion_weight: float = 1.0
    """What the insertion loss counts for beside the other; the sum is a bound at 1."""
    min_noise: float = 1e-3
    """Smallest noise probability drawn, of either schedule; the weights are at most its inverse (linear)."""

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not one of {', '.join(REDUCTIONS)}.")
        if not 0 <= self.spans <= 1:
            raise ValueError(f"spans={self.spans} is a probability between 0 and 1; 0.5 is usual for infilling.")
        if not 0 < self.min_noise < 1:
            raise ValueError(f"min_noise={self.min_noise} must lie between 0 and 1; 1e-3 is usual.")
        if not self.insertion_weight > 0:
            raise ValueError(f"insertion_weight={self.insertion_weight} must be above 0; 1 makes the sum a bound.")
        _ = self.process

    @property
    def process(self) -> Insertion:
        """The two schedules."""
        insertion = SCHEDULES.load(self.schedule)(**self.schedule_options)
        return Insertion(insertion, SCHEDULES.load(self.unmask_schedule)(**self.unmask_schedule_options))


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A batch [B, M] without what is gone, and what is to be predicted."""

    batch: Batch  # input_ids hold the mask token where masked
    visibility: Visibility
    time: Tensor  # [B, M], the share that is gone
    rows: Tensor  # [N] int64 into B * M, the masks
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32
    gaps: Tensor  # [G] int64 into B * M, the rows behind which gaps are
    missing: Tensor  # [G] int64, how many tokens are missing there
    gap_weights: Tensor  # [G] float32
    counts: dict[str, Tensor]  # by loss name, scalars: known before the forward, to be summed over the whole step


class AnyLength:
    """Insertion and unmasking as two steps: take tokens out of a batch, then score a model on it."""

    def __init__(self, config: InsertionConfig, special: SpecialTokens, visibility: str):
        if visibility != "full":
            raise ValueError(
                f"The objective insertion learns under visibility full, and this model's is {visibility}: a row in "
                "front of a gap must see what is behind it; set model.visibility=full."
            )
        self.config, self.special, self.process = config, special, config.process
        self.coefficients = {HEAD: config.insertion_weight}
        least = torch.tensor(config.min_noise, dtype=torch.float64)
        self.t_min = max(float(s.time(least)) for s in (self.process.insertion, self.process.unmasking))

    @staticmethod
    def requires(config: InsertionConfig, visibility: str) -> dict[str, Any]:
        """What the model must have: the head that counts, and to be told the time."""
        return {"process": "insertion", "time_conditioning": config.time_conditioning, "heads": {HEAD: {}}}

    def prepare(self, batch: Batch, draws: Draws) -> Noised:
        """Take tokens of each answer out. Deterministic in (batch, draws); the batch is left as it is."""
        if self.config.spans:
            batch = replace(batch, labels=_within_spans(batch, draws, self.config.spans))
        alike = batch.documents.clamp(min=0).cpu()
        t = self.t_min + (1 - self.t_min) * draws.stratified(int(alike.max()) + 1)
        t = t.gather(1, alike).to(batch.labels.device)
        uniform = draws.uniform(2 * t.shape[1]).view(len(t), -1, 2).to(t.device)
        return self.corrupt(batch, self.process.states(t, uniform), t)

    def corrupt(self, batch: Batch, states: Tensor, time: Tensor) -> Noised:
        """The batch with given tokens masked and gone: what `prepare` has drawn.

        Args:
            batch: [B, L]; what has a label counts as scorable.
            states: [B, L], SHOWN, MASKED or GONE where scorable.
            time: [B, L], from which follow the weights.

        Raises:
            ValueError: an answer begins its document, so that no row stands in front of it.
        """
        scorable = batch.labels != IGNORE
        front = _in_front(scorable, batch.documents)
        gone, masked = scorable & (states == GONE), scorable & (states == MASKED)
        ids = batch.input_ids.masked_fill(masked, self.special.mask)
        scale, count = self._scale(batch, scorable)
        gap, missing = _gaps(gone, scorable | front)
        weights = scale * elbo_weight(self.process.unmasking, time)
        gap_weights = scale * elbo_weight(self.process.insertion, time)
        batch, take = _without(replace(batch, input_ids=ids), gone)
        rows, gaps = take(masked).flatten().nonzero().squeeze(1), take(gap).flatten().nonzero().squeeze(1)
        return Noised(
            batch=batch,
            visibility=layout("full", documents=batch.documents, canvas=batch.labels != IGNORE),
            time=take(1 - self.process.insertion.alpha(time)),
            rows=rows,
            targets=batch.labels.flatten()[rows],
            weights=take(weights).flatten()[rows],
            gaps=gaps,
            missing=take(missing).flatten()[gaps],
            gap_weights=take(gap_weights).flatten()[gaps],
            counts={"masked": count.cpu(), HEAD: count.cpu()},
        )

    def loss(self, model: Callable[..., Any], noised: Noised) -> dict[str, LossSum]:
        """The two losses before division: of tokens ("masked") and of how many are missing ("insertion")."""
        own = noised.batch, noised.visibility, noised.rows, noised.time
        output, counts = forward(model, *own, heads={HEAD: noised.gaps}), noised.counts
        tokens = weighted_cross_entropy(output.logits, noised.targets, noised.weights, counts["masked"])
        cost = divergence(output.heads[HEAD], noised.missing, tight=self.config.tight) * noised.gap_weights
        return {"masked": tokens, HEAD: LossSum(total=cost.sum(), count=counts[HEAD])}

    def _scale(self, batch: Batch, scorable: Tensor) -> tuple[Tensor, Tensor]:
        """What weights [B, L] of any row are divided by, and the count that remains to be divided by."""
        share = scorable.float()
        _, count = normalise(self.config.reduction, share, share, share, batch.documents)
        if self.config.reduction != "answer_length":
            return torch.ones_like(share), count
        return 1 / per_document(share, batch.documents).gather(1, batch.documents.clamp(min=0)).clamp(min=1), count


def _in_front(scorable: Tensor, documents: Tensor) -> Tensor:
    """The row in front of each run of `scorable` rows of a document, [B, L] bool.

    Raises:
        ValueError: there is none in front.
    """
    same = F.pad(documents[:, 1:] == documents[:, :-1], (1, 0))  # as the row before
    first = scorable & ~(same & F.pad(scorable[:, :-1], (1, 0)))
    if bool((first & ~same).any()):
        raise ValueError(
            "An answer begins its document, and the gap in front of it needs a row: let a prompt or a token without a "
            "label, such as a bos token, stand there."
        )
    return F.pad(first[:, 1:], (0, 1))


def _gaps(gone: Tensor, carries: Tensor) -> tuple[Tensor, Tensor]:
    """The rows behind which a gap is, [B, L] bool, and how many `gone` rows follow each at once, [B, L] int64."""
    place = torch.arange(gone.shape[1], device=gone.device).expand_as(gone)
    following = F.pad(place.masked_fill(gone, gone.shape[1]), (0, 1), value=gone.shape[1])[:, 1:]
    following = following.flip(1).cummin(1).values.flip(1)  # the next row that is left
    before = F.pad(gone.cumsum(1), (1, 0))  # [B, L + 1]: gone rows in front of each
    return carries & ~gone, before.gather(1, following) - before[:, 1:]


def _without(batch: Batch, gone: Tensor) -> tuple[Batch, Callable[[Tensor], Tensor]]:
    """The batch without the rows that are `gone` [B, L], closed up; and what takes further [B, L] along.

    Positions are counted as if these rows had never been there; what is left empty at the end is padding.
    """
    left = ~gone & (batch.documents != PADDING)
    place = (~left).int().argsort(dim=1, stable=True)[:, : max(int(left.sum(1).max()), 1)]
    there = left.gather(1, place)
    before = gone.cumsum(1)  # over the whole row; of a document, those since it began
    start = torch.where(gone, before - 1, before)
    width = int(batch.documents.max().clamp(min=0)) + 1
    own = batch.documents.clamp(min=0)
    least = torch.full((len(gone), width), gone.shape[1], device=gone.device)
    least = least.scatter_reduce(1, own, torch.where(batch.documents >= 0, start, gone.shape[1]), "amin")
    shifted = batch.positions - torch.where(batch.documents >= 0, before - least.gather(1, own), 0)

    def take(values: Tensor, filler: int = 0) -> Tensor:
        axes = values.shape[:-2]
        return values.gather(-1, place.expand(*axes, *place.shape)).masked_fill(~there, filler)

    moved = {name: getattr(batch, name) for name in FILLERS} | {"positions": shifted}
    return replace(batch, **{name: take(moved[name], filler) for name, filler in FILLERS.items()}), take


def _within_spans(batch: Batch, draws: Draws, likely: float) -> Tensor:
    """Labels [B, L] of which, in each document with probability `likely`, only those of a random span are left."""
    documents, device = batch.documents.clamp(min=0), batch.labels.device
    scorable = batch.labels != IGNORE
    rank = scorable.float().cumsum(1)
    lengths = per_document(scorable.float(), batch.documents)
    first = F.pad(lengths.cumsum(1)[:, :-1], (1, 0)).gather(1, documents)  # of the documents in front
    share = (rank - 1 - first) / lengths.gather(1, documents).clamp(min=1)
    uniform = draws.uniform(3 * lengths.shape[1], SPAN).view(len(documents), -1, 3).to(device)
    some, *ends = (u.gather(1, documents) for u in uniform.unbind(-1))
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    outside = (some < likely) & ((share < low) | (share >= high))
    return batch.labels.masked_fill(outside, IGNORE)


INSERTION = (AnyLength, InsertionConfig)
