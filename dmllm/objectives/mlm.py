"""The masked-language-modelling objective of BERT: fill in 15 % of the tokens, of which not all are masks.

    corruption   15 % of an answer's tokens are selected; of these 80 % become masks, 10 % random words, 10 % stay
    visibility   full (or prefix): every row sees the whole text
    target       the selected tokens, those that stay too; with `next_sentence` also whether an answer is the prompt's
    weight       1, the mean over what is selected: no bound, as only one noise level is learned
    sampler      that of masked diffusion, from a canvas of masks: mask-predict (Ghazvininejad et al., arXiv:1904.09324)
    paper        Devlin et al., BERT, arXiv:1810.04805, section 3.1

    objective:
      name: mlm
      options:
        next_sentence: true  # and a head that tells an answer from another's

For representations, and for what few holes in much text should hold: infilling, ranking by what fits. With shares of
1, 0, 0 it is masked diffusion at t = 0.15, weight none. Pitfalls: a canvas that is all masks was never seen, so that
generation is weak where masked's is not, and `score` says no likelihood, only how the tokens fit. With next_sentence
half of the answers stand behind another's prompt, and what is selected in them is learned all the same.

Shapes: B rows, L tokens, N selected tokens, D documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmllm.diffusion.uniform import draw_words
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import weighted_cross_entropy
from dmllm.objectives.masked import Masked, MaskedConfig, Noised
from dmllm.objectives.pairs import other_answers
from dmllm.types import Batch, LossSum, SpecialTokens, Vocabulary

KIND, WORD = 2, 3  # streams of an example's random numbers
HEAD = "next_sentence"
CUTS = ("answer", "half")


@dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """How many tokens are selected, and what becomes of them. Names are those of transformers' collator."""

    mlm_probability: float = 0.15
    """Which share of the scored tokens is selected, each by itself."""
    mask_replace_prob: float = 0.8
    """Which share of the selected becomes the mask token."""
    random_replace_prob: float = 0.1
    """Which share of the selected becomes a random word, never a mask, image or padding token; the rest stays."""
    at_least_one: bool = True
    """Select at least one token of every answer, as BERT does; short answers then have more than their share."""
    next_sentence: bool = False
    """Also learn whether a text's second part belongs to its first: with probability 1/2 it is that of another example
    of the micro-batch, which should therefore hold several. A head at the document's first row says it."""
    second_part: str = "answer"
    """What that is: answer, a document's last answer (of a text without a prompt, its second half); half, the second
    half of that answer, for texts behind prompts that say nothing of them."""

    def __post_init__(self) -> None:
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(
                f"mlm_probability={self.mlm_probability} must lie above 0 and at most at 1; 0.15 is BERT's."
            )
        shares = self.mask_replace_prob, self.random_replace_prob
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"mask_replace_prob={shares[0]} and random_replace_prob={shares[1]} are shares of the selected tokens "
                "and at most 1 together; 0.8 and 0.1 are BERT's."
            )
        if self.second_part not in CUTS:
            raise ValueError(f"second_part={self.second_part!r} is not one of {', '.join(CUTS)}.")


@dataclass(frozen=True, kw_only=True)
class Paired(Noised):
    """A corrupted batch, and which documents have another's second part."""

    firsts: Tensor  # [D] int64 into B * L, the first row of each
    classes: Tensor  # [D] int64


class Mlm:
    """BERT's pre-training as two steps: select, replace and pair; then score a model on it."""

    def __init__(self, config: MlmConfig, special: SpecialTokens, visibility: str):
        _check(config, visibility)
        if config.random_replace_prob and not isinstance(special, Vocabulary):
            raise ValueError("Random words are drawn from a vocabulary: give a Vocabulary, or random_replace_prob=0.")
        selected = MaskedConfig(
            weight="none",
            reduction="masked",
            at_least_one=config.at_least_one,
            min_noise=config.mlm_probability,
            max_noise=config.mlm_probability,
        )
        self.masked = Masked(selected, special, visibility)
        self.config, self.special = config, special

    @staticmethod
    def requires(config: MlmConfig, visibility: str) -> dict[str, Any]:
        """Attention to both sides, and the head for pairs."""
        asked = Masked.requires(MaskedConfig(), visibility)
        _check(config, asked.get("visibility", visibility))
        return {**asked, "heads": {HEAD: {}}} if config.next_sentence else asked

    def prepare(self, batch: Batch, draws: Draws) -> Noised:
        """Select and replace tokens. Deterministic in (batch, draws); the batch is left as it is."""
        pairs = None
        if self.config.next_sentence:
            batch, *pairs = other_answers(batch, draws, self.config.second_part)
        noised = self.masked.prepare(batch, draws)
        length, rows = batch.labels.shape[1], noised.rows
        kind, number = (draws.uniform(length, stream).to(rows.device).flatten()[rows] for stream in (KIND, WORD))
        masks, words = self.config.mask_replace_prob, self.config.random_replace_prob
        tokens = noised.targets
        if words:
            assert isinstance(self.special, Vocabulary)
            tokens = torch.where(kind < masks + words, draw_words(number, self.special), tokens)
        tokens = tokens.masked_fill(kind < masks, self.special.mask)
        ids = noised.batch.input_ids.flatten().scatter(0, rows, tokens).view_as(noised.batch.input_ids)
        counts = {"mlm": noised.counts["masked"]}
        noised = replace(noised, batch=replace(noised.batch, input_ids=ids), counts=counts)
        if pairs is None:
            return noised
        counts[HEAD] = torch.tensor(float(len(pairs[0])))
        return Paired(**vars(noised), firsts=pairs[0], classes=pairs[1])

    def loss(self, model: Callable[..., Any], noised: Noised) -> dict[str, LossSum]:
        """The losses before division; each one's count, of all micro-batches together, is its divisor."""
        paired = isinstance(noised, Paired)
        more = {"heads": {HEAD: noised.firsts}} if paired else {}
        said = forward(model, noised.batch, noised.visibility, noised.rows, noised.time, **more)
        losses = {"mlm": weighted_cross_entropy(said.logits, noised.targets, noised.weights, noised.counts["mlm"])}
        if paired:
            ones = torch.ones_like(noised.classes, dtype=torch.float32)
            losses[HEAD] = weighted_cross_entropy(said.heads[HEAD], noised.classes, ones, noised.counts[HEAD])
        return losses


def _check(config: MlmConfig, visibility: str) -> None:
    if visibility not in ("full", "prefix"):
        raise ValueError(
            f"The objective mlm learns under visibility full or prefix, and this model's is {visibility}; set "
            "model.visibility=full."
        )
    if config.next_sentence and visibility != "full":
        raise ValueError(
            f"next_sentence needs a first row that sees the answer: model.visibility=full, not {visibility}; set it, "
            "or next_sentence: false."
        )


MLM = (Mlm, MlmConfig)
