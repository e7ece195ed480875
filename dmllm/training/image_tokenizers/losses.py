"""What an image tokenizer is taught by: the difference to the picture, as pixels, as a network sees it, and as a
discriminator of patches tells it.

Sources: LPIPS, Zhang et al., arXiv:1801.03924; patches, Isola et al., arXiv:1611.07004; hinge, as in VQGAN, Esser et
al., arXiv:2012.09841, whose weight that follows the gradients is a plain coefficient here.
Shapes: B pictures of H x W pixels, from -1 to 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dmllm.training.image_tokenizers.config import LossesConfig


class Discriminator(nn.Module):
    """Whether each patch of a picture is a real one's: [B, 3, H, W] -> scores [B, 1, h, w], high for real."""

    def __init__(self, channels: int, layers: int, num_groups: int = 8):
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, layers + 1):
            wide = channels * min(2**index, 8)
            before = channels * min(2 ** (index - 1), 8)
            parts += [
                nn.Conv2d(before, wide, 4, stride=2 if index < layers else 1, padding=1),
                nn.GroupNorm(num_groups, wide),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(channels * min(2**layers, 8), 1, 4, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)

    def loss(self, real: Tensor, drawn: Tensor) -> Tensor:
        """Its own: hinge, 1 where it knows nothing and 0 where it is sure and right."""
        return (F.relu(1 - self(real)).mean() + F.relu(1 + self(drawn)).mean()) / 2


class Perceptual(nn.Module):
    """LPIPS with VGG-16, frozen: [B, 3, H, W] twice -> a scalar. Not a part of what is trained or saved."""

    def __init__(self, weights: str):
        """Raises FileNotFoundError, ImportError or ValueError: no such file, no `lpips`, or other weights in it."""
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                f"losses.perceptual needs lpips ({error}); install it with: pip install 'dmllm[perceptual]'"
            ) from error
        self.distance: Any = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        given, wanted = read_tensors(weights), self.distance.state_dict()
        found = {name: given.get(name, given.get(_published(name))) for name in wanted}
        # the few weights behind VGG come with the package
        lacking = [name for name, tensor in found.items() if tensor is None and name.startswith("net.")]
        if lacking:
            raise ValueError(
                f"{weights} is neither torchvision's VGG-16 nor LPIPS: it lacks {', '.join(lacking[:3])} "
                f"({len(lacking)} in all)."
            )
        self.distance.load_state_dict({n: wanted[n] if tensor is None else tensor for n, tensor in found.items()})

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        return self.distance(found, wanted).mean()


def read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file; nothing but tensors is read of the latter.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"losses.perceptual_weights={path}: there is no such file, seen from {Path.cwd()}.")
    if path.endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _published(name: str) -> str:
    """torchvision's name of a layer that LPIPS has in slices: net.slice2.5.weight is features.5.weight."""
    return "features." + ".".join(name.split(".")[2:])


def picture_losses(
    config: LossesConfig, found: Tensor, wanted: Tensor, perceptual: nn.Module | None
) -> dict[str, Tensor]:
    """The difference of two pictures by name, coefficients included."""
    losses = {}
    if config.l1:
        losses["l1"] = config.l1 * F.l1_loss(found, wanted)
    if config.l2:
        losses["l2"] = config.l2 * F.mse_loss(found, wanted)
    if perceptual is not None:
        losses["perceptual"] = config.perceptual * perceptual(found, wanted)
    return losses
