"""One process or many: the accelerator with its guards, sums over processes, and moving data to the device.

accelerate runs one process where it was asked for several, and DDP where it was asked for FSDP, without a word
(`accelerate launch --cpu`, `ACCELERATE_USE_FSDP` on CPU); both are refused here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dmllm.config import environment
from dmllm.types import Batch


def build_accelerator(precision: str, *, trackers: list[str], folder: str) -> Accelerator:
    """The accelerator on the GPU there is, else on CPU; `trackers` write below `folder`.

    Raises:
        ValueError: it is not what the launcher asked for.
    """
    AcceleratorState._reset_state()  # a second run in one process may ask for another precision
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=[*trackers] or None,  # type: ignore[arg-type]
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    asked = int(environment("WORLD_SIZE") or 1)
    if asked > 1 and accelerator.num_processes != asked:
        raise ValueError(
            f"WORLD_SIZE={asked} processes were started but accelerate runs {accelerator.num_processes}; "
            f"start them with: torchrun --nproc-per-node {asked} train.py RECIPE.yaml"
        )
    if (environment("ACCELERATE_USE_FSDP") or "").lower() in ("1", "true") and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP was asked for (ACCELERATE_USE_FSDP) but accelerate did not start FSDP2: it needs GPUs and version 2. "
            "Use: accelerate launch --config_file data_configs/accelerate_fsdp2.yaml train.py RECIPE.yaml"
        )
    return accelerator


def split_step(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """(examples of a micro-batch, micro-batches each process runs in a step).

    Raises:
        ValueError: batch_size is not a multiple of micro_batch_size * world_size; values that work are named.
    """
    micro = micro_batch_size or max(batch_size // world_size, 1)
    if batch_size % (micro * world_size):
        share = batch_size // world_size
        sizes = [m for m in range(1, share + 1) if share % m == 0] if batch_size % world_size == 0 else []
        below, above = batch_size // (micro * world_size), -(-batch_size // (micro * world_size))
        totals = [n * micro * world_size for n in (below, above) if n]
        raise ValueError(
            f"batch_size={batch_size} is not divisible by micro_batch_size={micro} x {world_size} processes; "
            f"try --batch_size={' or '.join(map(str, totals))}"
            + (f", or --micro_batch_size={' or '.join(map(str, sizes[-4:]))}." if sizes else ".")
        )
    return micro, batch_size // (micro * world_size)


def global_counts(accelerator: Accelerator, counts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each count summed over micro-batches and processes, at least a hair above zero so that 0 / 0 is 0."""
    names = sorted(counts[0])
    total = torch.stack([torch.stack([c[name].double() for c in counts]).sum() for name in names])
    if accelerator.num_processes > 1:
        total = sum_over_processes(accelerator, total.to(accelerator.device))
    return dict(zip(names, total.clamp(min=1e-12).float(), strict=True))


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The element-wise sum of a small tensor over all processes."""
    total: Any = accelerator.reduce(values, "sum") if accelerator.num_processes > 1 else values
    return total


def to_device(value: Any, device: torch.device) -> Any:
    """A dataclass of tensors on the device; through pinned memory, so that a GPU's stream is never waited for."""
    if isinstance(value, Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = {f.name: to_device(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **moved)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return value


def with_blank_image(batch: Batch, image_size: tuple[int, int]) -> Batch:
    """A text-only batch with one blank tile that no slot names: every process then runs every module, which gradient
    reduction and sharding need, and the loss is unchanged."""
    if batch.pixel_values is not None:
        return batch
    blank = torch.zeros(1, 3, *image_size, dtype=torch.uint8)
    return dataclasses.replace(batch, pixel_values=blank, image_grids=torch.ones(1, 3, dtype=torch.int64))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP2)."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather_root(model: nn.Module) -> None:
    """Gather what the model's own methods use beside its forward (vision encoder, projector); `reshard` undoes it."""
    if isinstance(model, FSDPModule):
        model.unshard()


def reshard(model: nn.Module) -> None:
    """Drop gathered copies of sharded weights; a forward without a backward leaves them, and they would go stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
