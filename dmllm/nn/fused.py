"""What stands between the matrix products, as single kernels while calls are being captured for a GPU.

A step of decoding reads every weight for a few rows; what is done to the rows takes a kernel each, and a kernel on
little data takes as long as on much. Elsewhere these are the plain functions that they are written as, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.nn.rope import rotate
from dmllm.registry import Table

KERNELS = Table("kernel", {"attend": "dmllm.nn.kernels:attend", "place": "dmllm.nn.kernels:place"})  # need triton
HEADS = (16, 32, 64, 128, 256)  # head dimensions that they take
WIDEST = 256  # rows; with more of them every processor has work without

_fusing: ContextVar[bool] = ContextVar("fusing", default=False)


@contextmanager
def fusing() -> Iterator[None]:
    """Within, the functions below are compiled."""
    token = _fusing.set(True)
    try:
        yield
    finally:
        _fusing.reset(token)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled while `fusing`."""
    compiled = cache(lambda: torch.compile(function, dynamic=True))

    @wraps(function)
    def call(*args: Any) -> Any:
        return compiled()(*args) if _fusing.get() else function(*args)

    return call


@fused
def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, L, d] turned by their positions."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


@fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows [..., D] by their root mean square."""
    return F.rms_norm(x, weight.shape, weight, eps)


@fused
def write(kept: Tensor, new: Tensor, places: Tensor) -> None:
    """Writes new [B, H, L, d] into `kept` [B, H, S, d] at places [B, L]."""
    row = torch.arange(len(new), device=new.device)[:, None]
    kept[row, :, places] = new.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, H, W, d] with k and v [B, G, S, d] under a mask as SDPA takes it -> [B, W, H * d]."""
    if _fusing.get() and mask is not None and mask.is_floating_point() and q.shape[2] <= WIDEST and _suits(q):
        return KERNELS.load("attend")(q, k, v, mask)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return mixed.transpose(1, 2).flatten(2)


def place(
    q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, places: Tensor
) -> Tensor | None:
    """The turned q, k and v having been turned and written as `nn.kernels.place` does; None where it does not fit."""
    if not _fusing.get() or not _suits(q) or rotary[0].shape[-1] != q.shape[-1] or not places.is_contiguous():
        return None
    return KERNELS.load("place")(q, k, v, *rotary, keys, values, places)


def _suits(q: Tensor) -> bool:
    """Whether a kernel of ours has its shape; float32 keeps to what multiplies in float32."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in HEADS


def pack(*layers: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One weight, and bias, of several layers that read the same rows; the layers' own become parts of them."""
    sizes = [layer.out_features for layer in layers]

    def joined(parameters: Sequence[Tensor]) -> Tensor:
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, whole.split(sizes), strict=True):
            parameter.data = part
        return whole

    biases = [layer.bias for layer in layers if layer.bias is not None]
    return joined([layer.weight for layer in layers]), joined(biases) if len(biases) == len(layers) else None


class Packed:
    """Several layers that read the same rows as one product, for as long as their weights stay where they were put."""

    def __init__(self, *layers: torch.nn.Linear):
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self.weight, self.bias = pack(*layers)

    @property
    def holds(self) -> bool:
        """Whether the layers' weights are still these."""
        return self.layers[0].weight.data_ptr() == self.weight.data_ptr()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Rows [..., in] -> what each layer makes of them."""
        return F.linear(x, self.weight, self.bias).split(self.sizes, -1)


def project(packed: Packed | None, x: Tensor, *layers: torch.nn.Linear) -> tuple[Tensor, ...]:
    """What each of `layers` makes of rows x: at once if they are packed and nothing is learned."""
    if packed is not None and not torch.is_grad_enabled() and packed.holds:
        return packed(x)
    return tuple(layer(x) for layer in layers)
