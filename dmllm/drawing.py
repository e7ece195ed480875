"""Pictures drawn as codes on the canvas: what `imagine`, `edit` and `complete` ask of the model, in ids and codes.

    prompts --Stream--> calls of the model <--> samplers.modalities on a canvas of masks --> codes

With guidance a call also asks behind other prompts, each of which leaves something out, in the same batch. What is
known of a picture are codes that stand on the canvas from the beginning.

Sources: Chang et al., MaskGIT, arXiv:2202.04200; Yang et al., MMaDA, arXiv:2505.15809; Xin et al., Lumina-DiMOO,
arXiv:2510.06308. Shapes: B pictures of rows x columns codes, N places of the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmllm.data.collate import collate
from dmllm.image_vocabulary import ImageVocabulary
from dmllm.nn.visibility import check_layout
from dmllm.prompted import keeps_cache, stream_of
from dmllm.registry import nearest
from dmllm.requests import Seeds, row_generators
from dmllm.samplers import check_masks
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig, decode_config
from dmllm.samplers.denoise import denoise
from dmllm.samplers.maskgit import halton
from dmllm.samplers.modalities import Part, PartPredictor, process
from dmllm.types import IGNORE, TEXT, Example, Step

UNKNOWN = -1  # in the place of a code
KEY = "drawing"  # of the defaults in generation_config.json
MASKGIT = {"schedule": "maskgit", "noise_schedule": "cosine", "order_temperature": 1.0}
DEFAULTS = {"steps": 18, "temperature": 1.0, **MASKGIT}
# The fields of DecodeConfig that say something of a picture, which is one block and has no end.
SETTINGS = [
    *("steps", "num_to_transfer", "schedule", "shift", "eps", "noise_schedule", "remasking", "sampling", "temperature"),
    *("order_temperature", "order_cooling", "top_p", "threshold", "factor", "entropy_bound", "kl_threshold"),
    *("kl_history_length", "revoke_threshold", "remdm", "eta", "visibility"),
]
ORDERS = ("order_temperature", "order_cooling")
COUNTS = ("steps", "num_to_transfer")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How far a picture goes from what the other prompts say: c + sum s (c - u)."""

    scales: tuple[float, ...] = ()
    """s of each of them; none is no guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """The shares of the calls between which it is at work; before and behind a call costs a half."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1 or any(scale < 0 for scale in self.scales):
            raise ValueError(
                f"guidance={self.scales}, guidance_interval={self.interval}: scales are 0 or above, and the interval "
                "lies between 0 (the first call) and 1 (behind the last)."
            )


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pictures as codes."""

    codes: Tensor  # [B, rows, columns] int64, UNKNOWN where a code is not known yet
    num_forwards: Tensor  # [B] model calls
    finished: Tensor  # [B] bool


def vocabulary_of(model: Any) -> ImageVocabulary:
    """Where the model's pictures stand among its tokens. Raises ValueError for one that has none."""
    images = getattr(model.config, "images", None)
    if images is None:
        raise ValueError(
            "This model draws no pictures: its config.json has no image_vocabulary. Of a published model with another "
            "tokenizer say it as load(..., config={'image_vocabulary': {'offset': ..., 'size': ..., ...}})."
        )
    return images


def drawing_config(options: Mapping[str, Any], defaults: Mapping[str, Any], count: int) -> tuple[DecodeConfig, bool]:
    """The settings by which `count` codes are found, and whether they come in Halton's order (remasking="halton").

    Args:
        options: of the caller, over `defaults`, over DEFAULTS.

    Raises:
        ValueError: an option that says nothing of a picture, or is refused.
    """
    for name in options:
        if name not in SETTINGS:
            raise ValueError(f"{name!r} is no setting of a picture; {nearest(name, SETTINGS)}")
    chosen = {**DEFAULTS, **{key: value for key, value in defaults.items() if key in SETTINGS}}
    if any(name in options for name in COUNTS):
        chosen = {key: value for key, value in chosen.items() if key not in COUNTS}
    chosen = {**chosen, **options}
    if chosen.get("remasking", "low_confidence") != "low_confidence":
        chosen = {key: value for key, value in chosen.items() if key not in ORDERS or key in options}
    spread = chosen.get("remasking") == "halton"
    chosen |= {"remasking": "sequential"} if spread else {}
    return decode_config({**chosen, "max_new_tokens": count, "eos_token_id": []}), spread


def draw(
    model: Any,
    prompts: Sequence[Sequence[Sequence[int]]],
    size: tuple[int, int],
    *,
    codes: Tensor | None = None,
    guidance: Guidance | None = None,
    generator: Seeds = None,
    defaults: Mapping[str, Any] | None = None,
    use_cache: bool | None = None,
    **options: Any,
) -> Iterator[Drawing]:
    """Pictures, as they come to be: one `Drawing` after each call of the model.

    Args:
        model: with an image vocabulary (`vocabulary_of`).
        prompts: the ids that stand before the codes, of each picture; then, for each scale of the guidance, those of
            each picture that it leads away from.
        size: rows and columns of codes.
        codes: [B, rows, columns], what is known, UNKNOWN elsewhere; None is nothing.
        generator: as for `Pipeline.chat`. With sampling="multinomial" or "gumbel" a list with one generator for all
            rows draws what the authors' code draws with it.
        options: settings, those of `SETTINGS`, over `defaults`.

    Raises:
        ValueError: options or shapes do not fit, or the model draws no pictures or not on one canvas.
    """
    images, (rows, columns) = vocabulary_of(model), size
    config, spread = drawing_config(options, defaults or {}, rows * columns)
    ids, slots = images.canvas(rows, columns)
    count = len(prompts[0])
    ids = ids.repeat(count, 1)
    if codes is not None:
        if codes.shape != (count, rows, columns) or int(codes.min()) < UNKNOWN or int(codes.max()) >= images.size:
            raise ValueError(
                f"codes are {list(codes.shape)} in {int(codes.min())} .. {int(codes.max())}; they must be "
                f"{[count, rows, columns]}, from 0 to {images.size - 1}, {UNKNOWN} where nothing is known."
            )
        known = codes.flatten(1).to(ids)
        ids[:, slots] = torch.where(known == UNKNOWN, images.mask, known + images.offset)
    order = torch.tensor(halton(rows, columns)) if spread else None
    part = Part(slots=slots, words=images.codes_of, config=config, order=order)
    steps = fill(model, prompts, ids, [part], guidance=guidance, generator=generator, use_cache=use_cache)
    for step in steps:
        found = (step.ids[:, slots] - images.offset).masked_fill(~step.committed[:, slots], UNKNOWN)
        yield Drawing(codes=found.view(-1, rows, columns), num_forwards=step.num_forwards, finished=step.finished)


def fill(
    model: Any,
    prompts: Sequence[Sequence[Sequence[int]]],
    ids: Tensor,
    parts: Sequence[Part],
    *,
    guidance: Guidance | None = None,
    generator: Seeds = None,
    use_cache: bool | None = None,
) -> Iterator[Step]:
    """A canvas of one or several modalities, filled; one `Step` after each call.

    Args:
        prompts: as for `draw`.
        ids: [B, N], with the model's mask token where something is to be found, each in one of the parts.

    Raises:
        ValueError: the model is no mask model with full or prefix attention, or numbers do not fit.
    """
    check_masks(model, "Drawing")
    images, guidance = vocabulary_of(model), guidance or Guidance()
    kind = parts[0].config.visibility or model.config.visibility
    if kind not in ("full", "prefix") or check_layout(kind) is not None:
        raise ValueError(f"A picture is one canvas, all of which sees itself: visibility full or prefix, not {kind!r}.")
    if len(prompts) != 1 + len(guidance.scales) or any(len(own) != len(ids) for own in prompts):
        raise ValueError(
            f"{len(prompts)} prompts for each of {len(ids)} rows with {len(guidance.scales)} scales of guidance; give "
            "each row one prompt and one more for each scale."
        )
    device = model.device
    examples = [of_ids(row) for own in prompts for row in own]
    draws = row_generators(generator, [_with_canvas(one, row) for one, row in zip(examples, ids, strict=False)])
    batch = collate(examples, model.config.special, rows_per_tile=0)
    cached = keeps_cache(model, batch, kind, use_cache)
    stream = stream_of(model, batch, ids.shape[1], kind, cached=cached).shared(len(prompts))
    calls = max(part.config.steps_per_block(len(part.slots)) for part in parts)
    predict: Any = PartPredictor(stream, guidance.scales, guidance.interval, calls)
    canvas = Canvas.of(ids.to(device), (ids != images.mask).to(device), images.mask)
    parts = [replace(part, slots=part.slots.to(device)) for part in parts]
    yield from denoise(predict, canvas, parts[0].config, draws, process=process(parts))


def of_ids(ids: Sequence[int]) -> Example:
    """A prompt of tokens alone."""
    row = torch.tensor(list(ids), dtype=torch.int64)
    nothing = torch.zeros_like(row)
    return Example(
        input_ids=row,
        labels=nothing + IGNORE,
        image_slots=nothing + TEXT,
        documents=nothing,
        positions=torch.arange(len(row)),
    )


def _with_canvas(example: Example, ids: Tensor) -> Example:
    """A prompt and what is given behind it, as what a request is recognised by."""
    return replace(example, input_ids=torch.cat([example.input_ids, ids.cpu()]))
