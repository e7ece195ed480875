"""What a run that trains an image tokenizer is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dmllm.training.config import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A new tokenizer, or one to go on with."""

    name: str = "fsq"
    """fsq, magvit_v2 or vq; or the path of your own: package.module:CLASS."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its own fields, e.g. {levels: [8, 5, 5, 5], channels: [64, 128]} for fsq; see dmllm.models.image_tokenizers."""
    start_from: str | None = None
    """Folder of a tokenizer whose weights, name and options are taken instead."""


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """What it sees."""

    path: str
    """A folder, searched for pictures at every depth; or a built-in data set: scenes, digits."""
    num: int = 10_000
    """Pictures made of a built-in data set; a folder is used as it is."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the built-in data set, e.g. {reading: 0}."""
    held_out: int = 512
    """Pictures that quality is measured on and nothing is learned from: of a folder at most a tenth, always the same;
    of a built-in data set its own split."""
    size: int | tuple[int, int] = 64
    """Side, or (height, width), in pixels: pictures are made so large that they cover it, and cut."""
    augment: bool = False
    """Cut at random places, and mirror every second picture."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.held_out < 1:
            raise ValueError(f"data.num={self.num} and data.held_out={self.held_out} must be positive.")

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """The coefficient of each loss; 0 leaves it out. Differences are between pixels from -1 to 1."""

    l1: float = 0.0
    """Mean absolute difference: it lets go of what is rare, and draws the rest the sharper for it."""
    l2: float = 1.0
    """Mean squared difference, which is what PSNR counts, and the faster beginning."""
    quantiser: float = 1.0
    """Of all losses of the quantiser together, which have coefficients of their own; fsq has none."""
    perceptual: float = 0.0
    """LPIPS (arXiv:1801.03924) with VGG-16; needs `perceptual_weights`. 1 is usual."""
    perceptual_weights: str | None = None
    """File with torchvision's VGG-16 (vgg16-397923af.pth, or its tensors as safetensors), or with all of LPIPS."""
    adversarial: float = 0.0
    """What the tokenizer loses where a discriminator of patches is not deceived (hinge). 0.1 is a beginning."""
    adversarial_start: int = 0
    """Step from which the discriminator has a say; it learns from the first."""
    discriminator_channels: int = 64
    """Channels of the discriminator's first layer, doubled in each that follows."""
    discriminator_layers: int = 3
    """Its layers that halve the sides: a patch of 3 is 70 pixels wide, of 2 34."""
    discriminator_lr: float = 2e-4
    """Its peak learning rate."""

    def __post_init__(self) -> None:
        if min(self.l1, self.l2, self.quantiser, self.perceptual, self.adversarial) < 0:
            raise ValueError("Coefficients of losses must not be negative.")
        if not (self.l1 or self.l2):
            raise ValueError("losses.l1 and losses.l2 are both 0, so nothing says what the picture is; set one.")
        if self.perceptual and not self.perceptual_weights:
            raise ValueError(
                "losses.perceptual needs a network's weights: --losses.perceptual_weights=vgg16-397923af.pth "
                "(https://download.pytorch.org/models/vgg16-397923af.pth), or set losses.perceptual=0."
            )


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
    """One run. Two fields have no default: where it is written and what it sees."""

    output_dir: str
    """Folder of the run: config.yaml, metrics.jsonl, quality.json, reconstructions.png, checkpoints/, model/."""
    data: PicturesConfig
    """The pictures."""
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    """What is trained."""
    losses: LossesConfig = field(default_factory=LossesConfig)
    """What it is taught by."""
    seed: int = 0
    """Keys new weights and the order of the pictures."""
    steps: int = 5000
    """Steps of the optimiser."""
    batch_size: int = 32
    """Pictures of a step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; 1e-4 for nets as large as the published ones."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averaging of gradients and of their squares."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices and kernels."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient; 0: not clipped."""
    ema: float = 0.999
    """Decay of the moving average of the weights that is measured and saved; 0: off, the weights themselves are."""
    revive_every: int = 0
    """vq: steps after which table rows that no picture chose are moved to where latent vectors are; 0: never."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights stay float32."""
    num_workers: int = 0
    """Processes that read pictures; 0: the training process itself does."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    measure_every: int = 1000
    """Steps between measurements on the held-out pictures; the last step is always measured."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 1
    """How many of the newest checkpoints stay."""
    resume: Literal["auto", "changed", "never"] = "auto"
    """auto: continue what output_dir holds if its configuration is the same, else refuse. changed: continue with this
    configuration. never: start over; the old folder is kept under another name."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "measure_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in [0, 1); 0.999 is usual, 0 switches it off.")
