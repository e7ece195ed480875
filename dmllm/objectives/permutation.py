"""The permutation objective: each token from those before it in an order that is drawn anew for every text.

    corruption   none: every token stands in the content stream as itself, and a second time, as a mask, where predicted
    visibility   permutation: what is given sees what is given; a token's content sees itself and all before it in the
                 order, its mask (the query stream) only those before it
    target       the token itself, at its own place: the query stream is asked, nothing is shifted
    weight       1; with every token predicted the loss is -log p in a random order, whose mean bounds -log p(answer)
                 as that of masked diffusion does, and is the same number where both know the same conditionals
    sampler      any order, one token a call, all that is known computed once (`samplers.ordered`)
    paper        Yang et al., XLNet, arXiv:1906.08237, sections 2.2 and 2.3

For exact likelihoods in any order and exact caches with random or chosen orders. A step costs two streams, up to twice
that of masked; a token's content never sees what comes after it in the order, so that what is known is read from one
side of the order alone, where a masked model reads all of it anew in each call.

    objective:
      name: permutation
      options:
        order: random        # identity: left to right, the same model learned autoregressively
        last_fraction: 1.0   # 0.167: only the end of each order, as XLNet

Shapes: B rows, L tokens of the batch, L' of the two streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmllm.diffusion.absorbing import hide
from dmllm.diffusion.orders import ranks
from dmllm.nn.rope import places
from dmllm.nn.visibility import ORDERED
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import REDUCTIONS, normalise, per_document, weighted_cross_entropy
from dmllm.objectives.masked import Noised
from dmllm.objectives.views import spread, two_streams
from dmllm.types import IGNORE, Batch, LossSum, SpecialTokens

ORDERS = ("random", "identity")
FITTING = ("full", "prefix", ORDERED)


@dataclass(frozen=True, kw_only=True)
class PermutationConfig:
    """In which order tokens come, and which of them are predicted."""

    order: str = "random"
    """random: every order of an answer's tokens is equally likely. identity: as they stand, which is next-token
    prediction in the same two streams."""
    last_fraction: float = 1.0
    """Which share of the order is predicted, the last: 1 is all of it; XLNet takes 1/6, since what comes first is hard
    to say and slow to learn. Below 1 the loss is not a bound, and the model will not begin a text well."""
    reduction: str = "masked"
    """What the sum is divided by: masked (the tokens that are predicted), tokens, answer_length, batch_length (see
    objectives/loss.py)."""
    zero_masking: bool = False
    """The mask token gets no probability, as in decoding."""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not one of {', '.join(ORDERS)}.")
        if not 0 < self.last_fraction <= 1:
            raise ValueError(f"last_fraction={self.last_fraction} must lie above 0 and at most at 1 (every token).")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not one of {', '.join(REDUCTIONS)}.")


class Permutation:
    """Permutation language modelling as two steps: lay out two streams, then score a model on the second."""

    def __init__(self, config: PermutationConfig, special: SpecialTokens, visibility: str):
        _check(visibility)
        if visibility != ORDERED:
            raise ValueError(f"The objective permutation learns under visibility {ORDERED}, not {visibility}.")
        self.config, self.special = config, special

    @staticmethod
    def requires(config: PermutationConfig, visibility: str) -> dict[str, Any]:
        """A model that decodes in the order it is asked to. Raises ValueError for one that does so in blocks."""
        _check(visibility)
        return {"visibility": ORDERED, "shift": False}

    def prepare(self, batch: Batch, draws: Draws) -> Noised:
        """Draw an order for each document. Deterministic in (batch, draws); the batch is left as it is."""
        key = places(batch.positions)
        if self.config.order == "random":
            key = draws.uniform(batch.labels.shape[1]).to(batch.labels.device)
        return self.arrange(batch, ranks(key, batch.documents, batch.labels != IGNORE))

    def arrange(self, batch: Batch, rank: Tensor) -> Noised:
        """The two streams for given orders.

        Args:
            rank: [B, L] int64, when each token that has a label comes among those of its document, -1 for the others.
        """
        scorable = batch.labels != IGNORE
        predicted = scorable & (rank >= self._first(batch, scorable))
        weights, count = normalise(
            self.config.reduction,
            torch.ones_like(rank, dtype=torch.float32),
            scorable.float(),
            predicted,
            batch.documents,
        )
        batch, rule, source = two_streams(batch, rank, predicted)
        asked = spread([predicted], source)
        rows = asked.flatten().nonzero().squeeze(1)
        return Noised(
            batch=replace(batch, input_ids=hide(batch.input_ids, rule.canvas, self.special.mask)),
            visibility=rule,
            time=torch.zeros_like(batch.labels, dtype=torch.float32),
            rows=rows,
            targets=batch.labels.flatten()[rows],
            weights=spread([weights], source).flatten()[rows],
            counts={"permutation": count.cpu()},
        )

    def loss(self, model: Callable[..., Any], noised: Noised) -> dict[str, LossSum]:
        """The loss before division; `counts["permutation"]` of all micro-batches together is the divisor."""
        logits = forward(model, noised.batch, noised.visibility, noised.rows, noised.time).logits
        if self.config.zero_masking:
            mask = torch.arange(logits.shape[-1], device=logits.device) == self.special.mask
            logits = logits.masked_fill(mask, -torch.inf)
        count = noised.counts["permutation"]
        return {"permutation": weighted_cross_entropy(logits, noised.targets, noised.weights, count)}

    def _first(self, batch: Batch, scorable: Tensor) -> Tensor:
        """The place in its document's order from which on tokens are predicted, [B, L]."""
        length = per_document(scorable.float(), batch.documents)
        count = (length * self.config.last_fraction - 1e-4).ceil().clamp(min=1)
        return (length - count).gather(1, batch.documents.clamp(min=0))


def _check(visibility: str) -> None:
    if visibility not in FITTING:
        raise ValueError(
            f"The objective permutation makes its own order, and this model's visibility is {visibility}; set "
            f"model.visibility={ORDERED}."
        )


PERMUTATION = (Permutation, PermutationConfig)
