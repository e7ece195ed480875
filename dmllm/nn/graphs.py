"""Calls of fixed shapes as CUDA graphs, and the buffers that they are captured on, kept for later requests.

A step of decoding launches some hundred small kernels; replayed as one graph, the GPU does not wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmllm.nn.cache import KVCache
from dmllm.nn.fused import fusing
from dmllm.nn.moe import MixtureOfExperts

ROWS = 4096  # rows of the stream in one call; beyond, launching takes no time beside computing
BUCKET = 128  # places: sizes are rounded up to multiples, so that requests of similar lengths share their buffers


def capturable(model: Any) -> bool:
    """Whether a call's kernels are the same whatever the data: not those of experts, who get as many rows as ask."""
    return not any(isinstance(module, MixtureOfExperts) for module in model.modules())


class Graphed:
    """A function of tensors that reads and writes the same memory at every call; it is captured at the second one."""

    def __init__(self, function: Callable[..., Tensor]):
        self._function = function
        self._calls = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor | None = None
        self._graph: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result for inputs of the shapes of the first call; the next call overwrites it."""
        self._calls += 1
        if self._calls == 1:
            return self._function(*inputs)
        if self._graph is None:
            self._capture(inputs)
        for mine, new in zip(self._inputs, inputs, strict=True):
            mine.copy_(new)
        assert self._graph is not None
        assert self._output is not None
        self._graph.replay()
        return self._output

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside), fusing():
            self._function(*self._inputs)  # kernels are chosen and compiled before, not while, they are recorded
        now.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"), fusing():
            self._output = self._function(*self._inputs)


class Workspaces:
    """Caches on a GPU, each with the graphs captured on it, that the next request of its size takes over.

    Args:
        limit: caches kept while nobody uses them; the one unused for longest goes first.
    """

    def __init__(self, limit: int = 2):
        self.limit = limit
        self._idle: list[tuple[Any, KVCache]] = []

    def take(self, batch: int, size: int, model: Any) -> KVCache:
        """An empty cache for `batch` rows of at least `size` places."""
        device = torch.device(model.device)
        if device.type != "cuda":
            return KVCache(size)
        size = -(-size // BUCKET) * BUCKET
        wanted = (batch, size, str(device), model.dtype, id(model))
        for number, (key, cache) in enumerate(self._idle):
            if key == wanted:
                del self._idle[number]
                cache.clear()
                return cache
        for module in model.modules():
            if hasattr(module, "pack") and module._packed is None:
                module.pack()
        cache = KVCache(size)
        cache.owner = wanted
        return cache

    def give(self, cache: KVCache | None) -> None:
        """A cache that its request no longer needs."""
        if cache is not None and cache.owner is not None and self.limit:
            self._idle = [*self._idle, (cache.owner, cache)][-self.limit :]
