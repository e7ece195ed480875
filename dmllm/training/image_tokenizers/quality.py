"""How good a tokenizer is: how much of a picture comes back, and how many of its codes are in use.

PSNR: 10 log10(255^2 / mean squared difference), in dB, the mean over pictures. SSIM: Wang et al., 2004, with their
Gaussian window of 11 pixels where it fits, the mean over channels and places; 1 is the same picture. Both are of what
`decode` draws, uint8. Perplexity is the number of codes that, equally often used, would have the entropy found.
Shapes: B pictures of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dmllm.models.image_tokenizers import ImageTokenizer

WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
HIGHEST = 100.0  # dB, of a picture that comes back to the bit
SHOWN, SMALLEST = 12, 128  # pictures that are drawn, and their least side in pixels


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What was measured, on how much."""

    psnr: float  # dB
    ssim: float
    codes_used: float  # share of the codes that occur at all
    perplexity: float  # of num_codes
    num_codes: int
    num_pictures: int
    num_counted: int  # codes that were counted: of less than several times num_codes, codes_used says little

    def line(self) -> str:
        """In words."""
        return (
            f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}, {self.codes_used:.1%} of {self.num_codes} codes used "
            f"(perplexity {self.perplexity:.0f}) in {self.num_pictures} pictures of {self.num_counted} codes together"
        )


@torch.no_grad()
def measure(tokenizer: ImageTokenizer, batches: Iterable[Tensor]) -> Quality:
    """The quality on batches of uint8 pictures [B, 3, H, W]; the tokenizer is to be in evaluation mode."""
    counts = torch.zeros(tokenizer.num_codes, dtype=torch.int64)
    ratios, similarities = [], []
    for pixels in batches:
        codes = tokenizer.encode(pixels)
        drawn = tokenizer.decode(codes).cpu()
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        ratios.append(psnr(drawn, pixels))
        similarities.append(ssim(drawn, pixels))
    shares = counts.double() / counts.sum()
    return Quality(
        psnr=float(torch.cat(ratios).mean()),
        ssim=float(torch.cat(similarities).mean()),
        codes_used=float((counts > 0).double().mean()),
        perplexity=float(torch.exp(-torch.xlogy(shares, shares).sum())),
        num_codes=len(counts),
        num_pictures=sum(map(len, ratios)),
        num_counted=int(counts.sum()),
    )


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """In dB, of each picture [B], at most `HIGHEST`; uint8 [B, 3, H, W]."""
    error = (found.double() - wanted.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(255**2 / error)).clamp(max=HIGHEST)


def ssim(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each picture [B]; uint8 [B, 3, H, W]. Raises ValueError for pictures smaller than the window."""
    if min(found.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM looks at windows of {WINDOW} pixels; the pictures have {list(found.shape[2:])}.")
    line = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2).double() ** 2) / (2 * SIGMA**2))
    window = torch.outer(line, line) / line.sum() ** 2
    x, y = found.double(), wanted.double()
    stacked = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]  # [5 * B * 3, 1, H, W]
    means = F.conv2d(stacked, window[None, None]).unflatten(0, (5, len(found), 3)).squeeze(3)
    mx, my, xx, yy, xy = means
    like = (2 * mx * my + C1) * (2 * (xy - mx * my) + C2)
    unlike = (mx**2 + my**2 + C1) * (xx - mx**2 + yy - my**2 + C2)
    return (like / unlike).mean((1, 2, 3))


@torch.no_grad()
def draw_reconstructions(tokenizer: ImageTokenizer, pixels: Tensor) -> Image.Image:
    """The first pictures [B, 3, H, W] above what comes back of them, enlarged pixel by pixel where they are small."""
    pixels = pixels[:SHOWN]
    rows = [pixels, tokenizer.decode(tokenizer.encode(pixels)).cpu()]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # [3, 2 H, B W]
    scale = max(1, -(-SMALLEST // min(pixels.shape[2:])))
    large = np.asarray(sheet.movedim(0, -1)).repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(large)
