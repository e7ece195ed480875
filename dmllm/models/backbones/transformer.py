"""The transformer under every model here: pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention.

It knows nothing of objectives or sampling: what a row may see arrives as a `Visibility`, what was computed before as a
cache, soft tokens as embeddings. With its switches (`qk_norm`, `qkv_bias`, `head_dim`, `rotary_dim`, `moe`, ...) it has
the shapes of LLaDA (arXiv:2502.09992), Dream / Qwen2, SDAR / Qwen3, LLaDA-MoE and LLaDA2.

Shapes: B rows, L tokens, D hidden, H query heads, G key/value heads, d head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from dmllm.nn.cache import KVCache
from dmllm.nn.feed_forward import FeedForward
from dmllm.nn.fused import Packed, attend, project, rotate_both
from dmllm.nn.moe import MixtureOfExperts, MoEConfig, Routing, balance
from dmllm.nn.norms import RMSNorm
from dmllm.nn.ragged import Compact, EndToEnd, Ragged, compact, ragged
from dmllm.nn.rope import Stretch, places, rotary_tables
from dmllm.nn.time import TimeEmbedding
from dmllm.nn.unembedding import Unembedding, unembed
from dmllm.nn.visibility import Visibility
from dmllm.types import PADDING


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape. Names are transformers' own."""

    vocab_size: int = 32000
    """Rows of the embedding and of the vocabulary projection."""
    hidden_size: int = 512
    """Width of the stream."""
    num_hidden_layers: int = 8
    """Blocks."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key/value heads; each serves num_attention_heads / this many query heads. None: as many as query heads."""
    head_dim: int | None = None
    """Width of one head. None: hidden_size / num_attention_heads."""
    intermediate_size: int | None = None
    """Inner width of the feed-forward. None: 8/3 of hidden_size, rounded up to a multiple of 32."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square before the root."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: Stretch | None = None
    """Longer wavelengths (Llama 3.1), as the fields of `nn.rope.Stretch`; None: as `rope_theta` makes them."""
    rotary_dim: int | None = None
    """Leading features of each head that positions turn; the others stay as they are. None: all."""
    mrope_section: tuple[int, ...] = ()
    """How many rotary frequencies time, height and width of an image's rows turn (Qwen2-VL); (): one axis turns all."""
    mrope_interleaved: bool = False
    """Whether these frequencies lie in turns, time, height, width, time, ... (Qwen3-VL), not one axis after another."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before rotation (Qwen3, SDAR)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2, Dream)."""
    moe: MoEConfig | None = None
    """Experts in place of one feed-forward (LLaDA-MoE, LLaDA2), as the fields of `MoEConfig`; None: no experts."""
    time_conditioning: bool = False
    """Whether the network is told the time of each row, as an embedding on the stream."""
    tie_word_embeddings: bool = False
    """One matrix for the embedding and the vocabulary projection."""
    attention: str = "auto"
    """How the same mask is computed. dense: SDPA with a boolean mask. ragged: document by document, without padding.
    flex: flex attention, compiled, which skips unseen blocks (GPU). auto: ragged on a CPU, dense elsewhere. eager: as
    auto, but on a CPU without a fused kernel; float32 is then rounded as in code that has none (LLaDA-V)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; output projections are further divided by sqrt(2 * layers)."""

    def __post_init__(self) -> None:
        if isinstance(self.moe, Mapping):
            object.__setattr__(self, "moe", MoEConfig(**self.moe))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", Stretch(**self.rope_scaling))
        object.__setattr__(self, "mrope_section", tuple(self.mrope_section))
        if self.mrope_section and (len(self.mrope_section) != 3 or sum(self.mrope_section) * 2 != self.rotary_width):
            raise ValueError(
                f"mrope_section={list(self.mrope_section)} must be three numbers for time, height and width that sum "
                f"up to half of the {self.rotary_width} features that positions turn."
            )
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_width):
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even and at most the head's width, {self.head_width}."
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.kv_heads}; each key/value head must serve equally many query heads."
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                "set head_dim, or change one of them."
            )
        if self.attention not in ("auto", "dense", "ragged", "flex", "eager"):
            raise ValueError(f"attention={self.attention!r} is not one of: auto, dense, ragged, flex, eager.")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        return self.rotary_dim or self.head_width

    @property
    def inner_width(self) -> int:
        return self.intermediate_size or -(-self.hidden_size * 8 // 3 // 32) * 32


@dataclass(frozen=True)
class Output:
    """What a backbone returns: hidden rows [B, L, D] after the last norm, and further losses by name; of experts, in
    training, those of `nn.moe.balance`."""

    hidden: Tensor
    aux: dict[str, Tensor]


class Attention(nn.Module):
    """Grouped-query attention over what the mask shows."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_width
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        norm = config.qk_norm
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if norm else nn.Identity()
        self._packed: Packed | None = None

    def pack(self) -> None:
        """One product in place of three, for decoding."""
        self._packed = Packed(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any, cache: KVCache | None) -> Tensor:
        q, k, v = project(self._packed, x, self.q_proj, self.k_proj, self.v_proj)
        end_to_end = mask if isinstance(mask, Compact) else None
        if end_to_end is not None:
            q, k, v, mask = *map(end_to_end.scatter, (q, k, v)), end_to_end.mask
        batch, length, _ = q.shape
        q = self.q_norm(q.view(batch, length, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(k.view(batch, length, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = v.view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        if rotary is not None and cache is not None:
            q, k, v = cache.place(self.layer, q, k, v, rotary)
        elif rotary is not None:
            q, k = rotate_both(q, k, *rotary)
        elif cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if isinstance(mask, Ragged):
            mixed = mask.attend(q, k, v).transpose(1, 2).flatten(2)
        elif isinstance(mask, BlockMask):
            mixed = _flex(q, k, v, block_mask=mask, enable_gqa=self.kv_heads != self.heads)
            mixed = mixed.transpose(1, 2).flatten(2)
        else:
            mask = mask.to(q.dtype) if isinstance(mask, Tensor) and mask.is_floating_point() else mask
            mixed = attend(q, k, v, mask)
        return self.o_proj(mixed if end_to_end is None else end_to_end.gather(mixed))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the stream."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module = FeedForward(config.hidden_size, config.inner_width)
        if config.moe is not None and layer not in config.moe.dense_layers:
            self.mlp = MixtureOfExperts(config.hidden_size, config.moe)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, cache: KVCache | None
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        added = self.mlp(self.post_attention_layernorm(x))
        added, routing = added if isinstance(added, tuple) else (added, None)
        return x + added, routing


class Transformer(nn.Module):
    """Token ids -> embeddings -> hidden rows -> logits, each step callable alone."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = Unembedding(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.time_embedding = TimeEmbedding(config.hidden_size) if config.time_conditioning else None

    def condition_on_time(self) -> None:
        """Be told the time from now on; until something is learned, nothing changes."""
        weight = self.embed_tokens.weight
        self.config = replace(self.config, time_conditioning=True)
        self.time_embedding = TimeEmbedding(self.config.hidden_size).to(weight.device, weight.dtype)
        self.time_embedding.initialise(self.config.initializer_range)

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
        """Embeddings [B, L, D] at `positions` [B, L] (for three axes see `nn.rope`) -> hidden rows [B, L, D].

        Embeddings may be (1 + n) D wide: the k-th D features after the first are added to the stream behind its k-th
        layer (DeepStack, arXiv:2406.04334). They are part of a row, so that whatever moves rows moves them along.
        `time` [B] or [B, L] is read by models conditioned on it (most are not: MDLM, arXiv:2406.07524, appendix E.5).

        Raises:
            ValueError: such a model was given none.
        """
        config = self.config
        mask = attention_mask(config.attention, visibility, cache, embeds)
        mask = mask if cache is None else compact(visibility, cache, mask)
        positions = positions if config.mrope_section else places(positions)
        x = mask.gather(embeds) if isinstance(mask, EndToEnd) else embeds
        if isinstance(mask, Ragged):
            several = positions.ndim == 3
            positions = torch.stack([mask.gather(p) for p in positions]) if several else mask.gather(positions)
        turning = (config.mrope_section, config.mrope_interleaved, config.rope_scaling)
        plan = {} if cache is None else cache.plan
        if "rotary" not in plan:
            width, theta = config.rotary_width, config.rope_theta
            plan["rotary"] = rotary_tables(positions, width, theta, x.dtype, *turning)
        rotary = plan["rotary"]
        routings = []
        x, *later = x.split(config.hidden_size, -1)
        if self.time_embedding is not None:
            x = x + self._time(time, embeds, mask)
        for number, block in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, rotary, mask, cache, use_reentrant=False)
            else:
                x, routing = block(x, rotary, mask, cache)
            if number < len(later):
                x = x + later[number]
            if self.training and routing is not None:
                routings.append(routing)
        real = None if isinstance(mask, EndToEnd) else (visibility.document != PADDING).flatten()
        aux = balance(routings, real) if routings else {}
        x = self.norm(x)
        return Output(mask.scatter(x) if isinstance(mask, EndToEnd) else x, aux)

    def _time(self, time: Tensor | None, embeds: Tensor, mask: Any) -> Tensor:
        assert self.time_embedding is not None
        if time is None:
            raise ValueError("This model is told the time: give `time`, [B] or [B, L] in [0, 1].")
        added = self.time_embedding(time if time.ndim == 2 else time[:, None]).expand(*embeds.shape[:2], -1)
        return mask.gather(added) if isinstance(mask, EndToEnd) else added

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights; projections back into the stream are scaled down by depth (GPT-2, section 2.3)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                back = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                nn.init.normal_(parameter, std=std / (2 * len(self.layers)) ** 0.5 if back else std)
        if self.time_embedding is not None:
            self.time_embedding.initialise(std)


def attention_mask(
    form: str, visibility: Visibility, cache: KVCache | None, embeds: Tensor
) -> Tensor | BlockMask | Ragged | None:
    """The rule for rows `embeds` in `form`, or in the one that their device computes best; None hides nothing.

    Rows with a cache keep to masked forms, made once as long as they are fed in the same places; on a GPU what is
    hidden is minus infinity, into which its kernels would turn a boolean layer by layer.
    """
    if visibility.faint is not None:
        return visibility.biased()
    if cache is None and (form == "ragged" or (form in ("auto", "eager") and embeds.device.type == "cpu")):
        return ragged(visibility, fused=form != "eager")
    if cache is None:
        return visibility.flex() if form == "flex" else visibility.dense()
    if "mask" not in cache.plan:
        keys, own = cache.keys(visibility)
        cache.plan["mask"] = _masked(form, visibility, keys, own, embeds)
    return cache.plan["mask"]


def _masked(
    form: str, visibility: Visibility, keys: Visibility, own: Tensor, embeds: Tensor
) -> Tensor | BlockMask | None:
    if form == "flex":
        return visibility.flex(keys, own)
    seen = visibility.dense(keys, own)
    if embeds.device.type == "cpu":
        return None if bool(seen.all()) else seen
    return torch.zeros(seen.shape, dtype=embeds.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


_flex = torch.compile(flex_attention, dynamic=False)
TRANSFORMER = (Transformer, TransformerConfig)
