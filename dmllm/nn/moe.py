"""Mixture of experts: a router sends each row to a few of many feed-forwards and adds up what they say.

    rows --Router--> experts of each row, and their weights
      |                     |
      +--sorted by expert---+--grouped products--> each row's k answers, weighed and added (+ the shared expert's)

Rows are sorted by expert and every expert multiplies its own rows once, all of them in one grouped product: work is
proportional to N * k, whatever the number of experts, and no shape depends on the routing, so that nothing waits for it
on a GPU. Each row's answers are added in the order of its own choices: a row's result does not depend on the others.

Sources: softmax routers as in OLMoE (arXiv:2409.02060) and LLaDA-MoE (arXiv:2509.24389); sigmoid routers with groups
and a bias that only chooses as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) and LLaDA2.0 (arXiv:2512.15745);
balance as in Switch Transformer (arXiv:2101.03961, equations 4 to 6).
Shapes: N rows, D hidden, E experts, k experts of a row, I inner features of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmllm.nn.feed_forward import FeedForward


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The experts of a model and how rows reach them."""

    num_experts: int
    """Experts of a layer."""
    num_experts_per_tok: int
    """Experts that each row is sent to."""
    moe_intermediate_size: int
    """Inner width of one expert."""
    shared_expert_intermediate_size: int = 0
    """Inner width of the expert that every row passes; 0 is none."""
    dense_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that keep one plain feed-forward."""
    score_function: str = "softmax"
    """What becomes of the router's logits: softmax over all experts, or a sigmoid of each."""
    norm_topk_prob: bool = False
    """Whether the weights of a row's experts are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights."""
    n_group: int = 1
    """Experts come in this many groups of neighbours; a row's experts are looked for in its best groups alone."""
    topk_group: int = 1
    """How many groups those are: the ones with the largest sum of their two best scores."""
    expert_bias: bool = False
    """A number for each expert, added to the scores where experts are chosen and not where they are weighed; kept in
    the checkpoint, not learned by gradients."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number, at least 1.")
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"score_function={self.score_function!r} is not one of: softmax, sigmoid.")
        if self.num_experts % self.n_group:
            raise ValueError(f"num_experts={self.num_experts} is not a multiple of n_group={self.n_group}.")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than there are; n_group={self.n_group}.")
        reached = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reached:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {reached} experts that a row can "
                f"reach (num_experts={self.num_experts}, topk_group={self.topk_group} of n_group={self.n_group})."
            )


@dataclass(frozen=True)
class Routing:
    """Where a layer's rows went: scores [N, E] after softmax or sigmoid, experts [N, k], weights [N, k], float32."""

    scores: Tensor
    experts: Tensor
    weights: Tensor


class Router(nn.Module):
    """Rows -> experts, in float32 under autocast too: near ties decide which expert is asked."""

    bias: Tensor | None

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        nn.init.normal_(self.weight, std=width**-0.5)
        self.register_buffer("bias", torch.zeros(config.num_experts) if config.expert_bias else None)

    def forward(self, rows: Tensor) -> Routing:
        config = self.config
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.float(), self.weight.float())
        scores = logits.softmax(-1) if config.score_function == "softmax" else logits.sigmoid()
        experts = self._choose(scores.detach())
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores, experts, weights * config.routed_scaling_factor)

    def _choose(self, scores: Tensor) -> Tensor:
        config = self.config
        ranked = scores if self.bias is None else scores + self.bias
        if config.topk_group < config.n_group:
            grouped = ranked.unflatten(1, (config.n_group, -1))
            strength = grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)
            best = torch.zeros_like(strength, dtype=torch.bool)
            best = best.scatter(1, strength.topk(config.topk_group).indices, True)
            ranked = grouped.masked_fill(~best[..., None], float("-inf")).flatten(1)
        return ranked.topk(config.num_experts_per_tok).indices


class Experts(nn.Module):
    """E feed-forwards (SwiGLU) as three stacks of matrices, as laid out as E `nn.Linear`."""

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        number, inner = config.num_experts, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(number, inner, width))
        self.up_proj = nn.Parameter(torch.empty(number, inner, width))
        self.down_proj = nn.Parameter(torch.empty(number, width, inner))
        for stack in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(stack, std=stack.shape[-1] ** -0.5)

    def forward(self, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Rows [N, D], their experts [N, k] and the weights of those [N, k] -> [N, D]."""
        chosen, order = experts.flatten().sort(stable=True)
        every = torch.arange(len(self.gate_proj), device=rows.device)
        ends = torch.searchsorted(chosen, every, right=True, out_int32=True)  # [E], where each expert's rows end
        asked = F.embedding(order // experts.shape[1], rows)  # as an index, but with a backward that is no queue
        inner = F.silu(_grouped(asked, self.gate_proj, ends)) * _grouped(asked, self.up_proj, ends)
        answers = _grouped(inner, self.down_proj, ends)
        answers = answers.index_select(0, order.argsort()).unflatten(0, experts.shape)  # [N, k, D]
        return torch.einsum("nk,nkd->nd", weights.to(answers.dtype), answers)


class MixtureOfExperts(nn.Module):
    """The experts that the router chooses for each row, and the shared one for all."""

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        self.router = Router(width, config)
        self.experts = Experts(width, config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = FeedForward(width, shared) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """[B, L, D] -> the same shape, and where its B * L rows went."""
        rows = x.flatten(0, 1)
        routing = self.router(rows)
        mixed = self.experts(rows, routing.experts, routing.weights).view(x.shape)
        return (mixed if self.shared_expert is None else mixed + self.shared_expert(x)), routing


def balance(layers: Sequence[Routing], real: Tensor | None = None) -> dict[str, Tensor]:
    """How evenly the experts of each layer are used, for training.

    Args:
        layers: one routing a layer.
        real: [N] bool, the rows that are not padding; None is all.

    Returns:
        load_balance: E * sum over experts of (share of the rows' choices) * (mean share of the rows' scores), averaged
            over layers: 1 where all experts are used alike, up to E where one is. It has a gradient.
        expert_load: [layers, E], the shares of the choices.
    """
    losses, loads = [], []
    for routing in layers:
        number = routing.scores.shape[1]
        kept = torch.ones_like(routing.scores[:, 0]) if real is None else real.to(routing.scores.dtype)
        share = routing.scores / routing.scores.sum(-1, keepdim=True)
        counts = torch.zeros_like(routing.scores[0]).scatter_add(
            0, routing.experts.flatten(), kept[:, None].expand_as(routing.experts).flatten()
        )
        load = counts / counts.sum().clamp(min=1)
        losses.append(number * (load * (share * kept[:, None]).sum(0)).sum() / kept.sum().clamp(min=1))
        loads.append(load)
    return {"load_balance": torch.stack(losses).mean(), "expert_load": torch.stack(loads)}


def _grouped(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Rows [M, in], sorted by expert, each times its expert's matrix of `stack` [E, out, in] -> [M, out]."""
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    rows, stack = rows.to(dtype), stack.to(dtype)
    if _has_kernel(stack):
        return F.grouped_mm(rows, stack.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    # Unbound once: the gradient of a selected matrix would be as large as the stack, for each of them.
    return torch.cat([F.linear(part, one) for part, one in zip(rows.split(sizes), stack.unbind(), strict=True)])


def _has_kernel(stack: Tensor) -> bool:
    """Whether torch has a grouped product here: on CPUs and on GPUs from Ampere on, where rows, columns and the stack
    itself begin at multiples of 16 bytes. What is mapped from a file may begin anywhere."""
    aligned = all(size * stack.element_size() % 16 == 0 for size in stack.shape[1:])
    if stack.device.type == "cuda":
        return aligned and torch.cuda.get_device_capability(stack.device) >= (8, 0)
    return aligned and stack.device.type == "cpu" and stack.data_ptr() % 16 == 0
