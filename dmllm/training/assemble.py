"""From a configuration to everything a run needs: the parts, on their device, wrapped for their processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import nn

from dmllm.checkpoints.compose import compose
from dmllm.checkpoints.folder import decode_defaults, set_decode_defaults
from dmllm.config import to_dict
from dmllm.data.loader import Loader, build_loader
from dmllm.data.mixture import DataConfig, Mixture, load_mixture, read_data_config
from dmllm.objectives import build_objective, requirements
from dmllm.training.config import TrainConfig
from dmllm.training.distributed import build_accelerator, split_step
from dmllm.training.ema import Ema
from dmllm.training.logging import check_trackers
from dmllm.training.optimiser import build_optimisers, set_learning
from dmllm.training.state import Learned, Progress, load_checkpoint, newest_checkpoint, open_run


@dataclass(frozen=True, kw_only=True)
class Run:
    """What does not change while training, but for the tensors inside `learned`."""

    config: TrainConfig
    accelerator: Accelerator
    folder: Path
    model: nn.Module  # as it is called: wrapped for several processes
    learned: Learned  # its inside, the optimisers and the average
    processor: Any
    objective: Any
    mixture: Mixture
    validation: Mixture | None
    steps: int
    micro_batch_size: int
    micro_batches: int  # of one step, in this process
    start: Progress  # where this process of the run begins

    @property
    def core(self) -> Any:
        """The model without its wrapping."""
        return self.learned.model


def assemble(config: TrainConfig) -> Run:
    """Build everything, and continue from the newest checkpoint if there is one.

    Raises:
        ValueError: the configuration does not fit the data, the processes, or the run that output_dir holds.
    """
    check_trackers(config.trackers)
    accelerator = build_accelerator(config.precision, trackers=config.trackers, folder=config.output_dir)
    micro_batch_size, micro_batches = split_step(config.batch_size, config.micro_batch_size, accelerator.num_processes)
    mixture = load_mixture(config.data, seed=config.seed)
    validation = load_mixture(config.validation.data, seed=0) if config.validation else None
    configure_torch(config.deterministic)
    torch.manual_seed(config.seed)
    core, processor = compose(config.model)
    asked = config.objective.name, config.objective.options
    adapt(core, requirements(*asked, core.config.visibility), config.model.generation)
    set_learning(core, config.parts, compact=config.precision == "bf16" and not accelerator.is_fsdp2)
    core.train()
    if config.gradient_checkpointing:
        core.set_gradient_checkpointing(True)
    if config.compile:
        compile_blocks(core)
    objective = build_objective(*asked, core.vocabulary, core.config.visibility)
    optimisers = build_optimisers(core, config.optimiser, config.parts)
    folder = open_run(config, accelerator)
    if config.trackers:
        accelerator.init_trackers(folder.name, config={"configuration": yaml.safe_dump(to_dict(config))})
    model, *wrapped = accelerator.prepare(core, *optimisers.values())
    optimisers = dict(zip(optimisers, wrapped, strict=True))
    learned = Learned(model=core, optimisers=optimisers, ema=Ema(core, config.ema) if config.ema else None)
    checkpoint = newest_checkpoint(folder)
    return Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        model=model,
        learned=learned,
        processor=processor,
        objective=objective,
        mixture=mixture,
        validation=validation,
        steps=config.steps or math.ceil(config.epochs * len(mixture) / config.batch_size),  # type: ignore[operator]
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        start=load_checkpoint(checkpoint, learned) if checkpoint else Progress(),
    )


def adapt(model: Any, required: dict[str, Any], generation: dict[str, Any]) -> None:
    """Makes the model one that learns by the objective; where that changes its blocks, it no longer decodes in those
    that it had, unless the configuration's `generation` says so.

    Raises:
        ValueError: it is a model that learns nothing here, or cannot be given what the objective requires.
    """
    if not hasattr(model, "adapt"):
        raise ValueError(f"A {type(model).__name__}, which transformers computes, is run here, but not trained.")
    before = model.config.visibility
    model.adapt(**required)
    if model.config.visibility != before and "block_length" not in generation:
        defaults = decode_defaults(model)
        defaults.pop("block_length", None)
        set_decode_defaults(model, defaults)


def open_loader(run: Run, data: str | DataConfig, mixture: Mixture, *, start: int, seed: int) -> Loader:
    """This process's micro-batches of a mixture from the global example `start` on, endlessly."""
    config, accelerator = run.config, run.accelerator
    return build_loader(
        mixture,
        run.processor,
        batch_size=run.micro_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=start,
        num_workers=config.num_workers,
        seed=seed,
        on_error=(data if isinstance(data, DataConfig) else read_data_config(data)).on_error,
        pad_to_multiple=config.pad_to_multiple,
    )


def configure_torch(deterministic: bool) -> None:
    """On GPUs TF32 products, and no cuDNN attention, which plans anew for every length of a batch: on an H100 a step of
    a 5M model took 195 ms with it and 75 ms without. Deterministic kernels if asked for."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(deterministic)


def compile_blocks(model: nn.Module) -> None:
    """Compile each repeated block by itself: one compilation serves all, and names of weights stay as they are."""
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:  # type: ignore[operator]
            module.compile()
