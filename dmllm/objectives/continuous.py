"""The continuous objective: tokens become vectors, answers are noised among them, and the model says what was there.

    corruption   Gaussian: z_t = signal(t) x + noise(t) eps of each answer's vectors; what is given is never noised
    visibility   full or prefix
    target       diffuseq: the vector, |x - x-hat|^2, a rounding term that keeps vectors apart, a prior term
                 flow: the token, by cross-entropy; x-hat is what the logits expect; optionally the velocity too
    weight       1 (neither is a bound)
    sampler      DDPM, DDIM or Euler steps and rounding at the end (`samplers.gaussian`)
    paper        Gong et al., DiffuSeq, arXiv:2210.08933; adaptive: Yuan et al., SeqDiffuSeq, arXiv:2212.10325; flow:
                 Gulrajani and Hashimoto, Plaid, arXiv:2305.18619, with the times of ELF, arXiv:2605.10938

For answers in few calls, all of their tokens at once, and to compare with discrete noise. Learned vectors collapse
where nothing holds them apart: they have one length (`normalised`) and the rounding term. In wide spaces noise hides
nothing until there is a lot of it: keep `width` small. How many rows are noise tells how long the answer is: train with
the canvas that will be asked for (`model.processor.answer_lengths`). Likelihoods are not computed.

    objective:
      name: continuous
      options:
        form: flow           # or diffuseq, with adaptive: true for SeqDiffuSeq
        width: 32            # features of a vector

Time: t = 0 is clean, t = 1 is noise. Shapes: B rows, L tokens, N noised tokens, d features of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.diffusion.absorbing import hide
from dmllm.diffusion.gaussian import normal
from dmllm.nn.visibility import Visibility, layout
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import REDUCTIONS, normalise, per_document, weighted_cross_entropy
from dmllm.types import IGNORE, Batch, LossSum, SpecialTokens

FORMS = {"diffuseq": "sqrt", "flow": "linear"}  # and the schedule that goes with each
SPACE = "latent"  # the head
LEAST = 0.05  # of the time that velocities are divided by
START, FEEDBACK = 1, 2  # streams of random numbers, beside that of the noise


@dataclass(frozen=True, kw_only=True)
class ContinuousConfig:
    """How tokens are noised, and what of them is learned."""

    form: str = "diffuseq"
    """diffuseq: regress the vectors. flow: predict the tokens."""
    width: int = 32
    """Features of a vector: 16 for Plaid, 128 for DiffuSeq with 30 000 words."""
    schedule: str | None = None
    """How noise grows with time: sqrt, cosine, log_snr, linear. None: sqrt for diffuseq, linear for flow."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. {gamma_max: 8} for log_snr."""
    normalised: bool = True
    """Whether all vectors have one length, sqrt(width), so that they cannot shrink or grow away from the noise."""
    self_conditioning: float | None = None
    """How often the model is shown its own x-hat from a first call on the same noise (SeqDiffuSeq 0.5, Plaid 0.25);
    decoding always shows the last one. 0 never does; None: 0.5, but for diffuseq that is not adaptive 0."""
    steps: int = 2000
    """Of diffuseq: times are 1/steps ... 1."""
    adaptive: bool = False
    """Of diffuseq: each position of the answer has a chain of noise levels of its own, refit to its losses so that they
    rise evenly with time (SeqDiffuSeq)."""
    stride: int = 1000
    """Training steps from one refit to the next; the first is at the third stride."""
    positions: int = 64
    """How many positions have a chain; those behind share the last one's."""
    bins: int = 100
    """Bins of times in which losses are collected; a divisor of `steps`."""
    time_mean: float = 0.8
    """Of flow: t = sigmoid(time_mean + time_std n), n normal; ELF's times, counted from the clean end."""
    time_std: float = 0.8
    """The spread of that; 0 draws times evenly from [0, 1)."""
    rounding: float = 1.0
    """Of diffuseq: the coefficient of -log p(token | its vector, barely noised)."""
    prior: float = 1.0
    """Of diffuseq: the coefficient of what is left of the vectors at t = 1, squared."""
    velocity: float = 0.0
    """Of flow: the coefficient of |x - x-hat|^2 / t^2, the squared error of the velocity; 0 leaves it out."""
    reduction: str = "tokens"
    """What sums are divided by: tokens, batch_length, answer_length (see objectives/loss.py)."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is not one of {', '.join(FORMS)}.")
        if self.adaptive and self.form != "diffuseq":
            raise ValueError("adaptive: true is of form=diffuseq; flow has one schedule for all positions.")
        if self.velocity and self.form != "flow":
            raise ValueError(f"velocity={self.velocity} is of form=flow; diffuseq regresses the vectors already.")
        if self.reduction not in REDUCTIONS or self.reduction == "masked":
            raise ValueError(f"reduction={self.reduction!r} is not one of tokens, batch_length, answer_length.")
        if not 0 <= self.often <= 1:
            raise ValueError(f"self_conditioning={self.self_conditioning} must be a probability, or None.")
        if self.time_std < 0 or min(self.rounding, self.prior, self.velocity) < 0:
            raise ValueError("time_std, rounding, prior and velocity must be 0 or above.")
        if min(self.steps, self.stride) < 1:
            raise ValueError(f"steps={self.steps} and stride={self.stride} must be at least 1.")

    @property
    def kind(self) -> str:
        """The schedule."""
        return self.schedule or FORMS[self.form]

    @property
    def often(self) -> float:
        """The probability of self-conditioning."""
        if self.self_conditioning is None:
            return 0.5 if self.form == "flow" or self.adaptive else 0.0
        return self.self_conditioning

    @property
    def space(self) -> dict[str, Any]:
        """The options of the head that holds the vectors."""
        options = {**({"steps": self.steps} if self.kind == "sqrt" else {}), **self.schedule_options}
        kind = {"schedule": self.kind, "schedule_options": options, "normalised": self.normalised}
        kind |= {"regresses": self.form == "diffuseq", "self_conditioning": self.often > 0, "width": self.width}
        chains = {"positions": self.positions, "steps": self.steps, "bins": self.bins}
        return {**kind, **(chains if self.adaptive else {})}


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A batch and the noise for its answers; the vectors themselves are the model's."""

    batch: Batch  # input_ids hold the mask token where noised
    visibility: Visibility
    time: Tensor  # [B, L], each row's time
    rows: Tensor  # [N] int64 into B * L
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32
    places: Tensor  # [N] int64, each token's place among those of its document that are noised
    noise: Tensor  # [N, d] standard normal
    start: Tensor  # [N, d] the same, for what is barely noised
    feedback: Tensor  # [N] bool, which rows are shown the model's own x-hat
    counts: dict[str, Tensor]
    step: int


class _Seen:
    """What a call was made on; vectors are the model's, and known within the call alone."""

    t: Tensor  # [N]
    vectors: Tensor  # [V, d]
    x: Tensor  # [N, d], the targets' own
    clean: Tensor  # [N, d], what was noised: x, or x with the noise of the chain's first time
    scores: Tensor  # [N, V], what clean is rounded to; of diffuseq


class Continuous:
    """Embedding diffusion as two steps: draw the noise, then score a model on it."""

    def __init__(self, config: ContinuousConfig, special: SpecialTokens, visibility: str):
        self.requires(config, visibility)
        self.config, self.special, self.visibility = config, special, visibility
        self.coefficients = {"mse": 1.0, "rounding": config.rounding, "prior": config.prior}
        if config.form == "flow":
            self.coefficients = {"tokens": 1.0} | ({"velocity": config.velocity} if config.velocity else {})

    @staticmethod
    def requires(config: ContinuousConfig, visibility: str) -> dict[str, Any]:
        """Raises ValueError under a visibility where answers are no whole canvas."""
        if visibility not in ("full", "prefix"):
            raise ValueError(
                f"The objective continuous learns under visibility full or prefix, and this model's is {visibility}; "
                "set model.visibility=full."
            )
        return {"process": "gaussian", "time_conditioning": True, "heads": {SPACE: config.space}}

    def prepare(self, batch: Batch, draws: Draws) -> Noised:
        """The noise of each answer. Deterministic in (batch, draws); the batch is left as it is."""
        config, device = self.config, batch.labels.device
        scorable = batch.labels != IGNORE  # [B, L]
        length, rows = batch.labels.shape[1], scorable.flatten().nonzero().squeeze(1)

        def drawn(stream: int) -> Tensor:
            found = draws.uniform(length * config.width, stream).view(-1, config.width)
            return normal(found).to(device)[rows]

        share = scorable.float()
        weights, count = normalise(config.reduction, share, share, scorable, batch.documents)
        shown = (draws.uniform(1, FEEDBACK) < config.often).to(device).expand(-1, length)
        return Noised(
            batch=replace(batch, input_ids=hide(batch.input_ids, scorable, self.special.mask)),
            visibility=layout(self.visibility, documents=batch.documents, canvas=scorable),
            time=self._times(batch, draws).to(device),
            rows=rows,
            targets=batch.labels.flatten()[rows],
            weights=weights.flatten()[rows],
            places=_places(scorable, batch.documents).flatten()[rows],
            noise=drawn(0),
            start=drawn(START),
            feedback=shown.flatten()[rows],
            counts=dict.fromkeys(self.coefficients, count.cpu()),
            step=draws.step,
        )

    def loss(self, model: Callable[..., Any], noised: Noised) -> dict[str, LossSum]:
        """The losses before division."""
        config, weights = self.config, noised.weights
        space = getattr(model, "module", model).space  # of the model within what wraps it for several processes
        if config.adaptive and space.training:
            space.chains.refit(noised.step, config.stride)
        x_hat = torch.zeros_like(noised.noise)
        if config.often:  # in every process, whomever it is shown to
            with torch.no_grad():
                said, seen = self._said(model, space, noised, x_hat)
                x_hat = torch.where(noised.feedback[:, None], space.x_hat(said, seen.vectors), x_hat)
        said, seen = self._said(model, space, noised, x_hat)
        if config.form == "flow":
            sums = {"tokens": weighted_cross_entropy(said, noised.targets, weights, noised.counts["tokens"]).total}
            if config.velocity:
                error = (space.x_hat(said, seen.vectors) - seen.x).square().mean(-1)
                sums["velocity"] = (error / seen.t.clamp(min=LEAST).square() * weights).sum()
        else:
            wanted = torch.where((seen.t <= 1 / config.steps)[:, None], seen.x, seen.clean)
            errors = (wanted - said.float()).square().mean(-1)
            if config.adaptive and space.training:
                space.chains.remember(seen.t, noised.places, errors.detach())
            left = space.level(torch.ones_like(seen.t), noised.places).signal[:, None] * seen.clean
            rounded = weighted_cross_entropy(seen.scores, noised.targets, weights, noised.counts["rounding"]).total
            sums = {"mse": (errors * weights).sum(), "rounding": rounded}
            sums["prior"] = (left.square().mean(-1) * weights).sum()
        return {name: LossSum(total=total, count=noised.counts[name]) for name, total in sums.items()}

    def _said(self, model: Callable[..., Any], space: Any, noised: Noised, x_hat: Tensor) -> tuple[Tensor, _Seen]:
        """What the model says of the noised rows, x-hat [N, d] or logits [N, V], shown an earlier `x_hat` [N, d]; and
        what was noised."""
        config, shape, rows, seen = self.config, noised.time.shape, noised.rows, _Seen()

        def latents(space: Any) -> Tensor:
            seen.vectors, seen.t = space.vectors(), noised.time.flatten()[rows]
            seen.x = seen.clean = F.embedding(noised.targets, seen.vectors)
            if config.form == "diffuseq":
                barely = space.level(torch.full_like(seen.t, 1 / config.steps), noised.places).noise
                seen.clean = seen.x + barely[:, None] * noised.start
                seen.scores = space.scores(seen.clean, seen.vectors)
            z = space.level(seen.t, noised.places).mix(seen.clean, noised.noise)
            own = torch.cat([z, x_hat], -1)[:, : space.features]
            return own.new_zeros(shape.numel(), own.shape[-1]).index_copy(0, rows, own).view(*shape, -1)

        there = torch.zeros(shape.numel(), dtype=torch.bool, device=rows.device).index_fill(0, rows, True)
        soft = {"latents": latents, "latent_rows": there.view(shape)}
        if space.head is None:
            return forward(model, noised.batch, noised.visibility, rows, noised.time, **soft).logits, seen
        output = forward(
            model, noised.batch, noised.visibility, rows[:0], noised.time, **soft, heads={space.head: rows}
        )
        return output.heads[space.head] + 0 * output.logits.sum(), seen  # so that every weight has a gradient

    def _times(self, batch: Batch, draws: Draws) -> Tensor:
        """Times stratified over the whole step, one for each document: [B, L]."""
        config, documents = self.config, batch.documents.clamp(min=0).cpu()
        drawn = draws.stratified(int(documents.max()) + 1)
        if config.form == "diffuseq":
            t = ((drawn * config.steps).floor() + 1) / config.steps
        elif config.time_std:
            t = torch.sigmoid(config.time_mean + config.time_std * normal(drawn))
        else:
            t = drawn
        return t.gather(1, documents)


def _places(scorable: Tensor, documents: Tensor) -> Tensor:
    """Each scorable token's place among those of its document, counted from 0, [B, L]."""
    counts = per_document(scorable.float(), documents)
    before = (counts.cumsum(1) - counts).long()
    return (scorable.long().cumsum(1) - 1 - before.gather(1, documents.clamp(min=0))).clamp(min=0)


CONTINUOUS = (Continuous, ContinuousConfig)
