"""Self-conditioning: what a model said in its last call enters the stream of the next, through weights that start at 0.

    logits --softmax--> mean embedding --norm--> linear --> added to the row it was said at

Source: Chen et al., arXiv:2208.04202, section 3.2; by mean embeddings as in DiffusionGemma (transformers,
models/diffusion_gemma). Shapes: M rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmllm.nn.norms import RMSNorm

FEEDBACK = "self_conditioning"  # the head's name


@dataclass(frozen=True, kw_only=True)
class SelfConditioningConfig:
    """It has no options."""


class SelfConditioning(nn.Module):
    """Logits [M, V] of an earlier call -> what is added to the stream, [M, D]; zeros for a fresh model."""

    def __init__(self, config: SelfConditioningConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def initialise(self) -> None:
        """A model that is given this stays as it is."""
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.proj.weight)

    def forward(self, logits: Tensor, backbone: Any) -> Tensor:
        embedding = backbone.embed_tokens.weight
        mean = logits.softmax(-1, dtype=torch.float32).to(embedding.dtype) @ embedding
        return self.proj(self.norm(mean))


def heard(stream: Tensor, head: Any, backbone: Any, logits: Tensor, rows: Tensor | None) -> Tensor:
    """The stream [B, L, D and more] with what `logits` [M, V] say added at the flat `rows` [M], but not where these are
    -1; or of all rows, [B, L, V]."""
    flat, said = stream.flatten(0, 1), head(logits.flatten(0, -2), backbone).to(stream.dtype)
    rows = torch.arange(len(said), device=said.device) if rows is None else rows
    width = said.shape[-1]
    told = flat[:, :width].index_add(0, rows.clamp(min=0), said * (rows >= 0)[:, None])
    return torch.cat([told, flat[:, width:]], -1).view_as(stream)


SELF_CONDITIONING = (SelfConditioning, SelfConditioningConfig)
