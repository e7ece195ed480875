"""The masked objective: some tokens of an answer are hidden, and what they are is said from all the others.

    corruption   each answer draws a time t; each of its tokens becomes the mask with probability 1 - alpha(t)
    visibility   full, or prefix (what is given does not see the answer, so that it is computed once and exactly)
    target       the hidden tokens; a causal model that begins here keeps its shift (`anneal_steps`: DiffuLLaMA)
    weight       -alpha' / (1 - alpha), 1/t for linear: with the reduction "tokens" a bound on -log p(answer | prompt,
                 image), tight for exact conditionals (tests/objectives/test_truths.py); or those of published systems
    sampler      any number of tokens a call, in any order, by what is sure (`samplers.absorbing`); infill, rank
    paper        MDLM arXiv:2406.07524, equation 11; LLaDA arXiv:2502.09992; complementary views: LaViDa,
                 arXiv:2505.16839, section 3.2; cart: Dream, arXiv:2508.15487

    model: {backbone: Qwen/Qwen2.5-0.5B, shift: true}
    data: data_configs/scenes.yaml
    objective:
      name: masked
      options: {anneal_steps: 0.1, complementary: true, reduction: masked, weight: none}

The choice for short answers that are to be filled in, checked and ranked as well as written, in few calls (`confidence`
lowers their number further). Pitfalls: without prefix visibility nothing is computed once; a canvas has a length before
its text is known (end tokens pad answers: `answer_lengths`, `further_ends` of the processor); weights 1/t have a large
variance, which `complementary` and a range of noise lower, the latter at the price of the bound; and published
reductions are not interchangeable.

Time: t = 0 is clean, t = 1 is noise. Shapes: B rows, L tokens, N hidden tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmllm.diffusion.absorbing import draw_hidden, hide
from dmllm.diffusion.schedules import SCHEDULES
from dmllm.nn.rope import places
from dmllm.nn.visibility import ORDERED, Visibility, layout
from dmllm.objectives.anneal import anneal, openness
from dmllm.objectives.cart import context_adaptive
from dmllm.objectives.confidence import confidence_loss, number_answers
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import REDUCTIONS, normalise, padding_as_one, per_document, weighted_cross_entropy
from dmllm.objectives.restrict import one_block
from dmllm.objectives.views import Laid, append_canvas, repeat_batch, show_padding, spread
from dmllm.types import IGNORE, Batch, LossSum, SpecialTokens

WEIGHTS = ("elbo", "clipped", "none", "cart")
PADDINGS = ("hidden", "seen", "faint")
STREAM = 8  # of an example's random numbers: which block is noised


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """What is hidden, how often, and what it weighs."""

    schedule: str = "linear"
    """Noise schedule by name: linear, cosine, polynomial."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. {power: 2} for polynomial."""
    weight: str = "elbo"
    """elbo: -alpha'/(1 - alpha), 1/t for linear. clipped: that, at most `weight_clip`. none: 1 (not a bound). cart: by
    how much is shown near the token (Dream; not a bound)."""
    weight_clip: float = 10.0
    """Greatest weight under `clipped`."""
    cart_p: float = 0.3
    """How fast `cart` forgets with distance, in (0, 1): near 1 only neighbours count. Dream's paper has 0.1 to 0.3."""
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
    max_noise: float = 1.0
    """Largest noise probability drawn. With min_noise the range to which BD3-LM and LLaDA2 clip (for example 0.3 to
    0.8), which lowers the variance; the loss is then no longer a bound. Both 1: everything is always hidden."""
    confidence: float = 0.0
    """Coefficient of the mean entropy where the prediction is right: fewer calls for an answer (LLaDA2.0-CAP, dParallel
    with 2), at some cost in quality (objectives/confidence.py). 0: not computed."""
    confidence_temperature: float = 1.0
    """Of the distributions whose entropy that is; dParallel has 0.5."""
    noise_block: int = 0
    """Tokens of the one block of each answer that is noised, what is behind it being all hidden (dParallel has 32 with
    min_noise, max_noise 0.5, complementary, weight none, reduction masked). 0: tokens anywhere are."""
    anneal_steps: float = 0.0
    """From a causal model: steps (below 1, a fraction of all) over which attention opens to what is behind a token
    (DiffuLLaMA; objectives/anneal.py). 0: it is open at once."""
    padding: str = "hidden"
    """What attention makes of padding. Two legacies of published training, under which a loss depends on how far its
    row is padded: seen as any other row (LaViDa), or faint, with 1/e of the weight (MMaDA's additive mask of 1, 0)."""

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise ValueError(f"padding={self.padding!r} is not one of {', '.join(PADDINGS)}.")
        if self.weight not in WEIGHTS:
            raise ValueError(f"weight={self.weight!r} is not one of {', '.join(WEIGHTS)}.")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not one of {', '.join(REDUCTIONS)}.")
        if not 0 < self.min_noise <= self.max_noise <= 1:
            raise ValueError(
                f"min_noise={self.min_noise} and max_noise={self.max_noise} must lie in this order between 0 and 1; "
                "1e-3 and 1 are usual."
            )
        if not 0 < self.cart_p < 1:
            raise ValueError(f"cart_p={self.cart_p} must lie between 0 and 1; 0.3 is usual.")
        if self.confidence < 0 or self.confidence_temperature <= 0:
            raise ValueError(
                f"confidence={self.confidence} must not be negative, confidence_temperature="
                f"{self.confidence_temperature} must be positive; dParallel has 2 and 0.5."
            )
        if self.noise_block < 0 or self.anneal_steps < 0:
            raise ValueError(f"noise_block={self.noise_block}, anneal_steps={self.anneal_steps} must not be negative.")
        if self.noise_block and self.weight == "cart":
            raise ValueError("weight='cart' counts what is shown, which noise_block hides; use elbo, clipped or none.")
        SCHEDULES.load(self.schedule)(**self.schedule_options)


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A corrupted batch and what is to be predicted. Further views make it taller or longer than the batch."""

    batch: Batch  # input_ids hold the mask token where hidden
    visibility: Visibility
    time: Tensor  # [B, L], each row's time
    rows: Tensor  # [N] int64 into B * L
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32
    counts: dict[str, Tensor]  # by loss name, scalars: known before the forward, to be summed over the whole step
    answers: Tensor | None = None  # [N] int64 below N, which answer each token is of, where confidence is learned


class Masked:
    """Masked diffusion as two steps: corrupt a batch, then score a model on it."""

    def __init__(self, config: MaskedConfig, special: SpecialTokens, visibility: str):
        self.config, self.special, self.visibility = config, special, visibility
        self._check_visibility()
        self.schedule = SCHEDULES.load(config.schedule)(**config.schedule_options)
        noise = torch.tensor([config.min_noise, config.max_noise], dtype=torch.float64)
        self.t_min, self.t_max = self.schedule.time(noise).tolist()
        self.coefficients = {"confidence": config.confidence} if config.confidence else {}

    @staticmethod
    def requires(config: MaskedConfig, visibility: str) -> dict[str, Any]:
        """A causal model gets full attention, one of permutations a prefix's; a shift of logits stays as it is."""
        become = {"causal": "full", ORDERED: "prefix"}
        return {"process": "absorbing", "visibility": become.get(visibility, visibility)}

    def prepare(self, batch: Batch, draws: Draws) -> Noised:
        """Hide tokens of each answer. Deterministic in (batch, draws); the batch is left as it is."""
        canvas, share = batch.labels != IGNORE, None  # [B, L]
        if self.config.noise_block:
            uniform = draws.uniform(int(batch.documents.max().clamp(min=0)) + 1, STREAM).to(canvas.device)
            batch, share = one_block(batch, self.config.noise_block, uniform, self.special.mask)
        scorable = batch.labels != IGNORE
        t = self.times(batch, draws).to(batch.labels.device)  # [B, L]
        uniform = draws.uniform(batch.labels.shape[1]).to(t.device)
        hidden = draw_hidden(1 - self.schedule.alpha(t), uniform, scorable)
        if self.config.at_least_one:
            hidden = hidden | _lowest(uniform, hidden, scorable, batch.documents)
        noised = self.corrupt(batch, hidden, t, canvas=canvas, share=share)
        look, at = noised.visibility, places(noised.batch.positions)
        return replace(noised, visibility=anneal(look, at, draws, openness(draws, self.config.anneal_steps)))

    def corrupt(
        self, batch: Batch, hidden: Tensor, time: Tensor, *, canvas: Tensor | None = None, share: Tensor | None = None
    ) -> Noised:
        """The batch with given tokens hidden: what `prepare` has drawn, or what was recorded from published code.

        Args:
            batch: [B, L]; what has a label counts as scorable.
            hidden: [B, L] bool, among what has a label.
            time: [B, L], from which follow the weights.
            canvas: [B, L] bool, what may be noised at another time; None: what has a label.
            share: [B, L] float, as how many tokens each counts, 0 where there is no label; None: one.
        """
        scorable = batch.labels != IGNORE
        views, times = [hidden], [time]
        if self.config.complementary:
            views.append(scorable & ~hidden)
            times.append(self._complement(time))
        share = scorable.float() if share is None else share
        if self.config.padding_as_one:
            share = share * padding_as_one(batch.labels, batch.documents, self.special.eos)
        numbers, counts = [], {}
        if self.config.confidence:
            numbers = number_answers(batch.documents, len(views))
            counts["confidence"] = (per_document(share, batch.documents) > 0).sum().float().cpu() * len(views)
        weights, count = normalise(
            self.config.reduction,
            torch.cat([self.weights(batch, *view, time) for view in zip(views, times, strict=True)]),
            torch.cat([share] * len(views)),
            torch.cat(views),
            torch.cat([batch.documents] * len(views)),
        )
        batch, look, source = self._lay_out(batch, len(views), scorable if canvas is None else canvas)
        if self.config.padding != "hidden":
            look = show_padding(look, faint=self.config.padding == "faint")
        out = spread(views, source)
        rows = out.flatten().nonzero().squeeze(1)
        return Noised(
            batch=replace(batch, input_ids=hide(batch.input_ids, out, self.special.mask)),
            visibility=look,
            time=spread(times, source),
            rows=rows,
            targets=batch.labels.flatten()[rows],
            weights=spread([weights], source).flatten()[rows],
            counts={"masked": count.cpu(), **counts},
            answers=spread(numbers, source).flatten()[rows].unique(return_inverse=True)[1] if numbers else None,
        )

    def loss(self, model: Callable[..., Any], noised: Noised) -> dict[str, LossSum]:
        """The losses before division; each one's count, of all micro-batches together, is its divisor."""
        logits = forward(model, noised.batch, noised.visibility, noised.rows, noised.time).logits
        if self.config.zero_masking:
            mask = torch.arange(logits.shape[-1], device=logits.device) == self.special.mask
            logits = logits.masked_fill(mask, -torch.inf)
        losses = {"masked": weighted_cross_entropy(logits, noised.targets, noised.weights, noised.counts["masked"])}
        if noised.answers is not None:
            count, temperature = noised.counts["confidence"], self.config.confidence_temperature
            losses["confidence"] = confidence_loss(logits, noised.targets, noised.answers, count, temperature)
        return losses

    def _check_visibility(self) -> None:
        """Raises ValueError if this objective is not learned under the model's visibility."""
        if self.visibility not in ("full", "prefix"):
            raise ValueError(
                f"The objective masked learns under visibility full or prefix, and this model's is {self.visibility}; "
                "set model.visibility=full, or for blocks objective.name=block."
            )
        if self.config.padding != "hidden" and self.visibility != "full":
            raise ValueError(f"padding={self.config.padding!r} needs model.visibility=full, not {self.visibility}.")

    def _lay_out(self, batch: Batch, views: int, canvas: Tensor) -> Laid:
        """What the model is fed for one view of a batch, or for two; `canvas` [B, L] is what may be noised."""
        look = layout(self.visibility, documents=batch.documents, canvas=canvas)
        if views == 2 and self.visibility == "prefix":
            return append_canvas(batch, look, canvas)
        return repeat_batch(batch, look, views)

    def _alike(self, batch: Batch) -> Tensor:
        """[B, L]: rows of a batch row with the same number share a time. Here each document has one."""
        return batch.documents.clamp(min=0)

    def times(self, batch: Batch, draws: Draws) -> Tensor:
        """Times stratified over the whole step: [B, L]."""
        alike = self._alike(batch).cpu()
        t = self.t_min + (self.t_max - self.t_min) * draws.stratified(int(alike.max()) + 1)
        return t.gather(1, alike)

    def _complement(self, t: Tensor) -> Tensor:
        """The times at which is hidden what is shown at t; where all is hidden at t, that is nothing."""
        config = self.config
        least = min(config.min_noise, 1 - config.max_noise) or config.min_noise
        floor = float(self.schedule.time(torch.tensor(least, dtype=torch.float64)))
        return self.schedule.time(self.schedule.alpha(t)).clamp(floor, 1)

    def weights(self, batch: Batch, hidden: Tensor, t: Tensor, drawn: Tensor) -> Tensor:
        """Of a view at times t that follow from those drawn, all [B, L]: how densely its noise is drawn is theirs."""
        config = self.config
        if config.weight == "none":
            return torch.ones_like(t)
        if config.weight == "cart":
            return context_adaptive(hidden, batch.documents, places(batch.positions), config.cart_p)
        if config.min_noise == config.max_noise:
            weight = 1 / (1 - self.schedule.alpha(t))
        else:  # noise is then as if drawn evenly between its bounds, whatever the schedule; for linear this is 1/t
            factor = (self.t_max - self.t_min) / (config.max_noise - config.min_noise)
            weight = -self.schedule.alpha_prime(drawn) / (1 - self.schedule.alpha(t)) * factor
        return weight.clamp(max=config.weight_clip) if config.weight == "clipped" else weight


def _lowest(uniform: Tensor, hidden: Tensor, scorable: Tensor, documents: Tensor) -> Tensor:
    """For each document in which nothing is hidden, the scorable row with the smallest draw: [B, L] bool."""
    width = max(int(documents.max()) + 1, 1)
    place = documents.clamp(min=0)
    empty = torch.zeros(len(documents), width, device=documents.device).scatter_add_(1, place, hidden.float()) == 0
    draws = uniform.masked_fill(~scorable, 2.0)
    least = torch.full((len(documents), width), 3.0, device=documents.device)
    least = least.scatter_reduce_(1, place, draws, "amin", include_self=True)
    return scorable & empty.gather(1, place) & (draws == least.gather(1, place))


MASKED = (Masked, MaskedConfig)
