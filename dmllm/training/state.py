"""The run on disk: which run a folder holds, and checkpoints from which it continues exactly.

A checkpoint is one flat mapping of tensors (model/NAME, ema/NAME, adamw/NAME/exp_avg, ...) and `progress.json`. It is
written beside its place and renamed, so that a killed run leaves complete checkpoints only. Draws, data order and
learning rates are functions of (seed, step, global example index), so nothing else needs remembering. Sharded weights
are written by every process through torch.distributed.checkpoint and may be read by another number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dmllm.config import read_yaml, save_config, to_dict
from dmllm.training.distributed import is_sharded
from dmllm.training.ema import Ema

FREE = ("output_dir", "resume", "num_workers", "micro_batch_size", "gradient_checkpointing", "compile")
FREE += ("log_every", "save_every", "keep", "trackers", "samples", "validation.every", "save_dtype")


class RunConfig(Protocol):
    """What a run's configuration says of its folder; see `TrainConfig`."""

    @property
    def output_dir(self) -> str: ...
    @property
    def resume(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0  # optimiser steps done
    examples: int = 0  # the global index of the next example
    best_loss: float | None = None  # lowest validation loss so far
    best_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Everything that training changes."""

    model: nn.Module
    optimisers: dict[str, torch.optim.Optimizer]
    ema: Ema | None = None


def open_run(config: RunConfig, accelerator: Accelerator) -> Path:
    """The run's folder, with `config.yaml` in it.

    Raises:
        ValueError: the folder holds a run with another configuration (see `TrainConfig.resume`).
    """
    folder = Path(config.output_dir)
    if accelerator.is_main_process:
        if config.resume == "never" and folder.exists() and any(folder.iterdir()):
            folder.rename(_free_name(folder))
        if config.resume == "auto" and (folder / "config.yaml").is_file() and newest_checkpoint(folder):
            _refuse_other_run(config, folder)
        save_config(config, folder / "config.yaml")
        for left in (*folder.glob("checkpoints/.writing-*"), *folder.glob(".*.new-*")):  # of a killed run
            shutil.rmtree(left)
    accelerator.wait_for_everyone()
    return folder


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the greatest step, or None."""
    return max(folder.glob("checkpoints/step-*"), default=None, key=lambda p: int(p.name.removeprefix("step-")))


def save_checkpoint(folder: Path, progress: Progress, learned: Learned, accelerator: Accelerator, keep: int) -> Path:
    """Write checkpoints/step-N and remove all but the `keep` newest; every process calls this."""
    final = folder / "checkpoints" / f"step-{progress.step:08d}"
    writing = final.with_name(f".writing-{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    accelerator.wait_for_everyone()
    tensors = _tensors(learned)
    if is_sharded(learned.model):
        dcp.save(tensors, checkpoint_id=writing / "shards")
    elif accelerator.is_main_process:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, writing / "state.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (writing / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(writing, final)
        for old in sorted((folder / "checkpoints").glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(path: Path, learned: Learned) -> Progress:
    """Put a checkpoint's tensors in place and return how far it was. Raises ValueError where they do not fit."""
    progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
    parameters = dict(learned.model.named_parameters())
    if (path / "shards").is_dir():
        sizes = dcp.FileSystemReader(path / "shards").read_metadata().state_dict_metadata
        tensors = {name: _like(name, meta, parameters) for name, meta in sizes.items()}
        dcp.load(tensors, checkpoint_id=path / "shards")
    else:
        tensors = load_file(path / "state.safetensors")
        tensors = {name: _spread(t, parameters.get(name.split("/")[1])) for name, t in tensors.items()}
    _put(tensors, "model", _weights(learned.model), path)
    if learned.ema is not None:
        held = {name.split("/")[1] for name in tensors if name.startswith("ema/")}
        source = "ema" if held else "model"  # `changed`: an average that starts now starts at the weights
        _put(tensors, source, learned.ema.averages, path)
    for kind, optimiser in learned.optimisers.items():
        _put_optimiser(tensors, kind, optimiser, _names(optimiser, parameters))
    return progress


def _tensors(learned: Learned) -> dict[str, Tensor]:
    """Everything that training changes, by flat name."""
    parameters = dict(learned.model.named_parameters())
    flat = {f"model/{name}": t for name, t in _weights(learned.model).items()}
    if learned.ema is not None:
        flat |= {f"ema/{name}": t for name, t in learned.ema.averages.items()}
    for kind, optimiser in learned.optimisers.items():
        for name, parameter in _names(optimiser, parameters).items():
            state = optimiser.state.get(parameter, {})
            flat |= {f"{kind}/{name}/{key}": t for key, t in state.items() if isinstance(t, Tensor)}
    return flat


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers a checkpoint keeps."""
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict(keep_vars=True)}
    return {n: p.detach() for n, p in model.named_parameters()} | buffers


def _names(optimiser: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by name, in its own order."""
    by_id = {id(p): name for name, p in parameters.items()}
    return {by_id[id(p)]: p for group in optimiser.param_groups for p in group["params"]}


@torch.no_grad()
def _put(tensors: dict[str, Tensor], kind: str, targets: dict[str, Tensor], path: Path) -> None:
    for name, target in targets.items():
        source = tensors.get(f"{kind}/{name}")
        if source is None or source.shape != target.shape:
            given = "nothing" if source is None else tuple(source.shape)
            raise ValueError(
                f"{path} holds {given} for {name}, the model needs {tuple(target.shape)}; it belongs to another model. "
                "Set another --output_dir, or --resume=never."
            )
        target.copy_(source)


def _put_optimiser(
    tensors: dict[str, Tensor], kind: str, optimiser: torch.optim.Optimizer, names: dict[str, nn.Parameter]
) -> None:
    """The state of each parameter; rates and decays stay those of the configuration."""
    prefixed = [(key.split("/"), t) for key, t in tensors.items() if key.startswith(f"{kind}/")]
    by_name: dict[str, dict[str, Tensor]] = {}
    for (_, name, key), tensor in prefixed:
        by_name.setdefault(name, {})[key] = tensor
    state = {place: by_name[name] for place, name in enumerate(names) if name in by_name}
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def _like(name: str, stored: Any, parameters: dict[str, nn.Parameter]) -> Tensor:
    """Room for a tensor to be read: sharded as its parameter where the shape is the parameter's."""
    parameter = parameters.get(name.split("/")[1])
    if parameter is not None and parameter.shape == stored.size:
        return torch.empty_like(parameter, requires_grad=False)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def _spread(tensor: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """A whole tensor, sharded as its parameter is: an unsharded run may continue sharded."""
    if isinstance(parameter, DTensor) and parameter.shape == tensor.shape:
        from_every = DTensor.from_local(tensor.to(parameter.device), parameter.device_mesh, run_check=False)
        return from_every.redistribute(parameter.device_mesh, parameter.placements)
    return tensor


def _refuse_other_run(config: RunConfig, folder: Path) -> None:
    old, new = _leaves(read_yaml(folder / "config.yaml")), _leaves(to_dict(config))
    changed = [
        f"{key}: {old.get(key, 'unset')} there, {new.get(key, 'unset')} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE)
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run with another configuration ({'; '.join(changed)}). Type --output_dir=ANOTHER for a "
            "new run, --resume=changed to continue that one with these settings, or --resume=never to start over."
        )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> plain value, through mappings; lists are compared whole."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _leaves(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def _free_name(folder: Path) -> Path:
    """folder-1, folder-2, ...: the first that does not exist."""
    number = 1
    while (name := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return name
