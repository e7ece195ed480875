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
      options: {noise: hybrid, p_uniform: 0.1, bound: gidd, parameterisation: posterior}

For text that is to be revised while it is written, in few calls: every token may be put right to the end. Pitfalls: the
bounds take the prediction that leaves its own place out. By default the logits are that, as UDLM and GIDD have it;
`parameterisation: posterior` says that they are p(x_0 | x_t), and they are converted before a bound is taken of them
(and the others before a cross-entropy), or it would not be tight. A small network learns the posterior much sooner, as
what stands in a place is mostly right. And hybrid noise weighs much near t = 0, so that min_time matters to its bound.

Time: t = 0 is clean, t = 1 is noise. Shapes: N scored tokens, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dmllm.diffusion.bounds import WEIGHTS, continuous, discrete, weights_of
from dmllm.diffusion.uniform import leave_one_out, posterior, process_options
from dmllm.objectives.noising import HEAD, Noising, NoisingConfig, full
from dmllm.types import SpecialTokens

BOUNDS = ("udlm", "gidd", "d3pm", "none")


@dataclass(frozen=True, kw_only=True)
class UniformConfig(NoisingConfig):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("bound", BOUNDS), ("weight", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}.")
        if self.parameterisation == "score":
            raise ValueError("parameterisation='score' is learned by the objective score_entropy.")
        if self.bound == "udlm" and self.noise != "uniform":
            raise ValueError(f"bound='udlm' is of uniform noise; for noise={self.noise!r} say bound: gidd.")
        if self.weight != "elbo" and self.bound in ("d3pm", "none"):
            raise ValueError(f"weight={self.weight!r} is for bound udlm or gidd; bound={self.bound!r} has its own.")
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} must be a whole number, at least 1; D3PM's is 1000.")
        if self.cross_entropy < 0:
            raise ValueError(f"cross_entropy={self.cross_entropy} must not be negative; D3PM's is 0.01.")


class Uniform(Noising):
    """Diffusion over words, a prediction costing what the bound says."""

    name = "uniform"
    config: UniformConfig

    def __init__(self, config: UniformConfig, special: SpecialTokens, visibility: str):
        super().__init__(config, special, visibility)
        if config.cross_entropy and config.bound != "none":
            self.names.append("cross_entropy")
            self.coefficients = {"cross_entropy": config.cross_entropy}

    @staticmethod
    def requires(config: UniformConfig, visibility: str) -> dict[str, Any]:
        """What `MultimodalModel.adapt` is to make of a model that learns this."""
        return {
            "process": "uniform",
            "process_options": process_options(config),
            "visibility": full(visibility),
            "time_conditioning": True,
            "heads": {HEAD: {}} if config.self_conditioning else {},
        }

    def _each(self, logits: Tensor, targets: Tensor, noised: Tensor, t: Tensor) -> dict[str, Tensor]:
        config, noise, mask = self.config, self.noise, self.special.mask
        level, losses = noise.at(t), {}
        if config.bound == "none" or "cross_entropy" in self.names:
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

    def _time(self, number: Tensor) -> Tensor:
        if self.config.bound == "d3pm":
            return (number * self.config.steps).floor().add(1) / self.config.steps
        return super()._time(number)


UNIFORM = (Uniform, UniformConfig)
