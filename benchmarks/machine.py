"""What this machine does in a second, and what else it was doing meanwhile."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmllm.evaluation.products import Products, multiply, operands, square

BUSY = 2.0  # load average from which a measurement is not to be trusted
CUBE, COPIED = 1024, 1 << 28  # side of a square product; bytes


def now() -> float:
    """Seconds of this process on all its processors: what other processes do meanwhile does not count."""
    return time.process_time()


def load_average() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def about() -> dict[str, Any]:
    """The machine, its software and the hour."""
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average": round(load_average(), 2),
    }


def in_words(about: dict[str, Any]) -> str:
    return (
        f"{about['date']}, {about['processor']} ({about['processors']} processors, {about['threads']} threads used), "
        f"torch {about['torch']}, load average {about['load_average']}"
    )


def warn(loads: list[float]) -> list[str]:
    """A line where the machine was busy."""
    if max(loads) <= BUSY:
        return []
    return [
        f"WARNING: load average up to {max(loads):.1f} during the run; above {BUSY:g} numbers are not to be trusted"
    ]


def cube_rate(dtype: torch.dtype, side: int = CUBE) -> float:
    """Floating-point operations a second in the product of two square matrices: the most that can be hoped for."""
    product = square(side, dtype)
    matrices = operands({product: 1}, torch.device("cpu"))
    return product.flops / _best(lambda: multiply(matrices))


def seconds_of(matrices: Sequence[tuple[Tensor, ...]]) -> float:
    """Of multiplying pairs of matrices one after another."""
    start = now()
    for left, right, *_ in matrices:
        torch.mm(left, right)
    return max(now() - start, 1e-9)


def apart(calls: Sequence[Products]) -> list[tuple[Tensor, Tensor]]:
    """The operands of the products of some calls, call by call. Each weight lies in memory of its own, as in a model,
    and is the same in all calls; what is multiplied with it is at hand."""
    weights: dict[tuple[Any, ...], list[Tensor]] = {}
    found = []
    for products in calls:
        for product, times in products.items():
            own = weights.setdefault((product.dtype, product.right), [])
            own += [_laid_out(product.right, product.dtype) for _ in range(times - len(own))]
            left = _laid_out(product.left, product.dtype)
            found += [(left, weight) for weight in own[:times]]
    return found


def together(calls: Sequence[Products]) -> list[tuple[Tensor, Tensor]]:
    """The same products, with operands that share memory, so that a cache holds what it can of them."""
    merged = {
        product: sum(products.get(product, 0) for products in calls) for products in calls for product in products
    }
    return [(left, right) for left, right, times in operands(merged, torch.device("cpu")) for _ in range(times)]


def _laid_out(layout: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> Tensor:
    span = 1 + sum((n - 1) * stride for n, stride in zip(*layout, strict=True))
    return torch.randn(span).to(dtype).as_strided(*layout)


def copy_rate(size: int = COPIED) -> float:
    """Bytes a second, read or written, in copying memory that no cache holds."""
    source = torch.zeros(size // 4)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source))


def _best(work: Any, times: int = 5) -> float:
    taken = []
    for _ in range(times):
        start = now()
        work()
        taken.append(now() - start)
    return max(min(taken), 1e-9)


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
