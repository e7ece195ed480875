"""The autoregressive objective: the next token, given all before it; the exact -log p(answer | prompt, image).

    corruption   none: the model is fed the text itself
    visibility   causal, and a token is predicted by the row before it (`requires` sets both, whatever they were)
    target       each labelled token that has a row before it; with `mtp: n` also the n - 1 tokens behind it, by heads
    weight       1: the loss is a likelihood, no bound, and draws nothing
    sampler      one token a call, the keys and values of all before it stored; several with the heads (`speculate`)
    paper        Radford et al., GPT, 2018; heads: Gloeckle et al., arXiv:2404.19737, section 2

    model: {backbone: {hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4}, tokenizer: runs/tokenizer}
    data: data_configs/scenes.yaml
    objective:
      name: autoregressive
      options: {mtp: 4}

The baseline of every comparison, and the choice where a likelihood is to be exact. It learns the most from each pass
over little text, but answers in as many calls as tokens, from left to right: it fills no holes (`infill` refuses).
Pitfalls: a document's first token is predicted by nothing and not scored, so a prompt needs a token to begin with; and
the mean loss over tokens is nats a token, as a bound with reduction "tokens" is, but not as one over masked tokens.

Shapes: B rows, L tokens, N scored tokens, M of them with a scored token behind, H = n - 1 heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.nn.rope import places
from dmllm.nn.visibility import Visibility, layout
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import REDUCTIONS, normalise, padding_as_one, weighted_cross_entropy
from dmllm.types import IGNORE, Batch, LossSum, SpecialTokens

NEXT = "next_token"
HEAD = "mtp"


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """How many tokens are predicted at once, and what they weigh."""

    mtp: int = 1
    """Tokens that each row predicts: the next one, and by heads on the same row those behind it (multi-token
    prediction); 1 is the next alone, without heads. Meta's models have 4."""
    mtp_weight: float = 1.0
    """What each head's mean loss weighs beside the next token's; 1 is Meta's plain sum."""
    reduction: str = "tokens"
    """What the sum is divided by: tokens, batch_length, answer_length, masked (see objectives/loss.py; as every token
    is predicted, masked is the same as tokens)."""
    padding_as_one: bool = False
    """The end tokens that pad an answer weigh as much as one token together, not each."""

    def __post_init__(self) -> None:
        if type(self.mtp) is not int or self.mtp < 1:
            raise ValueError(f"mtp={self.mtp!r} must be a whole number of tokens, at least 1 (the next one); try 4.")
        if not 0 <= self.mtp_weight < float("inf"):
            raise ValueError(f"mtp_weight={self.mtp_weight} must be 0 (the heads do not learn) or above; 1 is usual.")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not one of {', '.join(REDUCTIONS)}.")


@dataclass(frozen=True, kw_only=True)
class Aimed:
    """A batch as it is, and what its rows are to predict."""

    batch: Batch
    visibility: Visibility
    time: Tensor  # [B, L] zeros: nothing is noised
    rows: Tensor  # [N] int64 into B * L, the tokens that are scored
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32
    near: Tensor  # [M] int64 into B * L, those behind which another is scored
    further: Tensor  # [M, H] int64, the tokens behind
    further_weights: Tensor  # [M, H] float32, 0 past the end of an answer
    counts: dict[str, Tensor]  # by loss name


class Autoregressive:
    """Next-token prediction as two steps: say what is scored, then score a model on it."""

    def __init__(self, config: AutoregressiveConfig, special: SpecialTokens, visibility: str):
        if visibility != "causal":
            raise ValueError(
                f"The objective autoregressive learns under visibility causal, and this model's is {visibility}; "
                "set model.visibility=causal and model.shift=true."
            )
        self.config, self.special = config, special
        self.coefficients = {ahead(k): config.mtp_weight for k in range(1, config.mtp)}

    @staticmethod
    def requires(config: AutoregressiveConfig, visibility: str) -> dict[str, Any]:
        """What `MultimodalModel.adapt` is to make of a model that learns this."""
        heads = {HEAD: {"n": config.mtp}} if config.mtp > 1 else {}
        return {"process": "absorbing", "visibility": "causal", "shift": True, "heads": heads}

    def prepare(self, batch: Batch, draws: Draws) -> Aimed:
        """What is scored; nothing is random, and the batch is left as it is."""
        labels, documents, place = batch.labels, batch.documents, places(batch.positions)
        share = (labels != IGNORE).float()
        if self.config.padding_as_one:
            share = padding_as_one(labels, documents, self.special.eos)
        run = scored = (labels != IGNORE) & (place > 0)  # nothing stands before a document's first token
        runs, weights, counts = [], [], {}
        for k in range(self.config.mtp):
            run = run & behind(scored, k) & (behind(documents, k) == documents)
            weight, count = normalise(self.config.reduction, run.float(), behind(share, k) * run, run, documents)
            runs.append(run)
            weights.append(weight)
            counts[ahead(k)] = count.cpu()
        rows = scored.flatten().nonzero().squeeze(1)
        near = runs[1].flatten().nonzero().squeeze(1) if self.config.mtp > 1 else rows[:0]
        later = torch.stack([behind(labels.clamp(min=0), k) for k in range(self.config.mtp)], -1).flatten(0, 1)
        return Aimed(
            batch=batch,
            visibility=layout("causal", documents=documents, canvas=torch.zeros_like(scored), positions=place),
            time=torch.zeros(labels.shape, device=labels.device),
            rows=rows,
            targets=labels.flatten()[rows],
            weights=weights[0].flatten()[rows],
            near=near,
            further=later[near, 1:],
            further_weights=torch.stack(weights, -1).flatten(0, 1)[near, 1:],
            counts=counts,
        )

    def loss(self, model: Callable[..., Any], aimed: Aimed) -> dict[str, LossSum]:
        """The losses before division by `counts`: the next token's, and each head's."""
        more = {"heads": {HEAD: aimed.near}} if self.config.mtp > 1 else {}
        output = forward(model, aimed.batch, aimed.visibility, aimed.rows, aimed.time, **more)
        found = {NEXT: weighted_cross_entropy(output.logits, aimed.targets, aimed.weights, aimed.counts[NEXT])}
        for k in range(1, self.config.mtp):
            target, weight = aimed.further[:, k - 1], aimed.further_weights[:, k - 1]
            count = aimed.counts[ahead(k)]
            found[ahead(k)] = weighted_cross_entropy(output.heads[HEAD][:, k - 1], target, weight, count)
        return found


def ahead(k: int) -> str:
    """The name of the loss of the token k behind the next one."""
    return f"ahead_{k}" if k else NEXT


def behind(values: Tensor, k: int) -> Tensor:
    """What stands k columns further on, [B, L]; 0 (False) past the end."""
    return F.pad(values[:, k:], (0, min(k, values.shape[1])))


AUTOREGRESSIVE = (Autoregressive, AutoregressiveConfig)
