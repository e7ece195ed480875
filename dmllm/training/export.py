"""Writing the model as a Hugging Face folder, gathered first where processes share it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dmllm.checkpoints import folder
from dmllm.objectives import fitting_objective
from dmllm.training.assemble import Run
from dmllm.training.distributed import is_sharded
from dmllm.training.state import Progress


def save_model(run: Run, path: Path, progress: Progress) -> None:
    """The model as it now is; every process calls this."""
    model = run.core
    if is_sharded(model):
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if run.accelerator.is_main_process:
            with torch.device("meta"):
                model = type(model)(model.config)
            model.load_state_dict(weights, assign=True)
    if run.accelerator.is_main_process:
        dtype = getattr(torch, run.config.save_dtype) if run.config.save_dtype else None
        drawing = getattr(run.processor, "image_tokenizer", None)
        folder.save(path, model, run.processor, card=card(run, progress), dtype=dtype, image_tokenizer=drawing)
    run.accelerator.wait_for_everyone()


def card(run: Run, progress: Progress) -> str:
    """For the model card: what it was trained on, and for how long."""
    config = run.config
    data = config.data if isinstance(config.data, str) else ", ".join(entry.label for entry in config.data.datasets)
    average = f" The weights are a moving average (decay {config.ema})." if config.ema else ""
    objective = config.objective.name or fitting_objective(run.core.config.visibility)
    best = progress.best_step
    lowest = f" Lowest validation loss {progress.best_loss:.4f}, at step {best}." if best else ""
    return (
        f"Trained for {progress.step} steps of {config.batch_size} examples on {data}, objective "
        f"{objective}, seed {config.seed}.{lowest}{average}"
    )
