"""MAGVIT-v2's image tokenizer as Show-o and MMaDA have it: convolutions around a quantiser without a table.

Each of the D features of a latent vector is one bit, its sign; a code is the D bits, the first the most significant.
Zero is the bit 0. Two losses teach it: vectors shall lie near the corners of the cube (commitment), and each bit shall
be sure for each position but even over all of them (entropy).

Sources: Yu et al., arXiv:2310.05737 (lookup-free quantisation); code showlab/Show-o and Gen-Verse/MMaDA
(models/modeling_magvitv2.py). Their config.json tells no sizes: what is not there is as published, 13 bits, stride 16.
Shapes: B pictures, D bits, rows x cols codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmllm.config import to_dict
from dmllm.models.image_tokenizers.convolution import ConvolutionConfig, Decoder, Encoder
from dmllm.models.image_tokenizers.tokenizer import ImageTokenizer, Quantised
from dmllm.registry import nearest

# where the decoder's sizes differ from the encoder's
DECODER: dict[str, Any] = {"ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": (4, 4, 3, 4, 3)}


@dataclass(frozen=True, kw_only=True)
class LookupFreeConfig:
    """The quantiser."""

    codebook_dim: int = 13
    """Bits of a code."""
    beta: float = 0.25
    """Part of the commitment loss that, in its table-bound ancestor, moved the table; here it adds to its size only."""
    commit_loss_multiplier: float = 0.1
    """Coefficient of the commitment loss."""
    entropy_multiplier: float = 0.1
    """Coefficient of the entropy loss."""


@dataclass(frozen=True, kw_only=True)
class MagvitV2Config:
    """Two nets and a quantiser."""

    encoder: ConvolutionConfig = field(default_factory=ConvolutionConfig)
    """Pixels to vectors."""
    decoder: ConvolutionConfig = field(default_factory=lambda: ConvolutionConfig(**DECODER))
    """Vectors to pixels."""
    quantize: LookupFreeConfig = field(default_factory=LookupFreeConfig)
    """Vectors to codes."""
    num_groups: int = 32
    """Groups of channels that are normalised together."""

    def __post_init__(self) -> None:
        bits = {self.encoder.z_channels, self.decoder.z_channels, self.quantize.codebook_dim}
        if len(bits) != 1:
            raise ValueError(
                f"encoder.z_channels={self.encoder.z_channels}, decoder.z_channels={self.decoder.z_channels} and "
                f"quantize.codebook_dim={self.quantize.codebook_dim} are one number: the bits of a code."
            )
        if len(self.encoder.ch_mult) != len(self.decoder.ch_mult):
            raise ValueError(
                f"encoder.ch_mult={self.encoder.ch_mult} and decoder.ch_mult={self.decoder.ch_mult} differ in their "
                "levels, so that a picture would come back in another size."
            )


class LookupFree(nn.Module):
    """Signs as codes."""

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, config: LookupFreeConfig):
        super().__init__()
        self.config = config
        powers = 2 ** torch.arange(config.codebook_dim - 1, -1, -1)
        codes = torch.arange(2**config.codebook_dim)
        # both follow from the number of bits, and are in the authors' files nevertheless
        self.register_buffer("power_vals", powers)
        self.register_buffer("embedding", ((codes[:, None] & powers) > 0).float() * 2 - 1)

    def forward(self, latents: Tensor) -> Quantised:
        """[B, D, rows, cols] to corners of the cube, with losses `commitment` and `entropy`."""
        signs = torch.where(latents > 0, 1.0, -1.0).to(latents.dtype)
        distance = F.mse_loss(latents, signs)
        # the second term's gradient is that of the identity: it pulls nowhere
        straight = latents + (signs - latents).detach()
        commitment = distance + self.config.beta * F.mse_loss(straight, latents.detach())
        return Quantised(
            latents=straight,
            codes=self.codes(latents),
            losses={
                "commitment": commitment * self.config.commit_loss_multiplier,
                "entropy": bit_entropy(latents) * self.config.entropy_multiplier,
            },
        )

    def codes(self, latents: Tensor) -> Tensor:
        """[B, D, rows, cols] -> [B, rows, cols] int64."""
        return ((latents > 0) * self.power_vals[:, None, None]).sum(1)

    def vectors(self, codes: Tensor) -> Tensor:
        """[B, rows, cols] -> [B, D, rows, cols], each -1 or 1."""
        return self.embedding[codes].movedim(-1, 1).contiguous()


def bit_entropy(latents: Tensor) -> Tensor:
    """How unsure bits are, minus how unsure their means over all positions are, in nats: the mean over bits.

    A bit's probability falls with the squared distance to -1 and to 1, so its log-odds are four times the feature.
    """
    sure = F.logsigmoid(4 * latents), F.logsigmoid(-4 * latents)
    each = -sum(log.exp() * log for log in sure)
    mean = torch.sigmoid(4 * latents).mean((0, 2, 3))
    overall = -(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean))
    return torch.as_tensor(each).mean() - overall.mean()


class MagvitV2(ImageTokenizer):
    """Keys of the weights are the authors'."""

    rounds = False

    def __init__(self, config: MagvitV2Config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, config.num_groups)
        self.quantize = LookupFree(config.quantize)
        self.decoder = Decoder(config.decoder, config.num_groups)
        self.num_codes = 2**config.quantize.codebook_dim
        self.stride = 2 ** (len(config.encoder.ch_mult) - 1)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> MagvitV2:
        """Sizes that `fields` does not tell are as published."""
        given = {name: value for name, value in fields.items() if not name.startswith("_")}
        parts = {
            "encoder": ConvolutionConfig(**_known(ConvolutionConfig, given.pop("encoder", {}), "encoder")),
            "decoder": ConvolutionConfig(
                **{**DECODER, **_known(ConvolutionConfig, given.pop("decoder", {}), "decoder")}
            ),
            "quantize": LookupFreeConfig(**_known(LookupFreeConfig, given.pop("quantize", {}), "quantize")),
        }
        return cls(MagvitV2Config(**parts, **_known(MagvitV2Config, given, "magvit_v2")))

    def fields(self) -> dict[str, Any]:
        return to_dict(self.config)

    def to_latents(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)

    def quantise(self, latents: Tensor) -> Quantised:
        return self.quantize(latents)

    def from_codes(self, codes: Tensor) -> Tensor:
        return self.quantize.vectors(codes)

    def to_pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


def _known(kind: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = [f.name for f in fields(kind)]
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has no field {name!r}; {nearest(name, known)}")
    return dict(given)
