"""What a model is asked while a request runs: when each call began, how many rows it was fed; and memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import now


class Calls(AbstractContextManager["Calls"]):
    """The calls of a module, whoever makes them."""

    def __init__(self, module: nn.Module, keep: bool = False):
        """With `keep`, what each call was given is kept, so that it can be repeated."""
        self.module, self.keep = module, keep
        self.began: list[float] = []
        self.fed: list[int] = []  # rows of a stream
        self.given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.end = 0.0

    def __enter__(self) -> Calls:
        self._hook = self.module.register_forward_pre_hook(self._note, with_kwargs=True)
        self.start = now()
        return self

    def __exit__(self, *_: object) -> None:
        self.end = now()
        self._hook.remove()

    def __len__(self) -> int:
        return len(self.began)

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def steps(self) -> list[float]:
        """Seconds from each call to the next, what is made of its logits included."""
        return [b - a for a, b in zip(self.began, [*self.began[1:], self.end])]

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.began.append(now())
        stream = next(x for x in (*args, kwargs.get("inputs_embeds"), kwargs.get("input_ids")) if x is not None)
        self.fed.append(stream.shape[1])
        if self.keep:
            self.given.append((args, kwargs))


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that torch holds at once for `work`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results: Any = profiled.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class Largest(TorchDispatchMode):
    """The largest tensors that operations make, and how many rows any of them has over a vocabulary."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.bytes, self.shape = 0, ()
        self.rows = 0  # of the largest tensor whose last dimension is the vocabulary

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        there = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in there:  # no view of what was given
                self._note(x)
        return made

    def _note(self, x: Tensor) -> None:
        size = x.numel() * x.element_size()
        if size > self.bytes:
            self.bytes, self.shape = size, tuple(x.shape)
        if x.ndim and self.vocabulary <= x.shape[-1] < self.vocabulary + 256:
            self.rows = max(self.rows, x.numel() // x.shape[-1])


@torch.no_grad()
def repeat(module: nn.Module, given: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """The same calls again; what they write into a cache stands there already."""
    for args, kwargs in given:
        module(*args, **kwargs)
