"""The score entropy objective: ratios of probabilities, log p_t(y) / p_t(x_t), in place of a distribution (SEDD).

    corruption   masks (`noise: absorbing`), or random words (`uniform`)
    visibility   full, prefix or block:N
    target       for each token y that could stand in a place, how much more probable than what stands there it is
    weight       the rate of the process: a bound on -log p, for any positive scores
    sampler      masks: as any model of masks, the scores of a place being its distribution but for a factor;
                 words: ancestral (`samplers.uniform`), the step by Tweedie's formula
    paper        Lou et al., SEDD, arXiv:2310.16834

    model: {backbone: {hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4}, tokenizer: runs/tokenizer}
    data: data_configs/scenes.yaml
    objective:
      name: score_entropy
      options: {noise: absorbing, output: scores}

To compare with SEDD, and where scores are what is wanted. Pitfalls: of masks the scores must sum to the odds that a
token is shown, which those of a distribution do by themselves: with `output: probabilities`, scores r p(y), this is
exactly the masked objective's cross-entropy. exp(logits) needs logits that start near 0.

Time: t = 0 is clean, t = 1 is noise. Shapes: N scored tokens, V ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dmllm.diffusion.bounds import score_entropy
from dmllm.diffusion.uniform import is_word, process_options
from dmllm.objectives.noising import HEAD, Noising, NoisingConfig, full

OUTPUTS = ("scores", "probabilities")


@dataclass(frozen=True, kw_only=True)
class ScoreEntropyConfig(NoisingConfig):
    """What tokens become, and what the logits say of it."""

    noise: str = "absorbing"
    """absorbing: masks. uniform: random words."""
    output: str = "scores"
    """scores: of masks log s = logits + log(alpha / (1 - alpha)) - log K for K words, as SEDD scales them; of words
    log s = logits, 0 for what stands there. probabilities: the scores of a distribution over what the token was, of
    masks the masked objective's, of words the one that leaves its own place out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output not in OUTPUTS:
            raise ValueError(f"output={self.output!r} is not one of {', '.join(OUTPUTS)}.")
        if self.noise == "hybrid" or self.parameterisation != "leave_one_out":
            raise ValueError(
                f"noise={self.noise!r}, parameterisation={self.parameterisation!r}: the score entropy is of masks "
                "(absorbing) or words (uniform), and its logits are what `output` says; try objective.name=uniform."
            )
        if self.noise == "absorbing" and self.self_conditioning:
            raise ValueError("self_conditioning is for noise='uniform': models of masks are not told what they said.")


class ScoreEntropy(Noising):
    """Diffusion over words or masks, scores costing their entropy."""

    name = "score_entropy"
    config: ScoreEntropyConfig

    @staticmethod
    def requires(config: ScoreEntropyConfig, visibility: str) -> dict[str, Any]:
        """What `MultimodalModel.adapt` is to make of a model that learns this: for masks, any model of masks."""
        heads = {HEAD: {}} if config.self_conditioning else {}
        if config.noise == "absorbing":
            return {"process": "absorbing", "visibility": full(visibility), "heads": heads}
        said = {"parameterisation": "score"} if config.output == "scores" else {}
        return {
            "process": "uniform",
            "process_options": {**process_options(config), **said},
            "visibility": full(visibility),
            "time_conditioning": True,
            "heads": heads,
        }

    def _each(self, logits: Tensor, targets: Tensor, noised: Tensor, t: Tensor) -> dict[str, Tensor]:
        level, words = self.noise.at(t), is_word(self.special, logits.device)
        if self.config.noise == "absorbing":
            scores = logits - math.log(self.noise.words)
            if self.config.output == "probabilities":
                scores = logits.log_softmax(-1)
            scores = scores + (level.alpha.log() - level.masked.log())[:, None]
        elif self.config.output == "probabilities":
            mass = (level.alpha[:, None] * logits.softmax(-1) + level.uniform[:, None]).log()
            scores = mass - mass.gather(-1, noised[:, None])
        else:
            scores = logits
        found = score_entropy(scores, targets, noised, self.noise, t, self.special.mask, words)
        return {self.name: found}


SCORE_ENTROPY = (ScoreEntropy, ScoreEntropyConfig)
