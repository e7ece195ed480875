"""The products of a piece of work: how many operations they are, and how fast a machine runs them by themselves.

A product of an m x k and a k x n matrix is 2 m k n floating-point operations. Counting is torch's FlopCounterMode; what
linear layers multiply is also noted shape by shape, so that it can be run again with nothing in between: an upper limit
of what the work itself can reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides


@dataclass(frozen=True)
class Product:
    """A product of two matrices as it was called."""

    dtype: torch.dtype
    left: Layout
    right: Layout

    @property
    def flops(self) -> int:
        return 2 * self.left[0][0] * self.left[0][1] * self.right[0][1]


Products = Mapping[Product, int]  # and how often it occurs


def square(side: int, dtype: torch.dtype) -> Product:
    """The product of two square matrices."""
    layout = ((side, side), (side, 1))
    return Product(dtype, layout, layout)


def count(work: Callable[[], Any]) -> tuple[int, Products]:
    """Run `work`. Returns its operations, attention and convolutions included, and its products of two matrices."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, _Noting() as noted:
        work()
    return counter.get_total_flops(), noted.seen


def operands(products: Products, device: torch.device) -> list[tuple[Tensor, Tensor, int]]:
    """Random matrices for each product, laid out as they were; they share memory."""
    numbers = {}
    for dtype in {product.dtype for product in products}:
        layouts = [layout for p in products if p.dtype == dtype for layout in (p.left, p.right)]
        span = max(1 + sum((n - 1) * stride for n, stride in zip(*layout, strict=True)) for layout in layouts)
        numbers[dtype] = [torch.randn(span, device=device).to(dtype) for _ in range(2)]
    return [
        (numbers[p.dtype][0].as_strided(*p.left), numbers[p.dtype][1].as_strided(*p.right), times)
        for p, times in products.items()
    ]


def multiply(matrices: list[tuple[Tensor, Tensor, int]]) -> None:
    """Each product as often as it occurs."""
    for left, right, times in matrices:
        for _ in range(times):
            torch.mm(left, right)


class _Noting(TorchDispatchMode):
    """Notes products of two matrices, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = ((tuple(x.shape), tuple(x.stride())) for x in args[-2:])
            self.seen[Product(args[-1].dtype, left, right)] += 1
        return func(*args, **(kwargs or {}))


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and mixture over all keys, hidden ones too, from shapes [B, H, L, d]."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """The scores again, and the gradients of mixture, values, queries and keys."""
    return _attention(query, key, value) * 5 // 2


CPU_ATTENTION = {  # which older releases of torch do not count
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
