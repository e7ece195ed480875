"""GPT-2: learned positions, pre-norm LayerNorm, biases everywhere, GELU; the vocabulary projection is the embedding.

It is the backbone of DiffuGPT (arXiv:2410.17891), under full visibility instead of causal. What a row may see arrives
as a `Visibility`, as for the others; its position is that in its own document, and there are only so many of them.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; transformers' GPT2Model.
Shapes: B rows, L tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmllm.models.backbones.transformer import Attention, Output, TransformerConfig, attention_mask
from dmllm.nn.cache import KVCache
from dmllm.nn.feed_forward import GELUFeedForward
from dmllm.nn.ragged import Ragged
from dmllm.nn.rope import places
from dmllm.nn.unembedding import unembed
from dmllm.nn.visibility import Visibility
from dmllm.types import PADDING


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The shape. Names are those of `TransformerConfig`, where it has them."""

    vocab_size: int = 50257
    """Rows of the embedding and of the vocabulary projection."""
    hidden_size: int = 768
    """Width of the stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    num_attention_heads: int = 12
    """Heads."""
    intermediate_size: int | None = None
    """Inner width of the feed-forward. None: 4 times hidden_size."""
    max_position_embeddings: int = 1024
    """Positions that have a vector: no document may be longer."""
    layer_norm_eps: float = 1e-5
    """Added to the variance before the root."""
    tie_word_embeddings: bool = True
    """One matrix for the embedding and the vocabulary projection."""
    attention: str = "auto"
    """As of `TransformerConfig`."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; output projections are further divided by sqrt(2 * layers)."""

    def __post_init__(self) -> None:
        _ = self.transformer  # which refuses heads that do not fit

    @property
    def transformer(self) -> TransformerConfig:
        """What the attention needs to know. Raises ValueError for a shape that does not fit."""
        return TransformerConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            qkv_bias=True,
            attention=self.attention,
        )


class Block(nn.Module):
    """Attention, then feed-forward, each added to the stream."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = Attention(config.transformer, layer)
        self.self_attn.o_proj = nn.Linear(width, width)  # with a bias, which the others do not have
        self.post_attention_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = GELUFeedForward(width, config.intermediate_size or 4 * width)

    def forward(self, x: Tensor, mask: object, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), None, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT2Transformer(nn.Module):
    """Token ids -> embeddings -> hidden rows -> logits, each step callable alone."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D], to which `forward` adds those of the positions."""
        return self.embed_tokens(ids)

    def unembed(self, hidden: Tensor, words: tuple[int, int] | None = None) -> Tensor:
        """Hidden rows [..., D] -> logits [..., V]; or of the ids from the first of `words` to before the last."""
        return unembed(self.lm_head, hidden, words)

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        visibility: Visibility,
        cache: KVCache | None = None,
        time: Tensor | None = None,
    ) -> Output:
        """Embeddings [B, L, D] at `positions` [B, L] -> hidden rows [B, L, D].

        `time` is accepted for models conditioned on it; this one is not. Raises ValueError for a position beyond those
        that have a vector.
        """
        mask = attention_mask(self.config.attention, visibility, cache, embeds)
        positions = places(positions).masked_fill(visibility.document == PADDING, 0)
        self._refuse_beyond(positions, 0 if cache is None else cache.length)
        x = embeds + self.embed_positions(positions).to(embeds.dtype)
        if isinstance(mask, Ragged):
            x = mask.gather(x)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        x = self.norm(x)
        return Output(mask.scatter(x) if isinstance(mask, Ragged) else x, {})

    def _refuse_beyond(self, positions: Tensor, before: int) -> None:
        """Raise ValueError for a position that has no vector.

        Only where there are more rows than positions can there be one, and only then is a GPU waited for to see it.
        """
        known = self.config.max_position_embeddings
        if before + positions.shape[1] > known and (longest := int(positions.max()) + 1) > known:
            raise ValueError(
                f"A document of {longest} tokens is longer than the {known} positions that this model has learned "
                "(max_position_embeddings); shorten the prompt, or give a smaller max_new_tokens."
            )

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights; projections back into the stream are scaled down by depth (section 2.3)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                back = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                nn.init.normal_(parameter, std=std / (2 * len(self.layers)) ** 0.5 if back else std)


GPT2 = (GPT2Transformer, GPT2Config)
