"""The convolutional encoder and decoder of VQGAN, which MAGVIT-v2's image tokenizer in Show-o and MMaDA consists of.

Each level has residual blocks and, but for the last, halves the sides; behind the last stand a block, attention over
all positions and a block. The decoder is the mirror image.
Source: Esser et al., arXiv:2012.09841. Names of weights are those of its code, CompVis/taming-transformers.
Shapes: B pictures, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ConvolutionConfig:
    """One of the two nets; field names are the authors'."""

    ch: int = 128
    """Channels that `ch_mult` multiplies."""
    ch_mult: tuple[int, ...] = (1, 2, 2, 4, 4)
    """Channels of each level, from the full size on; there is one halving less than there are levels."""
    num_res_blocks: tuple[int, ...] | int = (4, 3, 4, 3, 4)
    """Residual blocks of each level; one number is that of all."""
    attn_resolutions: tuple[int, ...] = ()
    """Sides, of a picture of `resolution` pixels, at which each residual block has attention behind it."""
    dropout: float = 0.0
    """Share of features that a residual block drops while training."""
    in_ch: int = 3
    """Channels of what the encoder reads."""
    out_ch: int = 3
    """Channels of what the decoder draws."""
    resolution: int = 256
    """Side of the pictures that `attn_resolutions` counts on; others work as well."""
    z_channels: int = 13
    """Features of a latent vector."""
    double_z: bool = False
    """Mean and variance in place of one vector; no quantiser takes them."""

    def __post_init__(self) -> None:
        blocks = self.num_res_blocks
        blocks = (blocks,) * len(self.ch_mult) if isinstance(blocks, int) else tuple(blocks)
        for name, value in (("num_res_blocks", blocks), *((n, tuple(getattr(self, n))) for n in TUPLES)):
            object.__setattr__(self, name, value)
        if len(blocks) != len(self.ch_mult):
            raise ValueError(f"num_res_blocks={blocks} and ch_mult={self.ch_mult} differ in their number of levels.")
        if self.double_z:
            raise ValueError("double_z=True makes means and variances, which have no codes; set double_z=False.")

    @property
    def levels(self) -> list[tuple[int, int, bool]]:
        """(channels, residual blocks, whether they have attention) of each level."""
        assert isinstance(self.num_res_blocks, tuple)
        pairs = zip(self.ch_mult, self.num_res_blocks, strict=True)
        return [(self.ch * m, n, self.resolution // 2**i in self.attn_resolutions) for i, (m, n) in enumerate(pairs)]


TUPLES = ("ch_mult", "attn_resolutions")


class Encoder(nn.Module):
    """Pixels [B, in_ch, H, W] -> [B, z_channels, H / 2^k, W / 2^k] for k + 1 levels."""

    def __init__(self, config: ConvolutionConfig, num_groups: int = 32):
        super().__init__()
        self.conv_in = nn.Conv2d(config.in_ch, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.ch
        for channels, blocks, attention in config.levels:
            level = Level(width, channels, blocks, attention, config.dropout, num_groups)
            if len(self.down) + 1 < len(config.levels):
                level.downsample = Downsample(channels)
            self.down.append(level)
            width = channels
        self.mid = Middle(width, config.dropout, num_groups)
        self.norm_out = norm(width, num_groups)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    """Vectors [B, z_channels, h, w] -> pixels [B, out_ch, h * 2^k, w * 2^k] for k + 1 levels."""

    def __init__(self, config: ConvolutionConfig, num_groups: int = 32):
        super().__init__()
        width = config.ch * config.ch_mult[-1]
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(width, config.dropout, num_groups)
        levels: list[Level] = []
        for channels, blocks, attention in reversed(config.levels):
            level = Level(width, channels, blocks, attention, config.dropout, num_groups)
            if len(levels) + 1 < len(config.levels):
                level.upsample = Upsample(channels)
            levels.append(level)
            width = channels
        self.up = nn.ModuleList(reversed(levels))  # names count from the full size on
        self.norm_out = norm(width, num_groups)
        self.conv_out = nn.Conv2d(width, config.out_ch, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(latents)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks at one size, and the step to the next size, if there is one."""

    def __init__(self, width: int, channels: int, blocks: int, attention: bool, dropout: float, num_groups: int):
        super().__init__()
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None
        widths = [width] + [channels] * (blocks - 1)
        self.block = nn.ModuleList(Residual(w, channels, dropout, num_groups) for w in widths)
        self.attn = nn.ModuleList(Attention(channels, num_groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        step = self.downsample or self.upsample
        return step(x) if step is not None else x


class Middle(nn.Module):
    """Two blocks around attention, at the smallest size."""

    def __init__(self, channels: int, dropout: float, num_groups: int):
        super().__init__()
        self.block_1 = Residual(channels, channels, dropout, num_groups)
        self.attn_1 = Attention(channels, num_groups)
        self.block_2 = Residual(channels, channels, dropout, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Residual(nn.Module):
    """Twice norm, SiLU and convolution, added to what came in."""

    def __init__(self, width: int, channels: int, dropout: float, num_groups: int):
        super().__init__()
        self.norm1 = norm(width, num_groups)
        self.conv1 = nn.Conv2d(width, channels, 3, padding=1)
        self.norm2 = norm(channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, channels, 1) if width != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """Each position sees all others, with one head."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = norm(channels, num_groups)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, HW, C]
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(seen.reshape(x.shape))


class Downsample(nn.Module):
    """Half the sides; the window reaches one pixel over the right and lower edges only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the sides: each pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def norm(channels: int, num_groups: int) -> nn.GroupNorm:
    """Raises ValueError where the channels are no whole number of groups."""
    if channels % num_groups:
        raise ValueError(f"{channels} channels cannot be normalised in num_groups={num_groups}; use a divisor.")
    return nn.GroupNorm(num_groups, channels, eps=1e-6)
