"""The diffusion transformer of MDLM and BD3-LM: pre-norm LayerNorm, rotary positions, GELU, conditioned on noise.

The noise level sigma becomes a vector which shifts, scales and gates every half block (adaLN). A model that is not
conditioned on time reads sigma = 0 whatever `time` is: the vector is then a learned constant.

Logits are the network's own. SUBS (section 3.2.3), which turns them into probabilities of the clean token, is not part
of it: the loss (`zero_masking`) and the samplers leave the mask token out, and what is known is never asked for.

Sources: Peebles and Xie, DiT, arXiv:2212.09748; Sahoo et al., MDLM, arXiv:2406.07524; Arriola et al., BD3-LM,
arXiv:2503.09573; code kuleshov-group/mdlm (models/dit.py, noise_schedule.py).
Time: t = 0 is clean, t = 1 is noise. Shapes: B rows, L tokens, D hidden, C condition, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dmllm.models.backbones.transformer import Attention, Output, TransformerConfig, attention_mask
from dmllm.nn.cache import KVCache
from dmllm.nn.feed_forward import GELUFeedForward
from dmllm.nn.ragged import Ragged
from dmllm.nn.rope import rotary_tables
from dmllm.nn.unembedding import unembed
from dmllm.nn.visibility import Visibility

NOISE_EPS = 1e-3  # sigma(t) = -log(1 - (1 - eps) t), so that sigma(1) is finite
FREQUENCIES = 256  # numbers that sigma is spread over


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The shape. Names are those of `TransformerConfig`, where it has them."""

    vocab_size: int = 50258
    """Rows of the embedding and of the vocabulary projection, which are never tied."""
    hidden_size: int = 768
    """Width of the stream; the feed-forward is four times as wide."""
    num_hidden_layers: int = 12
    """Blocks."""
    num_attention_heads: int = 12
    """Heads."""
    cond_dim: int = 128
    """Width of the condition."""
    time_conditioning: bool = False
    """Whether the network is told the time; False: it reads sigma = 0."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    noise_range: bool = False
    """Whether the checkpoint carries the noise probabilities between which training drew (BD3-LM, section 5.3)."""
    attention: str = "auto"
    """As of `TransformerConfig`."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; modulations and the vocabulary projection start at zero."""

    @property
    def transformer(self) -> TransformerConfig:
        """What the attention needs to know. Raises ValueError for a shape that does not fit."""
        return TransformerConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            attention=self.attention,
        )


class NoiseEmbedding(nn.Module):
    """sigma [...] -> condition [..., C]: cosines and sines of 128 wavelengths, then two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.up_proj = nn.Linear(FREQUENCIES, width)
        self.down_proj = nn.Linear(width, width)

    def forward(self, sigma: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=sigma.device) / half)
        angle = sigma[..., None].float() * frequency
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.up_proj.weight.dtype)
        return F.silu(self.down_proj(F.silu(self.up_proj(waves))))


class Block(nn.Module):
    """Attention, then feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self, config: DiTConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = nn.LayerNorm(width, bias=False)
        self.self_attn = Attention(config.transformer, layer)
        self.post_attention_layernorm = nn.LayerNorm(width, bias=False)
        self.mlp = GELUFeedForward(width, 4 * width)
        self.modulation = nn.Linear(config.cond_dim, 6 * width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: object,
        cache: KVCache | None,
    ) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, -1)
        x = x + gate * self.self_attn(modulate(self.input_layernorm(x), shift, scale), rotary, mask, cache)
        return x + mlp_gate * self.mlp(modulate(self.post_attention_layernorm(x), mlp_shift, mlp_scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scaled and shifted; both start at zero, which changes nothing."""
    return x * (1 + scale) + shift


class DiT(nn.Module):
    """Token ids -> embeddings -> hidden rows -> logits, each step callable alone."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.noise_embedding = NoiseEmbedding(config.cond_dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.modulation = nn.Linear(config.cond_dim, 2 * width)
        self.lm_head = nn.Linear(width, config.vocab_size)
        if config.noise_range:
            self.register_buffer("noise_min", torch.tensor(NOISE_EPS))
            self.register_buffer("noise_max", torch.tensor(1.0))

    def condition_on_time(self) -> None:
        """Read the time from now on."""
        self.config = replace(self.config, time_conditioning=True)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D]."""
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

        `time` [B] or [B, L] in [0, 1] is converted to sigma = -log(1 - (1 - 1e-3) t), the log-linear schedule. Raises
        ValueError without it, if the model is conditioned on time.
        """
        mask = attention_mask(self.config.attention, visibility, cache, embeds)
        condition = self.noise_embedding(self._sigma(embeds, time))  # [B or 1, L or 1, C]
        x = embeds
        if isinstance(mask, Ragged):
            if condition.shape[:2] != (1, 1):
                condition = mask.gather(condition.expand(*x.shape[:2], -1))
            x, positions = mask.gather(x), mask.gather(positions)
        rotary = rotary_tables(positions, self.config.transformer.head_width, self.config.rope_theta, embeds.dtype)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, rotary, mask, cache, use_reentrant=False)
            else:
                x = block(x, condition, rotary, mask, cache)
        x = modulate(self.norm(x), *self.modulation(condition).chunk(2, -1))
        return Output(mask.scatter(x) if isinstance(mask, Ragged) else x, {})

    def _sigma(self, embeds: Tensor, time: Tensor | None) -> Tensor:
        """Noise levels [B, L], [B, 1], or [1, 1] where all are the same."""
        if not self.config.time_conditioning:
            return torch.zeros(1, 1, device=embeds.device)
        if time is None:
            raise ValueError("This model is conditioned on time; give time= [B] or [B, L], 0 is clean and 1 is noise.")
        time = time.to(embeds.device, torch.float32)
        return -torch.log1p(-(1 - NOISE_EPS) * (time[:, None] if time.ndim == 1 else time))

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights; modulations and the vocabulary projection are zero, so that each block starts as nothing."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "modulation" in name or name.startswith("lm_head"):
                parameter.zero_()
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range)


DIT = (DiT, DiTConfig)
