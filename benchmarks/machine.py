"""What this machine does in a second, and what else it was doing meanwhile."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dmllm.evaluation.products import multiply, operands, square

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
