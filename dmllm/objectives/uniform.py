"""The uniform objective: tokens that turned into random words are told from those that did not, and put right.

    corruption   a token is kept, or becomes any word (`noise: uniform`), or a mask or, now and then, a word (`hybrid`)
    visibility   full, prefix or block:N; the model is told the time, as a kept token looks like a random one
    target       the token, of every place that may be noised, whether it was or not
    weight       by the bound: udlm, gidd (continuous time), d3pm (`steps` of them); or none, plain cross-entropy
    sampler      ancestral (`samplers.uniform`), with corrector; or the surest first; every token may change to the end
    paper        D3PM arXiv:2107.03006, UDLM arXiv:2412.10193, GIDD arXiv:2503.04482

    model: {backbone: {hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4}, tokenizer: runs/tokenizer}
    data: data_configs/scenes.yaml
    objective:
      name: uniform
      options: {noise: hybrid, p_uniform: 0.1, bound: gidd, weight: dynamic}

For text that is to be revised while it is written, in few calls: every token may be put right to the end. It learns
more slowly than masks do. Pitfalls: the bounds take the prediction that leaves its own place out. By default the logits
are that; `parameterisation: posterior` says that they are p(x_0 | x_t), and they are converted before a bound is taken
of them (and the others before a cross-entropy), or it would not be tight. And hybrid noise weighs much near t = 0, so
that min_time matters to its bound.

Source of self-conditioning: Chen et al., arXiv:2208.04202; as DiffusionGemma has it, by the embeddings of its own
prediction. Time: t = 0 is clean, t = 1 is noise. Shapes: B rows, L tokens, N scored tokens, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.diffusion.bounds import WEIGHTS, continuous, discrete, weights_of
from dmllm.diffusion.uniform import (
    NoiseConfig,
    build_noise,
    corrupt,
    leave_one_out,
    of_words,
    posterior,
    process_options,
)
from dmllm.nn.rope import places
from dmllm.nn.visibility import Visibility, check_layout, layout
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import REDUCTIONS, normalise, padding_as_one
from dmllm.objectives.views import Laid, number_blocks, repeat_batch, spread, two_copies
from dmllm.types import IGNORE, Batch, LossSum, SpecialTokens, Vocabulary

BOUNDS = ("udlm", "gidd", "d3pm", "none")
TIMES = ("block", "document")
HEAD = "self_conditioning"
WORDS, HEARD = 1, 2  # streams of random numbers beside the first, which says what becomes of a token


@dataclass(frozen=True, kw_only=True)
class UniformConfig(NoiseConfig):
    """What tokens become, how often, and what a prediction costs."""

    bound: str = "udlm"
    """What the loss is: udlm (of uniform noise) or gidd (of any), in continuous time; d3pm, in `steps`; none: the
    cross-entropy of p(x_0 | x_t), for DiffusionGemma's kind of model (not a bound)."""
    steps: int = 1000
    """Of `bound: d3pm`: how many times there are."""
    cross_entropy: float = 0.0
    """What the mean cross-entropy weighs beside a bound; D3PM's is 0.01."""
    weight: str = "elbo"
    """elbo: the bound's own. dynamic: that without its factor of time: 2 for a mask, 1 for a random word, and nearly
    nothing for a kept token (GIDD's training). clipped: the bound's, at most `weight_clip`. none: 1."""
    weight_clip: float = 2.0
    """Greatest weight under `clipped`."""
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
        for name, known in (("bound", BOUNDS), ("weight", WEIGHTS), ("reduction", REDUCTIONS), ("times", TIMES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}.")
        if self.parameterisation == "score":
            raise ValueError("parameterisation='score' is learned by the objective score_entropy.")
        if self.bound == "udlm" and self.noise != "uniform":
            raise ValueError(f"bound='udlm' is of uniform noise; for noise={self.noise!r} say bound: gidd.")
        if self.weight != "elbo" and self.bound in ("d3pm", "none"):
            raise ValueError(f"weight={self.weight!r} is for bound udlm or gidd; bound={self.bound!r} has its own.")
        if not 0 < self.min_time < self.max_time < 1:
            raise ValueError(
                f"min_time={self.min_time} and max_time={self.max_time} must lie in this order between 0 and 1, at "
                "which weights are infinite; 1e-3 and 0.999 are usual."
            )
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} must be a whole number, at least 1; D3PM's is 1000.")
        if not 0 <= self.self_conditioning <= 1 or self.cross_entropy < 0:
            raise ValueError(
                f"self_conditioning={self.self_conditioning} must lie between 0 and 1, cross_entropy="
                f"{self.cross_entropy} must not be negative."
            )


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    """A corrupted batch, of which everything that may be noised is scored."""

    batch: Batch  # input_ids are x_t
    visibility: Visibility
    time: Tensor  # [B, L], each row's time; 0 for what is given in a copy of its own
    rows: Tensor  # [N] int64 into B * L
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32, each token's share of the sum
    heard: Tensor  # [N] bool, where the model hears its own prediction
    counts: dict[str, Tensor]  # by loss name


class Uniform:
    """Diffusion over words as two steps: corrupt a batch, then score a model on it."""

    def __init__(self, config: UniformConfig, special: SpecialTokens, visibility: str):
        assert isinstance(special, Vocabulary), "random words are drawn from a vocabulary"
        self.config, self.special, self.visibility = config, special, visibility
        if visibility not in ("full", "prefix") and check_layout(visibility) is None:
            raise ValueError(
                f"The objective {self.name} learns under visibility full, prefix or block:N, and this model's is "
                f"{visibility}; set model.visibility=full."
            )
        self.noise = build_noise(config, special.words)
        self.coefficients = {"cross_entropy": config.cross_entropy}

    name = "uniform"

    @staticmethod
    def requires(config: UniformConfig, visibility: str) -> dict[str, Any]:
        """What `MultimodalModel.adapt` is to make of a model that learns this."""
        return {
            "process": "uniform",
            "process_options": process_options(config),
            "time_conditioning": True,
            "heads": {HEAD: {}} if config.self_conditioning else {},
            **({"visibility": "full"} if visibility == "causal" else {}),
        }

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
        rows = out.flatten().nonzero().squeeze(1)
        names = (self.name, *(["cross_entropy"] if self.config.cross_entropy else []))
        return Disturbed(
            batch=replace(batch, input_ids=torch.where(out, spread([noised], source), batch.input_ids)),
            visibility=look,
            time=spread([time], source),
            rows=rows,
            targets=batch.labels.flatten()[rows],
            weights=spread([weights], source).flatten()[rows],
            heard=spread([heard], source).flatten()[rows],
            counts={name: count.cpu() for name in names},
        )

    def loss(self, model: Callable[..., Any], noised: Disturbed) -> dict[str, LossSum]:
        """The losses before division; each one's count, of all micro-batches together, is its divisor."""
        asked = noised.batch, noised.visibility, noised.rows, noised.time
        more: dict[str, Tensor] = {}
        if self.config.self_conditioning:
            more = {"feedback": torch.zeros(0, self.special.size), "feedback_rows": noised.rows[:0]}
            with torch.no_grad():  # in every process, whoever hears
                said = forward(model, *asked, **more).logits
            said = of_words(said, self.special)
            more = {"feedback": said, "feedback_rows": torch.where(noised.heard, noised.rows, -1)}
        logits = of_words(forward(model, *asked, **more).logits.float(), self.special)
        z, t = (x.flatten()[noised.rows] for x in (noised.batch.input_ids, noised.time))
        losses = self._each(logits, noised.targets, z, t)
        return {
            name: LossSum(total=(each * noised.weights).sum(), count=noised.counts[name])
            for name, each in losses.items()
        }

    def _each(self, logits: Tensor, targets: Tensor, noised: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Each token's losses [N], of logits [N, V] of the words, x_0 and x_t [N], at the times [N]."""
        config, noise, mask = self.config, self.noise, self.special.mask
        level, losses = noise.at(t), {}
        if config.bound == "none" or config.cross_entropy:
            whole = logits
            if config.parameterisation == "leave_one_out":
                whole = posterior(logits, noised, level, mask)
            name = self.name if config.bound == "none" else "cross_entropy"
            losses[name] = F.cross_entropy(whole, targets, reduction="none")
        if config.bound == "none":
            return losses
        if config.parameterisation == "posterior":
            logits = leave_one_out(logits, noised, level, mask)
        log_x = logits.log_softmax(-1)
        if config.bound == "d3pm":
            before = (t - 1 / config.steps).clamp(min=0)
            losses[self.name] = config.steps * discrete(log_x, targets, noised, noise, before, t, mask)
        else:
            weight = weights_of(config.weight, targets, noised, noise, t, mask, config.weight_clip)
            losses[self.name] = continuous(log_x, targets, noised, noise, t, mask, weight)
        return losses

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
        if self.config.bound == "d3pm":
            return (number * self.config.steps).floor().add(1) / self.config.steps
        return self.config.min_time + (self.config.max_time - self.config.min_time) * number


UNIFORM = (Uniform, UniformConfig)
