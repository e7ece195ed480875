"""DiffusionGemma as transformers computes it, called as the models here are called.

    pictures --tower--> rows --+
    prompt --------------------+--encoder (causal)--> keys and values --+
                                                                        +--> decoder (sees all) --> logits of the canvas
    canvas of random tokens + its last logits --------------------------+

There is no mask token: a canvas begins as uniformly random tokens. Each step draws a token everywhere, keeps those of
least entropy while their sum stays within a bound, and replaces all others by new random tokens; the step's logits go
into the next one (self-conditioning). A canvas is done when its most probable tokens no longer change and are sure, and
those are what it says; it then joins the prompt, and the next canvas begins. The rows of a picture see each other.

Source: transformers' models/diffusion_gemma, whose model, temperature schedule, acceptance and stopping are called; the
loop is this file's, so that rows have generators of their own and every step is seen.

Shapes: B rows, P prompt columns (padded on the left), C tokens of a canvas, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import DynamicCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalOutput
from dmllm.models.vision.gemma4 import patches_of, tiling_of
from dmllm.registry import nearest
from dmllm.tiling import TilingConfig
from dmllm.types import PADDING, TEXT, Batch, Step

SYNONYMS = {"max_denoising_steps": "steps"}  # transformers' name -> ours


@dataclass(frozen=True, kw_only=True)
class DiffusionGemmaDecoding:
    """How a canvas is denoised; the names and defaults are transformers', but for `steps` (max_denoising_steps)."""

    max_new_tokens: int = 256
    """Length of the answer in tokens, rounded up to whole canvases."""
    steps: int = 48
    """Model calls for a canvas, at most."""
    entropy_bound: float = 0.1
    """A step keeps the tokens of least entropy while the sum of those before the last stays within this (nats)."""
    t_max: float = 0.8
    """Temperature before the first step; it falls by (t_max - t_min) / steps a step."""
    t_min: float = 0.4
    """Temperature that it falls towards."""
    stability_threshold: int = 1
    """Steps for which the most probable tokens must not have changed, for a canvas to be done; 0: they may."""
    confidence_threshold: float = 0.005
    """Mean entropy (nats) below which it must lie, too."""
    eos_token_id: int | list[int] | None = None
    """Tokens that end a reply; None or []: none does."""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("steps", 1), ("stability_threshold", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}.")
        for name in ("entropy_bound", "t_max", "confidence_threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a number above 0.")
        if not 0 <= self.t_min < self.t_max:
            raise ValueError(f"t_min={self.t_min} must lie between 0 and t_max={self.t_max}, below it.")

    @property
    def stops(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)


class DiffusionGemma(nn.Module):
    """Called by the pipeline as a `MultimodalModel` is, but that it denoises by itself.

    Args:
        inner: transformers' DiffusionGemmaForBlockDiffusion.
        family, published: the name of its family and its config.json, with what stood beside it.
        stored_names: what its checkpoint calls the weights; without the vision tower's, pictures are refused.

    Raises:
        ValueError: its processor prepares pictures in another way than is computed here.
    """

    takes_feedback = True
    counts_padding = True  # where rows have no generators of their own, as in transformers' generate

    def __init__(self, inner: Any, family: str, published: Mapping[str, Any], stored_names: Collection[str] = ()):
        super().__init__()
        self.inner = inner
        self.stored_names = sorted(stored_names)
        sees = not stored_names or any("vision_tower" in name for name in stored_names)
        text = inner.config.text_config
        ends = text.eos_token_id
        pad = text.pad_token_id or 0
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self.config = DmllmConfig(
            backbone={"type": type(inner).__name__, **{name: getattr(text, name) for name in names}},
            vision={"name": f"native:{inner.config.vision_config.model_type}"} if sees else None,
            mask_token_id=pad,  # what an unwritten place shows
            pad_token_id=pad,
            image_token_id=inner.config.image_token_id,
            eos_token_id=ends[0] if isinstance(ends, list | tuple) else 1 if ends is None else ends,
            visibility="prefix",
            family=family,
            published=dict(published),
        )
        self.image_frame = (inner.config.boi_token_id, inner.config.eoi_token_id)
        beside = [
            published.get("preprocessor_config"),
            (published.get("processor_config") or {}).get("image_processor"),
        ]
        said = {name: value for part in beside for name, value in (part or {}).items()}
        vision = inner.config.vision_config
        tiling = tiling_of({**said, **published}, vision.patch_size, vision.pooling_kernel_size)
        self.tiling: TilingConfig | None = tiling if sees else None

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def encode_images(self, tiles: Tensor, image_grids: Tensor) -> Tensor:
        """The rows of pictures [T, D].

        Args:
            tiles: [T, 3, H, W] uint8, each of which becomes one row.
            image_grids: [N, 3], 1, rows and columns of tiles of each picture.
        """
        size, encoder = self.inner.config.vision_config.patch_size, self.inner.model.encoder
        rows = []
        for (_, down, across), own in zip(image_grids.tolist(), tiles.split(image_grids.prod(1).tolist()), strict=True):
            values, places = patches_of(own, down, across, size)
            rows.append(encoder.get_image_features(values[None], places[None], return_dict=True).pooler_output)
        return torch.cat(rows)

    def embed(self, *_: Any) -> Tensor:
        """What scoring begins with, which hides tokens. Raises ValueError: there is none that hides."""
        raise ValueError("DiffusionGemma has no mask token, so it cannot score answers by hiding them; use logits().")

    @property
    def canvas_length(self) -> int:
        """C of generation; `forward` takes any."""
        return self.inner.config.canvas_length

    def forward(
        self,
        *,
        input_ids: Tensor,
        image_slots: Tensor | None = None,
        image_features: Tensor | None = None,
        documents: Tensor | None = None,
        canvas: Tensor | None = None,
        feedback: Tensor | None = None,
        rows: Tensor | None = None,
        **_: Any,
    ) -> MultimodalOutput:
        """Logits [B, L, V] (or of `rows` [B, K]) of the canvas; NaN in prompts and padding, which are not predicted.

        Args:
            input_ids: [B, L], in each row the prompt and then its canvas.
            image_slots: [B, L], which row of the features [T, D] stands there; TEXT (-1): none, the token does.
            documents: [B, L], PADDING on the right.
            canvas: [B, L] bool, the canvas; None: the last `canvas_length` tokens of each row.
            feedback: [B, L, V], what the canvas was predicted to be one step before, after temperature.

        Raises:
            ValueError: a row has no canvas, or a prompt's token behind it.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if documents is None else documents != PADDING
        if canvas is None:
            left = real.flip(1).cumsum(1).flip(1)  # real columns from here on
            canvas = left <= self.canvas_length
        canvas, prompt = canvas.bool() & real, ~canvas.bool() & real
        ends = torch.where(prompt, 1, 0).flip(1).cumsum(1).flip(1)  # prompt columns from here on
        if not bool(canvas.any(1).all()) or bool((canvas & (ends > 0)).any()):
            raise ValueError(
                "Each row is a prompt and then its canvas; say which columns are the canvas with canvas= [B, L] bool "
                f"(without it, the last {self.canvas_length} tokens of each row are)."
            )
        ids, seen = _aligned(input_ids, prompt, left=True)
        slots = None if image_features is None else _slots(image_slots, prompt)
        drafts, valid = _aligned(input_ids, canvas, left=False)
        places = _places(canvas, valid)
        prefix = self._encode(ids, seen, None, slots, image_features)
        feedback = None if feedback is None else feedback.gather(1, _wide(places, feedback))
        logits = self._decode(drafts, valid, prefix, seen, feedback, 0)
        spread = logits.new_full((*input_ids.shape, logits.shape[-1]), float("nan"))
        spread[canvas] = logits[valid]
        return MultimodalOutput(logits=spread if rows is None else spread.gather(1, _wide(rows, spread)))

    def decode_config(self, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> DiffusionGemmaDecoding:
        """Settings of one call, `options` over a checkpoint's `defaults`. Raises ValueError naming a wrong one."""
        known = [f.name for f in fields(DiffusionGemmaDecoding)]
        chosen = {SYNONYMS.get(name, name): value for name, value in options.items()}
        for name in chosen:
            if name not in known:
                raise ValueError(f"Unknown decode option {name!r} for DiffusionGemma; {nearest(name, known)}")
        nested = (defaults.get("sampler_config") or {}).items()
        own = {SYNONYMS.get(name, name): value for name, value in (*defaults.items(), *nested) if value is not None}
        return DiffusionGemmaDecoding(**{**{k: v for k, v in own.items() if k in known}, **chosen})

    @torch.no_grad()
    def denoise(self, prompts: Batch, config: DiffusionGemmaDecoding, draws: list[Generator] | None) -> Iterator[Step]:
        """Canvas after canvas, a `Step` after each call of the decoder; places not yet reached show the pad token.

        Args:
            prompts: one row a request, without labels; positions count on from that of a row's first token.
            draws: a generator for each row; None: torch's global one for the batch as a whole, as transformers draws.
        """
        batch, device, length = len(prompts), self.device, self.canvas_length
        real = (prompts.documents != PADDING).to(device)
        new_ids, seen = _aligned(prompts.input_ids.to(device), real, left=True)
        at = prompts.positions.view(-1, *real.shape)[0, :, :1].to(device)
        slots = features = None
        if prompts.pixel_values is not None:
            assert prompts.image_grids is not None
            features = self.encode_images(prompts.pixel_values.to(device), prompts.image_grids)
            slots = _slots(prompts.image_slots.to(device), real)
        draws = None if draws is None else [_on(device, generator) for generator in draws]
        total = -(-config.max_new_tokens // length) * length
        answer = torch.full((batch, total), self.config.pad_token_id, device=device)
        known = torch.zeros_like(answer, dtype=torch.bool)
        forwards = torch.zeros(batch, dtype=torch.int64, device=device)
        stopped = torch.zeros(batch, dtype=torch.bool, device=device)
        stops = torch.tensor(config.stops, dtype=answer.dtype, device=device)
        prefix = None
        for start in range(0, total, length):
            prefix = self._encode(new_ids, seen, prefix, slots, features, at)
            slots = None
            here = slice(start, start + length)
            for draft, done, alive in self._canvas(prefix, seen, at, config, draws, stopped):
                forwards = forwards + (alive & ~stopped)
                answer, known = answer.clone(), known.clone()
                answer[:, here] = torch.where(stopped[:, None], answer[:, here], draft)
                known[:, here] = (done | stopped)[:, None]
                ends = (torch.isin(answer, stops) & known).any(1)
                finished = ends | known.all(1)
                yield Step(ids=answer, committed=known, num_forwards=forwards, finished=finished)
            stopped = (torch.isin(answer, stops) & known).any(1)
            if bool(stopped.all()):
                return
            new_ids = answer[:, here]
            seen = torch.cat([seen, torch.ones_like(new_ids, dtype=torch.bool)], 1)

    def _canvas(
        self,
        prefix: DynamicCache,
        seen: Tensor,
        at: Tensor,
        config: DiffusionGemmaDecoding,
        draws: list[Generator] | None,
        stopped: Tensor,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One canvas, step by step: its most probable tokens [B, C], rows that are done, rows that were asked [B]."""
        vocabulary, length, steps = self.config.backbone["vocab_size"], self.canvas_length, config.steps
        bound = EntropyBoundSamplerConfig(entropy_bound=float(config.entropy_bound))
        sampler: Any = EntropyBoundSampler(bound, length, vocabulary, steps)
        cool: Any = LinearTemperatureScheduleLogitsProcessor(config.t_min, config.t_max, steps)
        stop: Any = StableAndConfidentStoppingCriteria(config.stability_threshold, config.confidence_threshold)
        valid = torch.ones(len(seen), length, dtype=torch.bool, device=seen.device)
        done = torch.zeros_like(stopped) if draws is None else stopped.clone()  # transformers goes on with all rows
        canvas = draft = _uniform(vocabulary, valid, draws, ~done)
        feedback: Tensor | None = None
        for left in range(steps, 0, -1):
            alive, step = ~done, torch.tensor(left, device=seen.device, dtype=torch.int32)
            logits = cool(canvas, self._decode(canvas, valid, prefix, seen, feedback, at), cur_step=step)
            drawn = _categorical(logits.softmax(-1, dtype=torch.float32), draws, alive)
            kept = sampler.accept_canvas(canvas, drawn, logits, step)
            fresh = torch.where(sampler.accepted_token_mask, kept, _uniform(vocabulary, valid, draws, alive))
            if feedback is not None:
                logits = torch.where(done[:, None, None], feedback.to(logits.dtype), logits)
            canvas = torch.where(done[:, None], canvas, fresh)
            draft = torch.where(done[:, None], draft, logits.argmax(-1))
            done = done | stop(draft, logits)
            feedback = logits.to(self.dtype)
            last = left == 1 or bool(done.all())
            yield draft, torch.ones_like(done) if last else done, alive
            if last:
                return

    def _encode(
        self,
        ids: Tensor,
        seen: Tensor,
        prefix: DynamicCache | None,
        slots: Tensor | None = None,
        features: Tensor | None = None,
        at: Tensor | int = 0,
    ) -> DynamicCache:
        """The cache with the keys and values of `ids` [B, n], the last columns of what is `seen` [B, P]; of the rows of
        the features [T, D] where `slots` [B, n] names them. `at` [B, 1] is a row's first position."""
        prefix = DynamicCache(config=self.inner.config.get_text_config(decoder=True)) if prefix is None else prefix
        positions = at + (seen.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        encoder = self.inner.model.encoder
        embeds = encoder.get_input_embeddings()(ids)
        if slots is not None and features is not None:
            shown = features.to(embeds.dtype)[slots.clamp(min=0)]
            embeds = torch.where(slots[..., None] >= 0, shown, embeds)
        masks = encoder.create_masks_for_generate(
            config=self.inner.config,
            inputs_embeds=embeds,
            attention_mask=seen,
            past_key_values=prefix,
            position_ids=positions,
            mm_token_type_ids=None if slots is None else (slots >= 0).long(),
        )
        encoder(inputs_embeds=embeds, attention_mask=masks, past_key_values=prefix, position_ids=positions)
        return prefix

    def _decode(
        self, ids: Tensor, valid: Tensor, prefix: DynamicCache, seen: Tensor, feedback: Tensor | None, at: Tensor | int
    ) -> Tensor:
        """Logits [B, C, V] of a canvas behind a prompt."""
        first = at + seen.sum(1, keepdim=True)
        return self.inner(
            decoder_input_ids=ids,
            self_conditioning_logits=feedback,
            decoder_attention_mask=torch.cat([seen, valid], 1),
            decoder_position_ids=first + torch.arange(ids.shape[1], device=ids.device),
            past_key_values=prefix,
        ).logits


def _aligned(ids: Tensor, which: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """The chosen ids [B, L] of each row, padded to the longest (at least 1) on one side; and which are real."""
    sizes = which.sum(1)
    steps = torch.arange(max(int(sizes.max()), 1), device=ids.device)
    real = steps >= len(steps) - sizes[:, None] if left else steps < sizes[:, None]
    padded = torch.zeros(real.shape, dtype=ids.dtype, device=ids.device)
    padded[real] = ids[which]
    return padded, real


def _slots(slots: Tensor | None, which: Tensor) -> Tensor:
    """The slots [B, L] of the chosen columns as `_aligned` lays them out on the right, TEXT in its padding."""
    assert slots is not None
    chosen, real = _aligned(slots, which, left=True)
    return torch.where(real, chosen, TEXT)


def _places(which: Tensor, real: Tensor) -> Tensor:
    """The columns [B, C] that the chosen ones have; 0 where there is none."""
    columns = torch.arange(which.shape[1], device=which.device).expand_as(which)
    places = torch.zeros(real.shape, dtype=torch.int64, device=which.device)
    places[real] = columns[which]
    return places


def _wide(rows: Tensor, values: Tensor) -> Tensor:
    return rows[..., None].expand(-1, -1, values.shape[-1])


def _on(device: torch.device, generator: Generator) -> Generator:
    """A generator of this device, begun from the other where that is of another one."""
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return Generator(device).manual_seed(seed)


def _uniform(vocabulary: int, like: Tensor, draws: list[Generator] | None, alive: Tensor) -> Tensor:
    """Random tokens [B, C]; rows that are done draw nothing from generators of their own."""
    if draws is None:
        return torch.randint(vocabulary, like.shape, device=like.device)
    drawn = torch.zeros(like.shape, dtype=torch.int64, device=like.device)
    for row in alive.nonzero().flatten().tolist():
        drawn[row] = torch.randint(vocabulary, like.shape[1:], generator=draws[row], device=like.device)
    return drawn


def _categorical(probabilities: Tensor, draws: list[Generator] | None, alive: Tensor) -> Tensor:
    """Tokens [B, C] drawn from probabilities [B, C, V]."""
    if draws is None:
        return torch.multinomial(probabilities.flatten(0, 1), 1).view(probabilities.shape[:2])
    drawn = torch.zeros(probabilities.shape[:2], dtype=torch.int64, device=probabilities.device)
    for row in alive.nonzero().flatten().tolist():
        drawn[row] = torch.multinomial(probabilities[row], 1, generator=draws[row]).squeeze(1)
    return drawn
