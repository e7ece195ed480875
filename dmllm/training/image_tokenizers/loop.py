"""Training an image tokenizer, step by step: draw pictures again from their codes, and move the weights.

Killed or stopped, a run continues from its newest checkpoint to the same weights to the bit (on a CPU).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmllm.checkpoints.image_tokenizer import load_image_tokenizer, save_image_tokenizer
from dmllm.models.image_tokenizers import ImageTokenizer, build_image_tokenizer
from dmllm.training.distributed import build_accelerator
from dmllm.training.ema import Ema
from dmllm.training.image_tokenizers.config import ImageTokenizerConfig
from dmllm.training.image_tokenizers.losses import Discriminator, Perceptual, picture_losses
from dmllm.training.image_tokenizers.pictures import find_pictures, held_out_batches, training_batches
from dmllm.training.image_tokenizers.quality import SHOWN, Quality, draw_reconstructions, measure
from dmllm.training.logging import Reporter
from dmllm.training.loop import stop_requests
from dmllm.training.optimiser import set_learning_rates
from dmllm.training.schedule import learning_rate_factor
from dmllm.training.state import Learned, Progress, load_checkpoint, newest_checkpoint, open_run, save_checkpoint

MEASURED_AT_ONCE = 64  # pictures


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a call of `train_image_tokenizer` has done."""

    folder: Path  # of the run
    model: Path | None  # the tokenizer's folder; None if the run was stopped before its end
    step: int
    quality: Quality | None  # on the held-out pictures, after the last step


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that the loop works with."""

    config: ImageTokenizerConfig
    accelerator: Accelerator
    folder: Path
    files: list[Path]
    held_out: list[Path]
    tokenizer: ImageTokenizer
    discriminator: Discriminator | None
    perceptual: nn.Module | None
    used: Tensor  # [num_codes], how often each code was chosen since rows were last revived
    learned: Learned


def train_image_tokenizer(config: ImageTokenizerConfig) -> Trained:
    """Train until the last step, or until stopped (Ctrl-C, SIGTERM); called again, continue.

    Raises:
        ValueError: the configuration fits neither the pictures nor the run that output_dir holds.
        FloatingPointError: the loss is no longer a finite number.
    """
    parts, progress = assemble(config)
    factor = learning_rate_factor(config.schedule, config.steps)
    report = Reporter(parts.folder, parts.accelerator, total=config.steps, start=progress.step)
    batches = training_batches(
        parts.files,
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        start=progress.step,
        steps=config.steps,
        num_workers=config.num_workers,
    )
    quality = None
    with report, stop_requests() as stopped:
        report.say(_start(parts, progress))
        sums, logged, since = {}, progress.step, time.monotonic()
        for step, pixels in enumerate(batches, start=progress.step):
            set_learning_rates(parts.learned.optimisers, factor(step))
            for name, value in training_step(parts, pixels, step).items():
                sums[name] = sums.get(name, 0.0) + value
            progress = replace(progress, step=step + 1, examples=progress.examples + len(pixels))
            last, stop = progress.step == config.steps, stopped()
            if last or stop or progress.step % config.log_every == 0:
                _log(report, progress, sums, progress.step - logged, factor(step) * config.lr, since, len(pixels))
                sums, logged, since = {}, progress.step, time.monotonic()
            if last or progress.step % config.measure_every == 0:
                quality = measure_held_out(parts, report, progress)
                since = time.monotonic()
            if last or stop or progress.step % config.save_every == 0:
                save_checkpoint(parts.folder, progress, parts.learned, parts.accelerator, config.keep)
            if stop and not last:
                break
        return _finish(parts, report, progress, quality)


def assemble(config: ImageTokenizerConfig) -> tuple[Parts, Progress]:
    """Everything in its place, and how far the run is. Raises as `train_image_tokenizer`."""
    accelerator = build_accelerator(config.precision, trackers=[], folder=config.output_dir)
    if accelerator.num_processes > 1:
        raise ValueError("An image tokenizer is trained in one process; start it without torchrun.")
    torch.manual_seed(config.seed)
    if config.tokenizer.start_from:
        tokenizer = load_image_tokenizer(config.tokenizer.start_from)
    else:
        tokenizer = build_image_tokenizer(config.tokenizer.name, config.tokenizer.options)
    if config.revive_every and not hasattr(tokenizer, "revive"):
        raise ValueError(f"revive_every={config.revive_every}: this tokenizer has no table to revive rows of; set 0.")
    if any(side % tokenizer.stride for side in config.data.sides):
        raise ValueError(f"data.size={config.data.size} is no multiple of the tokenizer's {tokenizer.stride} pixels.")
    losses, device = config.losses, accelerator.device
    perceptual = Perceptual(losses.perceptual_weights or "").to(device) if losses.perceptual else None
    folder = open_run(config, accelerator)
    files, held_out = find_pictures(config.data, folder / "pictures")
    learning = nn.ModuleDict({"tokenizer": tokenizer})
    if losses.adversarial:
        learning["discriminator"] = Discriminator(losses.discriminator_channels, losses.discriminator_layers)
    learning.register_buffer("used", torch.zeros(tokenizer.num_codes, dtype=torch.int64))
    learning.to(device).train()
    discriminator: Any = learning["discriminator"] if losses.adversarial else None
    optimisers = {"adamw": _adamw(tokenizer, config, config.lr)}
    if discriminator is not None:
        optimisers["discriminator"] = _adamw(discriminator, config, losses.discriminator_lr)
    learned = Learned(model=learning, optimisers=optimisers, ema=Ema(learning, config.ema) if config.ema else None)
    newest = newest_checkpoint(folder)
    progress = load_checkpoint(newest, learned) if newest else Progress()
    parts = Parts(
        config=config,
        accelerator=accelerator,
        folder=folder,
        files=files,
        held_out=held_out,
        tokenizer=tokenizer,
        discriminator=discriminator,
        perceptual=perceptual,
        used=learning.get_buffer("used"),
        learned=learned,
    )
    return parts, progress


def training_step(parts: Parts, pixel_values: Tensor, step: int) -> dict[str, Tensor]:
    """Move the weights once on uint8 [B, 3, H, W]. Returns the losses by name, and the gradient's norm."""
    config, tokenizer = parts.config, parts.tokenizer
    torch.manual_seed(config.seed + 1_000_003 * step)  # for dropout, where a tokenizer has it
    pixels = tokenizer.normalise(pixel_values)
    with parts.accelerator.autocast():
        drawn, quantised = tokenizer(pixels)
        found, wanted = _spread(tokenizer, drawn.float()), _spread(tokenizer, pixels)
        losses = picture_losses(config.losses, found, wanted, parts.perceptual)
        losses |= {name: config.losses.quantiser * loss for name, loss in quantised.losses.items()}
        if parts.discriminator is not None and step >= config.losses.adversarial_start:
            parts.discriminator.requires_grad_(False)
            losses["adversarial"] = -config.losses.adversarial * parts.discriminator(found).mean()
    norm = _move(parts, "adamw", tokenizer, torch.stack([*losses.values()]).sum())
    if parts.discriminator is not None:
        parts.discriminator.requires_grad_(True)
        with parts.accelerator.autocast():
            judged = parts.discriminator.loss(wanted, found.detach())
        _move(parts, "discriminator", parts.discriminator, judged)
        losses["discriminator"] = judged
    if parts.learned.ema is not None:
        parts.learned.ema.update(step)
    if config.revive_every:
        _revive(parts, quantised.codes, pixels, step)
    return {**{name: loss.detach() for name, loss in losses.items()}, "grad_norm": norm}


def measure_held_out(parts: Parts, report: Reporter, progress: Progress) -> Quality:
    """Quality to quality.json and metrics.jsonl, reconstructions to reconstructions.png."""
    with _evaluating(parts):
        batches = held_out_batches(parts.held_out, parts.config.data, MEASURED_AT_ONCE)
        quality = measure(parts.tokenizer, batches)
        shown = next(held_out_batches(parts.held_out, parts.config.data, SHOWN))
        draw_reconstructions(parts.tokenizer, shown).save(parts.folder / "reconstructions.png")
    report.write(progress.step, **asdict(quality))
    report.say(f"step {progress.step}: {quality.line()}")
    text = json.dumps({"step": progress.step, **asdict(quality)}, indent=2)
    (parts.folder / "quality.json").write_text(text + "\n", encoding="utf-8")
    return quality


def _finish(parts: Parts, report: Reporter, progress: Progress, quality: Quality | None) -> Trained:
    if progress.step < parts.config.steps:
        report.say(f"Stopped after step {progress.step} of {parts.config.steps}; the same command continues.")
        return Trained(folder=parts.folder, model=None, step=progress.step, quality=quality)
    quality = quality or measure_held_out(parts, report, progress)
    with _evaluating(parts):
        model = save_image_tokenizer(parts.tokenizer, parts.folder / "model")
    report.say(f"Done: {model}")
    return Trained(folder=parts.folder, model=model, step=progress.step, quality=quality)


def _move(parts: Parts, kind: str, module: nn.Module, loss: Tensor) -> Tensor:
    """One step of an optimiser down a loss. Returns the gradient's norm."""
    parts.accelerator.backward(loss)
    norm = nn.utils.clip_grad_norm_(module.parameters(), parts.config.clip_norm or math.inf)
    optimiser = parts.learned.optimisers[kind]
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def _revive(parts: Parts, codes: Tensor, pixels: Tensor, step: int) -> None:
    """Count what was chosen; at the end of a period, move what was not."""
    parts.used.add_(torch.bincount(codes.flatten(), minlength=len(parts.used)))
    if (step + 1) % parts.config.revive_every:
        return
    tokenizer: Any = parts.tokenizer
    generator = torch.Generator().manual_seed(parts.config.seed + step)
    tokenizer.revive((parts.used == 0).nonzero()[:, 0], tokenizer.to_latents(pixels), generator)
    parts.used.zero_()


def _spread(tokenizer: ImageTokenizer, pixels: Tensor) -> Tensor:
    """From the tokenizer's range to -1 .. 1, so that losses are the same for all."""
    low, high = tokenizer.pixel_range
    return (pixels - low) * (2 / (high - low)) - 1


def _adamw(module: nn.Module, config: ImageTokenizerConfig, lr: float) -> torch.optim.Optimizer:
    decay = [p for p in module.parameters() if p.ndim > 1]
    keep = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": amount}
        for parameters, amount in ((decay, config.weight_decay), (keep, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas)


@contextmanager
def _evaluating(parts: Parts) -> Iterator[None]:
    """Within, the tokenizer holds the averages and is in evaluation mode."""
    averages: AbstractContextManager = parts.learned.ema.applied() if parts.learned.ema else nullcontext()
    parts.tokenizer.eval()
    with averages:
        yield
    parts.tokenizer.train()


def _log(
    report: Reporter, progress: Progress, sums: dict[str, Any], steps: int, lr: float, since: float, batch: int
) -> None:
    means = {name: float(total) / steps for name, total in sums.items()}
    norm, judged = means.pop("grad_norm"), means.pop("discriminator", None)
    loss = sum(means.values())
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(
            f"The loss is {loss} and the gradient's norm {norm} around step {progress.step}; try a lower --lr."
        )
    rate = steps * batch / max(time.monotonic() - since, 1e-9)
    further = {**means, **({} if judged is None else {"discriminator": judged})}
    report.write(progress.step, loss=loss, **further, grad_norm=norm, lr=lr, examples_per_second=rate)
    report.progress(progress.step, loss, rate)


def _start(parts: Parts, progress: Progress) -> str:
    tokenizer, size = parts.tokenizer, sum(p.numel() for p in parts.tokenizer.parameters())
    rows, cols = (side // tokenizer.stride for side in parts.config.data.sides)
    said = (
        f"{parts.folder}: {size / 1e6:.2f}M parameters, {rows}x{cols} of {tokenizer.num_codes} codes a picture, "
        f"{len(parts.files)} pictures to learn from and {len(parts.held_out)} held out, {parts.config.steps} steps of "
        f"{parts.config.batch_size} on {parts.accelerator.device}"
    )
    return said + (f", continuing after step {progress.step}" if progress.step else "")
