"""The architecture: text embeddings and projected image patches in one stream, a backbone, logits where asked for.

    pixels --vision--> patches --projector--> image rows --+
                                                           +--> stream --backbone--> hidden rows --unembed--> logits
    ids ----embed----> token rows -------------------------+

Aligned logits: `logits[:, i]` scores the token AT i. The vocabulary projection runs only on the rows asked for: with
126k rows of vocabulary it is the largest exact saving in training memory and in decoding.

Shapes: B rows, L stream rows, T image tiles, N rows of one tile, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from dmllm.models.backbones import BACKBONES
from dmllm.models.configuration import DmllmConfig
from dmllm.models.feedback import FEEDBACK, heard
from dmllm.models.heads import build_head
from dmllm.models.projectors import ProjectorConfig, build_projector, resize_maps
from dmllm.models.vision import VisionConfig, build_vision
from dmllm.nn.cache import KVCache
from dmllm.nn.rope import places
from dmllm.nn.visibility import Visibility, layout
from dmllm.tiling import TilingConfig
from dmllm.types import PADDING, ROW_BREAK, TEXT, Vocabulary


@dataclass
class MultimodalOutput(ModelOutput):
    """logits [B, L, V], or at the rows asked for, or a tuple of those of several parts; hidden [B, L, D]; aux: the
    backbone's further losses by name; heads: what further heads say, by name."""

    logits: Any = None
    hidden: Tensor | None = None
    aux: dict[str, Tensor] | None = None
    heads: dict[str, Tensor] | None = None


class MultimodalModel(PreTrainedModel):
    """A multimodal diffusion language model; without `config.vision`, a text-only one."""

    config_class = DmllmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: DmllmConfig, *, load_vision_weights: bool = False):
        super().__init__(config)
        shape = dict(config.backbone)
        module, shape_class = BACKBONES.load(shape.pop("type", "transformer"))
        self.backbone = module(shape_class(**shape))
        self._tied_weights_keys = (
            {"backbone.lm_head.weight": "backbone.embed_tokens.weight"} if config.tie_word_embeddings else {}
        )
        self.vision = self.projector = self.row_break = None
        self.stream_width = width = self.backbone.config.hidden_size
        if config.vision is not None:
            self.vision = build_vision(VisionConfig(**config.vision), load_weights=load_vision_weights)
            self.stream_width = width * (1 + self.vision.deepstack)
            self.projector = build_projector(
                ProjectorConfig(**(config.projector or {})),
                in_features=self.vision.hidden_size,
                out_features=self.stream_width,
                grid=self.vision.grid,
            )
        if config.row_break:
            self.row_break = nn.Parameter(torch.empty(self.stream_width))
        self.heads = nn.ModuleDict({name: self._head(name, options) for name, options in config.heads.items()})
        if config.unused:
            self.unused = Unused(config.unused)
        self.post_init()

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of one tile in the stream."""
        if self.projector is None:
            raise ValueError("This model has no vision encoder: it takes text only.")
        return self.projector.grid  # type: ignore[return-value]

    @property
    def tiling(self) -> TilingConfig | None:
        """How images are cut, unless a processor says otherwise; None for text only."""
        if self.vision is None:
            return None
        fitting = {
            "tile_size": tuple(self.vision.image_size),
            "grid": tuple(self.image_grid),
            "interpolation": self.vision.interpolation,
            "row_break": self.config.row_break,
            **self.vision.tiling,
        }
        return TilingConfig(**{**fitting, **(self.config.tiling or {})})

    def encode_images(
        self, pixel_values: Tensor, image_resizes: Tensor | None = None, image_grids: Tensor | None = None
    ) -> Tensor:
        """Tiles [T, 3, H, W] uint8 -> image rows [T * N, D], once per image; maps resized where `image_resizes` say.

        Rows are as wide as `embed`'s.
        `image_grids` [I, 3] say which tiles are one image, for encoders of native resolution.
        """
        if self.vision is None or self.projector is None:
            raise ValueError("This model has no vision encoder: it takes text only; leave the images out.")
        # cuDNN would round float32 patches to TF32; without it a convolution is a product like every other.
        with torch.backends.cudnn.flags(enabled=False) if self.dtype == torch.float32 else nullcontext():
            rows = self.projector(self.vision(pixel_values, image_grids)).flatten(0, 1)
        return rows if image_resizes is None else resize_maps(rows, image_resizes, self.image_grid)

    def embed(
        self, input_ids: Tensor, image_slots: Tensor | None = None, image_features: Tensor | None = None
    ) -> Tensor:
        """The stream [B, L, D]: token rows, with image rows gathered where a slot names one.

        With a tower whose features go into several layers it is (1 + n) D wide (see the backbone), for token rows too.
        """
        if image_slots is not None:
            input_ids = input_ids.masked_fill(image_slots != TEXT, 0)  # an image's ids may be no rows
        stream = self.backbone.embed(input_ids)
        if self.stream_width > stream.shape[-1]:
            stream = F.pad(stream, (0, self.stream_width - stream.shape[-1]))
        if image_slots is None:
            return stream
        if self.row_break is not None:
            stream = torch.where((image_slots == ROW_BREAK)[..., None], self.row_break.to(stream.dtype), stream)
        if image_features is not None:
            # Text rows look up any row and drop it. If it were the same for all, its gradient would be a queue.
            anywhere = torch.arange(image_slots.shape[1], device=image_slots.device) % len(image_features)
            slots = torch.where(image_slots >= 0, image_slots, anywhere)
            rows = F.embedding(slots, image_features.to(stream.dtype))
            stream = torch.where((image_slots >= 0)[..., None], rows, stream)
        return stream

    def enter(self, latents: Tensor) -> Tensor:
        """Rows of the stream [..., D] for what is no token: features [..., F] of the model's `space`, or without one, D
        features as they are. As wide as `embed`'s."""
        rows = latents if self.space is None else self.space.enter(latents)
        return F.pad(rows.to(self.dtype), (0, self.stream_width - rows.shape[-1]))

    def hear(self, stream: Tensor, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """The stream [B, L, D] told what the model has said before; see `forward` for `logits` and `rows`."""
        return heard(stream, self.heads[FEEDBACK], self.backbone, logits, rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_resizes: Tensor | None = None,
        image_grids: Tensor | None = None,
        image_slots: Tensor | None = None,
        image_features: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        canvas: Tensor | None = None,
        visibility: Visibility | None = None,
        cache: KVCache | None = None,
        time: Tensor | None = None,
        rows: Tensor | None = None,
        parts: Sequence[tuple[Tensor, tuple[int, int]]] = (),
        inputs_embeds: Tensor | None = None,
        heads: Mapping[str, Tensor] | None = None,
        latents: Tensor | Callable[[Any], Tensor] | None = None,
        latent_rows: Tensor | None = None,
        feedback: Tensor | None = None,
        feedback_rows: Tensor | None = None,
        following: bool = False,
        **_: Any,
    ) -> MultimodalOutput:
        """Logits of every row, or of `rows`.

        Args:
            input_ids: [B, L]; or `inputs_embeds` [B, L, D] in its place.
            attention_mask: [B, L], 0 at padding; used where no `documents` or `visibility` say it.
            pixel_values, image_resizes, image_grids, image_slots: tiles [T, 3, H, W] uint8, the maps that are made
                smaller, the images of native size, and the image row each stream row holds; `image_features`
                [T * N, D] in place of the first three when they are already encoded.
            documents, positions: [B, L] (positions on three axes: `nn.rope.places`); without them each row is one
                document, counted from its first real token.
            visibility: who sees whom; without it, the config's layout with the rows of `canvas` [B, L] bool being
                denoised (all of them, if that is not said either).
            rows: None for logits [B, L, V]; [B, K] for logits [B, K, V]; flat [N] into B * L for logits [N, V].
            parts: in place of `rows`, several of them, each with the first id and the one behind the last that may
                stand there: logits is a tuple, of each part [B, K, ids] or [N, ids], and no other rows of the
                vocabulary are read.
            heads: by name, the rows (as `rows`) at which further heads are asked, which read what logits are made of.
            latents: [B, L, F], what stands in place of tokens where `latent_rows` [B, L] (see `enter`); or what makes
                it of the model's `space`, here, where weights that several processes share are whole.
            feedback: logits of an earlier call, for a model that hears them: of the flat `feedback_rows` [M] of B * L,
                [M, V], none where these are -1; or without them of all rows, [B, L, V].
            following: ask for the token behind each of the rows, which need not be fed: where `shift` says that a row
                predicts it.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "forward needs input_ids or inputs_embeds"
            if pixel_values is not None and image_features is None:
                image_features = self.encode_images(pixel_values, image_resizes, image_grids)
            inputs_embeds = self.embed(input_ids, image_slots, image_features)
        if latents is not None:
            assert latent_rows is not None, "latents need latent_rows"
            made = latents if isinstance(latents, Tensor) else latents(self.space)
            inputs_embeds = torch.where(latent_rows[..., None], self.enter(made), inputs_embeds)
        if feedback is not None:
            inputs_embeds = self.hear(inputs_embeds, feedback, feedback_rows)
        positions, visibility = self._defaults(inputs_embeds, attention_mask, documents, positions, canvas, visibility)
        output = self.backbone(inputs_embeds, positions, visibility, cache=cache, time=time)

        def aligned(asked: Tensor | None) -> Tensor:
            if self.config.shift and not following:
                return predicting_rows(output.hidden, places(positions), visibility, cache, asked)
            return gather_rows(output.hidden, asked)

        said = {name: self.heads[name](aligned(asked), self.backbone) for name, asked in (heads or {}).items()}
        if parts:
            logits = tuple(self.backbone.unembed(aligned(asked), words) for asked, words in parts)
        else:
            logits = self.backbone.unembed(aligned(rows))
        return MultimodalOutput(logits=logits, hidden=output.hidden, aux=output.aux, heads=said or None)

    def adapt(
        self,
        *,
        visibility: str | None = None,
        shift: bool | None = None,
        process: str | None = None,
        process_options: Mapping[str, Any] | None = None,
        time_conditioning: bool = False,
        heads: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Makes the model one that learns something else: settings of its config, and the parts that it lacks.

        Raises:
            ValueError: its backbone cannot be told the time, or it has the head with other options.
        """
        config = self.config
        for name, value in (("visibility", visibility), ("shift", shift), ("process", process)):
            if value is not None:
                setattr(config, name, value)
        if process is not None:
            config.process_options = dict(process_options or {})
        if time_conditioning and not config.backbone.get("time_conditioning"):
            if not hasattr(self.backbone, "condition_on_time"):
                kind = config.backbone.get("type", type(self.backbone).__name__)
                raise ValueError(f"A backbone of type {kind} cannot be told the time; use a transformer or dit.")
            self.backbone.condition_on_time()
            config.backbone = {**config.backbone, "time_conditioning": True}
        for name, options in (heads or {}).items():
            if name in config.heads and config.heads[name] != options:
                raise ValueError(
                    f"The model has a head {name} with {config.heads[name]}, and {dict(options)} is asked."
                )
            if name not in config.heads:
                head = self._head(name, options).to(self.device, self.dtype)
                head.initialise()
                self.heads[name] = head
                config.heads = {**config.heads, name: dict(options)}

    @property
    def space(self) -> Any:
        """The head for which tokens are vectors, with a way into the stream; None where they are ids alone."""
        return next((head for head in self.heads.values() if hasattr(head, "enter")), None)

    @property
    def takes_feedback(self) -> bool:
        """Whether it hears the logits of its last call."""
        return FEEDBACK in self.heads

    @property
    def vocabulary(self) -> Vocabulary:
        """The special ids, and how many rows of the vocabulary there are."""
        codes = None if self.config.images is None else self.config.images.codes_of
        return Vocabulary(**vars(self.config.special), size=self.backbone.config.vocab_size, codes=codes)

    def _head(self, name: str, options: Mapping[str, Any]) -> Any:
        return build_head(name, options, self.backbone.config.hidden_size, self.backbone.config.vocab_size)

    def _defaults(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        documents: Tensor | None,
        positions: Tensor | None,
        canvas: Tensor | None,
        visibility: Visibility | None,
    ) -> tuple[Tensor, Visibility]:
        shape, device = embeds.shape[:2], embeds.device
        if documents is None:
            documents = torch.zeros(shape, dtype=torch.int64, device=device)
            if attention_mask is not None:
                documents = documents.masked_fill(attention_mask == 0, PADDING)
        if positions is None:
            positions = ((documents != PADDING).cumsum(1) - 1).clamp(min=0)
        if visibility is None:
            canvas = documents >= 0 if canvas is None else canvas
            visibility = layout(self.config.visibility, documents=documents, canvas=canvas, positions=places(positions))
        return positions, visibility

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.lm_head = value

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, in the backbone and, where its library can, in the tower."""
        self.backbone.gradient_checkpointing = enabled
        if self.vision is not None and hasattr(self.vision, "set_gradient_checkpointing"):
            self.vision.set_gradient_checkpointing(enabled)

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights for a model from scratch: backbone, projector and row break; the tower keeps its library's."""
        self.backbone.initialise()
        for head in self.heads.values():
            head.initialise()  # type: ignore[operator]
        if self.projector is not None:
            for module in self.projector.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=self.backbone.config.initializer_range)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if self.row_break is not None:
            nn.init.normal_(self.row_break, std=self.backbone.config.initializer_range)

    def _init_weights(self, module: nn.Module) -> None:
        """Only what no file holds: tables that timm computes. `initialise` makes a new model's weights."""
        if callable(compute := getattr(module, "init_non_persistent_buffers", None)):
            compute()


class Unused(nn.Module):
    """What a published checkpoint stores and its model never reads, kept so that it can be written back."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(tuple(shape)))


def predicting_rows(
    hidden: Tensor, positions: Tensor, visibility: Visibility, cache: KVCache | None, rows: Tensor | None
) -> Tensor:
    """The hidden rows that predict `rows` (as of `gather_rows`), for models whose logits are shifted by one.

    A token is predicted by the row that it sees at the position before its own, in the cache too; the first of a
    document, which sees none, by its own row.
    """
    asked = rows if rows is not None and rows.ndim == 2 else torch.arange(hidden.shape[1], device=hidden.device)
    asked = asked.expand(len(hidden), -1)
    if cache is not None:
        found = cache.predicting(hidden, positions, visibility, asked)
    else:
        before = visibility.take(asked).dense(visibility, asked)[:, 0]  # [B, K, L]
        before &= positions[:, None] == positions.gather(1, asked)[..., None] - 1
        found = gather_rows(hidden, torch.where(before.any(-1), before.int().argmax(-1), asked))
    return found if rows is None or rows.ndim == 2 else gather_rows(found, rows)


def gather_rows(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """The hidden rows that are to be projected: all, [B, K] of each batch row, or [N] of the flattened batch."""
    if rows is None:
        return hidden
    if rows.ndim == 1:
        return F.embedding(rows, hidden.flatten(0, 1))  # as an index, but with a backward that is no queue
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
