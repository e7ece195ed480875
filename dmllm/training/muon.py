"""torch.optim.Muon with matrices of one shape orthogonalised together.

The update is torch.optim.Muon's (Jordan et al., 2024): momentum, five Newton-Schulz steps in bfloat16, a rate adjusted
to the shape. A transformer has few shapes and many matrices; stacked, hundreds of small products become a few batched
ones, which for small models are most of an optimiser step. Sharded matrices are left to torch's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

STACKED = 2**26  # elements orthogonalised at once, at most (one matrix at least)


class Muon(torch.optim.Muon):
    """Same arguments, state and result (to rounding) as torch's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(hasattr(p, "device_mesh") for p in params):
                return super().step()
            if params:
                self._move(group, params)
        return None

    def _move(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for places in _alike(params):
            stack = torch.stack([updates[i] for i in places])
            moves = orthogonalised(stack, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(stack.dtype)
            rate = group["lr"] * shape_factor(group["adjust_lr_fn"], *stack.shape[1:])
            torch._foreach_add_([params[i] for i in places], list(moves.unbind()), alpha=-rate)


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """[N, R, C] -> each with its singular values pushed towards 1, in bfloat16 (Newton-Schulz, quintic)."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.bfloat16() if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def shape_factor(rule: str | None, rows: int, columns: int) -> float:
    """What a matrix's shape multiplies its rate by (torch.optim.Muon's `adjust_lr_fn`)."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def _alike(params: list[Tensor]) -> Iterator[list[int]]:
    """Places of matrices of one shape, dtype and device, few enough to be stacked."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for place, p in enumerate(params):
        kinds[p.shape, p.dtype, p.device].append(place)
    for (shape, _, _), places in kinds.items():
        at_once = max(STACKED // shape.numel(), 1)
        for start in range(0, len(places), at_once):
            yield places[start : start + at_once]
