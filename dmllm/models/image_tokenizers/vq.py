"""Vector quantisation as `VQModel` of diffusers: the tokenizers of Lumina-DiMOO, Meissonic and LaViDa-O.

The nearest row of a learned table is a vector's code. Nets, table and losses are diffusers'; pictures lie in [0, 1], as
these models have them (`do_normalize=False`), and what is drawn is rounded.
Source: van den Oord et al., arXiv:1711.00937; https://github.com/huggingface/diffusers.
Shapes: B pictures, D features, rows x cols codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmllm.models.image_tokenizers.tokenizer import ImageTokenizer, Quantised
from dmllm.registry import nearest


class VectorQuantised(ImageTokenizer):
    """diffusers' VQModel; keys of the weights are its own."""

    pixel_range = (0.0, 1.0)

    def __init__(self, **fields: Any):
        super().__init__()
        inner: Any = library()(**fields)
        self.config = inner.config
        self.encoder, self.quant_conv, self.quantize = inner.encoder, inner.quant_conv, inner.quantize
        self.post_quant_conv, self.decoder = inner.post_quant_conv, inner.decoder
        self.num_codes = self.config.num_vq_embeddings
        self.stride = 2 ** (len(self.config.block_out_channels) - 1)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> VectorQuantised:
        """The fields of diffusers' own config.json; names that begin with "_" are its notes."""
        given = {name: value for name, value in fields.items() if not name.startswith("_")}
        known = list(inspect.signature(library().__init__).parameters)[1:]
        for name in given:
            if name not in known:
                raise ValueError(f"VQModel has no field {name!r}; {nearest(name, known)}")
        return cls(**given)

    def fields(self) -> dict[str, Any]:
        return {"_class_name": "VQModel", **{k: v for k, v in dict(self.config).items() if not k.startswith("_")}}

    def to_latents(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels))

    def quantise(self, latents: Tensor) -> Quantised:
        """The nearest rows of the table; the loss `codebook` pulls each towards the other (weights 1 and 0.25)."""
        chosen, loss, (_, _, codes) = self.quantize(latents)
        shape = (latents.shape[0], *latents.shape[2:])
        return Quantised(latents=chosen, codes=codes.view(shape), losses={"codebook": loss})

    def from_codes(self, codes: Tensor) -> Tensor:
        return self.quantize.embedding(codes).movedim(-1, 1).contiguous()

    def to_pixels(self, latents: Tensor) -> Tensor:
        spatial = latents if self.config.norm_type == "spatial" else None
        return self.decoder(self.post_quant_conv(latents), spatial)

    @torch.no_grad()
    def revive(self, codes: Tensor, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Give table rows that nothing is near to a place where something is: a latent vector drawn at random.

        Args:
            codes: [N] the rows to be moved.
            latents: [B, D, rows, cols] what they are drawn from.
        """
        vectors = latents.movedim(1, -1).flatten(0, 2)
        drawn = torch.randint(len(vectors), (len(codes),), generator=generator)
        self.quantize.embedding.weight[codes] = vectors[drawn.to(vectors.device)].to(self.quantize.embedding.weight)


def library() -> Any:
    """diffusers' VQModel. Raises ImportError that says what to install."""
    try:
        from diffusers.models.autoencoders.vq_model import VQModel
    except (ImportError, RuntimeError) as error:  # diffusers raises RuntimeError where one of its own imports fails
        raise ImportError(
            f"diffusers, which has the image tokenizer VQModel, cannot be imported ({error}); install it with: "
            "pip install 'dmllm[diffusers]'"
        ) from error
    return VQModel
