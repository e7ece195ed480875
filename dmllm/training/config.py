"""What a training run is told: one frozen dataclass, filled from YAML and `--a.b=c`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dmllm.checkpoints.compose import ModelSpec
from dmllm.data.mixture import DataConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned, by name."""

    name: str | None = None
    """A name of `objectives.OBJECTIVES` (masked, block, autoregressive, mlm, permutation, uniform, ...), or the path of
    your own: package.module:PAIR; null is block or permutation for a model of such a visibility, else masked."""
    options: dict[str, Any] = field(default_factory=dict)
    """The objective's own fields, e.g. those of `objectives.masked.MaskedConfig`."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Whether one part of the model learns, and how fast."""

    learn: bool = True
    """False: the part is frozen; it costs no gradient and no optimiser state."""
    lr: float | None = None
    """The part's own peak learning rate in place of `optimiser.lr` (Muon's rate is scaled by the same ratio)."""
    lr_scale: float = 1.0
    """Multiplies the learning rates instead; LLaDA-V trains its vision tower at 0.2 times the rest."""

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr_scale != 1.0:
            raise ValueError(f"lr={self.lr} and lr_scale={self.lr_scale} both set one part's rate; keep one of them.")


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """The parts of the model. LLaVA's projector stage: vision and backbone with `learn: false`."""

    vision: PartConfig = field(default_factory=PartConfig)
    """The vision encoder."""
    projector: PartConfig = field(default_factory=PartConfig)
    """The projector, and the row-break vector of tiled images."""
    backbone: PartConfig = field(default_factory=PartConfig)
    """The transformer with its embeddings and vocabulary projection."""


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """How weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: torch.optim.Muon for the hidden matrices and AdamW for the rest."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices, AdamW's and Muon's; norms, biases and vectors never decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging of gradients and of their squares."""
    eps: float = 1e-8
    """Added to AdamW's root."""
    muon_lr: float = 0.01
    """Peak learning rate of Muon; the size of an update is then independent of the gradient's size."""
    muon_momentum: float = 0.95
    """Muon's averaging of gradients (Nesterov)."""
    muon_adjust: Literal["original", "match_rms_adamw"] = "original"
    """How Muon's rate depends on a matrix's shape: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)), with
    which AdamW's learning rates carry over (arXiv:2502.16982)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a multiple of its peak."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine; wsd: warm up, stay, decay at the end; constant: warm up and stay."""
    warmup: float = 0.03
    """Steps of linear warm-up; below 1, a fraction of all steps."""
    decay: float = 0.2
    """wsd: steps of decay at the end; below 1, a fraction of all steps. The others do not read it."""
    min_ratio: float = 0.0
    """The multiple that cosine and wsd end at."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss with fixed draws, so that curves are smooth and comparable."""

    data: str | DataConfig
    """As the training data: a YAML file, or its content."""
    num_examples: int = 256
    """The first so many examples of the mixture, always the same."""
    every: int = 500
    """Steps between validations; the last step is always validated."""


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Answers written to samples.jsonl while training."""

    every: int = 0
    """Steps between sample answers; 0: none. Needs `validation`, whose first examples are asked."""
    num_examples: int = 4
    """How many examples are asked."""
    decode: dict[str, Any] = field(default_factory=dict)
    """Decode settings that replace the model's own, e.g. {steps: 8}."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Two fields have no default: where it is written and what it is trained on."""

    output_dir: str
    """Folder of the run: config.yaml, metrics.jsonl, loss.png, checkpoints/, best/, model/ (a Hugging Face folder)."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The parts the model is composed of, or the checkpoint it starts from."""
    data: str | DataConfig
    """Training data: a YAML file (`datasets: ...`), or its content."""
    validation: ValidationConfig | None = None
    """Held-out data; without it no validation loss and no best/."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Sample answers during training."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is learned."""
    seed: int = 0
    """Keys the data's order, every random draw, and new weights."""
    steps: int | None = None
    """Optimiser steps; give this or `epochs`."""
    epochs: float | None = None
    """Passes over the data, rounded up to whole steps; give this or `steps`."""
    batch_size: int = 64
    """Examples of one step, over all processes and micro-batches together."""
    micro_batch_size: int | None = None
    """Examples one process holds at once; None: all of its share. Changes memory and time, not the result (unless the
    processor fills rows up to the batch's length, `eos_padding: batch`)."""
    pad_to_multiple: int = 1
    """Rows are padded to a multiple of this length; 128 keeps `compile` and flex attention from compiling often."""
    parts: PartsConfig = field(default_factory=PartsConfig)
    """Which parts learn, and their learning rates."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """AdamW, or Muon with AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
    clip_norm: float = 1.0
    """Greatest norm of the whole gradient; 0: not clipped."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is validated and saved; 0: off, the weights themselves are."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; learning weights stay float32, frozen ones become bfloat16 where that loses nothing.
    fp32 on a GPU multiplies in TF32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each block of the backbone."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; on CPU runs are bit-equal without it."""
    num_workers: int = 0
    """Processes that read data; 0: the training process itself does."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; the loss is read from the device only then."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights in best/ and model/; None: as they are trained."""
    trackers: list[str] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio."""
    resume: Literal["auto", "changed", "never"] = "auto"
    """auto: continue what output_dir holds if its configuration is the same, else refuse. changed: continue with this
    configuration. never: start over; the old folder is kept under another name."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("Give exactly one of steps and epochs, e.g. --steps=1000.")
        positive = ("steps", "epochs", "batch_size", "micro_batch_size", "pad_to_multiple")
        for name in (*positive, "log_every", "save_every", "keep"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in [0, 1); 0.999 is usual, 0 switches it off.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")
        if self.samples.every and self.validation is None:
            raise ValueError("samples.every needs validation data to ask about; set --validation.data=FILE.yaml.")
        for part in ("vision", "projector", "backbone"):
            if getattr(self.parts, part).learn:
                return
        raise ValueError("No part learns; set one of parts.vision.learn, parts.projector.learn, parts.backbone.learn.")
