"""Objectives of tokens that turn into words or masks: how a batch is corrupted, and what a model is asked of it.

What a prediction costs is said by `uniform` and `score_entropy`. What becomes of a token is drawn by two numbers, the
first of which is the masked objective's. With self-conditioning the model is asked twice, first without a gradient, and
in some of the examples it then hears what it has said.

Source of self-conditioning: Chen et al., arXiv:2208.04202, section 3.2.
Time: t = 0 is clean, t = 1 is noise. Shapes: B rows, L tokens, N scored tokens, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmllm.diffusion.uniform import NoiseConfig, build_noise, corrupt, of_words
from dmllm.nn.rope import places
from dmllm.nn.visibility import ORDERED, Visibility, check_layout, layout
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import REDUCTIONS, normalise, padding_as_one
from dmllm.objectives.views import Laid, number_blocks, repeat_batch, spread, two_copies
from dmllm.types import IGNORE, Batch, LossSum, SpecialTokens, Vocabulary

TIMES = ("block", "document")
HEAD = "self_conditioning"
WORDS, HEARD = 1, 2  # streams of random numbers beside the first, which says what becomes of a token


@dataclass(frozen=True, kw_only=True)
class NoisingConfig(NoiseConfig):
    """What tokens become, and when."""

    reduction: str = "tokens"
    """What the sum is divided by: tokens, batch_length, answer_length, masked (those that became another; see
    objectives/loss.py)."""
    padding_as_one: bool = False
    """The end tokens that pad an answer weigh as much as one token together, not each."""
    min_time: float = 1e-3
    """Smallest time drawn; GIDD's is 1e-4."""
    max_time: float = 1 - 1e-3
    """Largest time drawn."""
    times: str = "block"
    """Under visibility block:N: each block draws its own time, or all of a document's share one (document)."""
    self_conditioning: float = 0.0
    """How often a model that hears its own last prediction hears one in training; 0 is a model that does not. 0.5 is
    usual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("reduction", REDUCTIONS), ("times", TIMES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}.")
        if not 0 < self.min_time < self.max_time < 1:
            raise ValueError(
                f"min_time={self.min_time} and max_time={self.max_time} must lie in this order between 0 and 1, at "
                "which weights are infinite; 1e-3 and 0.999 are usual."
            )
        if not 0 <= self.self_conditioning <= 1:
            raise ValueError(f"self_conditioning={self.self_conditioning} must lie between 0 (none) and 1 (always).")


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    """A corrupted batch, and what of it is scored: what may be noised, or where all noise is masks, what is masked."""

    batch: Batch  # input_ids are x_t
    visibility: Visibility
    time: Tensor  # [B, L], each row's time; 0 for what is given in a copy of its own
    rows: Tensor  # [N] int64 into B * L
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32, each token's share of the sum
    heard: Tensor  # [N] bool, where the model hears its own prediction
    counts: dict[str, Tensor]  # by loss name


class Noising:
    """Diffusion over words as two steps: corrupt a batch, then score a model on it."""

    name: str  # of the main loss
    special: Vocabulary

    def __init__(self, config: Any, special: SpecialTokens, visibility: str):
        assert isinstance(special, Vocabulary), "random words are drawn from a vocabulary"
        self.config, self.special, self.visibility = config, special, visibility
        if visibility not in ("full", "prefix") and check_layout(visibility) is None:
            raise ValueError(
                f"The objective {self.name} learns under visibility full, prefix or block:N, and this model's is "
                f"{visibility}; set model.visibility=full."
            )
        self.noise = build_noise(config, special.words)
        self.names = [self.name]  # of the losses

    def prepare(self, batch: Batch, draws: Draws) -> Disturbed:
        """Corrupt each answer. Deterministic in (batch, draws); the batch is left as it is."""
        device, length = batch.labels.device, batch.labels.shape[1]
        scorable = batch.labels != IGNORE
        t = self._times(batch, draws).to(device)  # [B, L]
        numbers = (draws.uniform(length).to(device), draws.uniform(length, WORDS).to(device))
        noised = corrupt(batch.labels.clamp(min=0), self.noise.at(t), *numbers, self.special)
        return self.disturb(batch, torch.where(scorable, noised, batch.input_ids), t, draws)

    def disturb(self, batch: Batch, noised: Tensor, time: Tensor, draws: Draws | None = None) -> Disturbed:
        """The batch with `noised` [B, L] in place of its ids, at `time` [B, L]; without `draws` it hears nothing."""
        scorable, changed = batch.labels != IGNORE, noised != batch.labels
        share = scorable.float()
        if self.config.padding_as_one:
            share = padding_as_one(batch.labels, batch.documents, self.special.eos)
        ones = torch.ones_like(share)
        weights, count = normalise(self.config.reduction, ones, share, changed & scorable, batch.documents)
        heard = torch.zeros_like(scorable)
        if self.config.self_conditioning and draws is not None:
            heard = (draws.uniform(1, HEARD) < self.config.self_conditioning).to(scorable.device) & scorable
        batch, look, source = self._lay_out(batch)
        out = spread([scorable], source)
        scored = spread([scorable & changed], source) if self.config.noise == "absorbing" else out
        rows = scored.flatten().nonzero().squeeze(1)
        return Disturbed(
            batch=replace(batch, input_ids=torch.where(out, spread([noised], source), batch.input_ids)),
            visibility=look,
            time=spread([time], source),
            rows=rows,
            targets=batch.labels.flatten()[rows],
            weights=spread([weights], source).flatten()[rows],
            heard=spread([heard], source).flatten()[rows],
            counts={name: count.cpu() for name in self.names},
        )

    def loss(self, model: Callable[..., Any], noised: Disturbed) -> dict[str, LossSum]:
        """The losses before division; each one's count, of all micro-batches together, is its divisor."""
        asked = noised.batch, noised.visibility, noised.rows, noised.time
        more: dict[str, Tensor] = {}
        if self.config.self_conditioning:
            nothing = torch.zeros(0, self.special.size, device=noised.rows.device)
            with torch.no_grad():  # in every process, whoever hears
                said = forward(model, *asked, feedback=nothing, feedback_rows=noised.rows[:0]).logits
            more = {
                "feedback": of_words(said, self.special),
                "feedback_rows": torch.where(noised.heard, noised.rows, -1),
            }
        logits = of_words(forward(model, *asked, **more).logits.float(), self.special)
        z, t = (x.flatten()[noised.rows] for x in (noised.batch.input_ids, noised.time))
        losses = self._each(logits, noised.targets, z, t)
        return {
            name: LossSum(total=(each * noised.weights).sum(), count=noised.counts[name])
            for name, each in losses.items()
        }

    def _each(self, logits: Tensor, targets: Tensor, noised: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Each token's losses [N] by name, of logits [N, V] of the words, x_0 and x_t [N], at the times [N]."""
        raise AssertionError("an objective says what a prediction costs")

    def _lay_out(self, batch: Batch) -> Laid:
        if (length := check_layout(self.visibility)) is not None:
            return two_copies(batch, length, 1)
        look = layout(self.visibility, documents=batch.documents, canvas=batch.labels != IGNORE)
        return repeat_batch(batch, look, 1)

    def _times(self, batch: Batch, draws: Draws) -> Tensor:
        """Times stratified over the whole step, one for each document or block: [B, L] on the CPU."""
        alike, length = batch.documents.clamp(min=0), check_layout(self.visibility)
        if length is not None and self.config.times == "block":
            alike = number_blocks(batch.documents, places(batch.positions) // length)
        number = draws.stratified(int(alike.max()) + 1).gather(1, alike.cpu())
        return self._time(number)

    def _time(self, number: Tensor) -> Tensor:
        """Times from numbers that are spread over [0, 1)."""
        return self.config.min_time + (self.config.max_time - self.config.min_time) * number


def full(visibility: str) -> str:
    """The visibility for a model whose own may be that of another kind of objective."""
    return {"causal": "full", ORDERED: "prefix"}.get(visibility, visibility)
