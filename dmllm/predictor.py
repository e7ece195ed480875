"""A model that has been given its prompts: what the denoising loop calls.

Where the prompts' keys and values can be kept, a call feeds the canvas alone, or the part of it that is asked for;
otherwise prompts and canvas together. Which way it is follows from who sees whom.

Shapes: B requests, P prompt rows (padded on the right), N canvas tokens, K positions asked for, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dmllm.computed import Kept
from dmllm.nn.graphs import Workspaces
from dmllm.nn.visibility import ORDERED, check_layout
from dmllm.prompted import keeps_cache, lengths_of, predicts_next, stream_of
from dmllm.samplers import process_of
from dmllm.samplers.approximate import ApproximatePredictor
from dmllm.samplers.blocks import BlockPredictor, whole_blocks
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.causal import CausalPredictor, check_drafts, check_prompts, token_by_token
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.constraint import Constraint
from dmllm.samplers.denoise import denoise
from dmllm.samplers.estimate import estimate
from dmllm.samplers.ordered import OrderedPredictor, at_most, check_ordered
from dmllm.samplers.policy import CachePolicy
from dmllm.samplers.process import Predict
from dmllm.samplers.speculate import SPECULATIVE
from dmllm.samplers.stream import Stream
from dmllm.samplers.whole import WholePredictor
from dmllm.types import PADDING, TEXT, Batch, Step

PREDICTORS = (ApproximatePredictor, BlockPredictor, CausalPredictor, OrderedPredictor, WholePredictor)
Prepared = tuple[Predict, Canvas, DecodeConfig]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Requests, one row each, and what their model may use again."""

    model: Any
    prompts: Batch
    mask_id: int
    use_cache: bool | None
    draft: Tensor | None
    workspaces: Workspaces | None
    kept: Kept | None

    def stream(self, length: int, kind: str, cfg_scale: float, policy: CachePolicy | None, told: str = "") -> Stream:
        """The prompts with `length` tokens behind each, `told` to the model as another visibility than `kind`."""
        cached = keeps_cache(self.model, self.prompts, kind, self.use_cache, policy)
        blank = self.mask_id if cfg_scale else None
        kept = {"workspaces": self.workspaces, "kept": self.kept}
        return stream_of(self.model, self.prompts, length, told or kind, cached=cached, blank=blank, **kept)


def prepare(
    model: Any,
    prompts: Batch,
    config: DecodeConfig,
    mask_id: int,
    use_cache: bool | None = None,
    draft: Tensor | None = None,
    workspaces: Workspaces | None = None,
    kept: Kept | None = None,
) -> Prepared:
    """What `denoise` takes for these prompts, of one row a request: the model given them, a canvas, settings.

    Args:
        draft: [B, D] ids that the canvas begins with, open where they are `mask_id`; None is a blank canvas.
        workspaces: where a GPU's cache comes from.
        kept: what earlier requests have computed.

    Raises:
        ValueError: `use_cache=True` where a cache would change the result; or a draft that does not fit.
    """
    if mask_id >= (rows := dict(getattr(model.config, "backbone", None) or {}).get("vocab_size", mask_id + 1)):
        raise ValueError(
            f"The mask token {mask_id} is no row of the vocabulary of {rows}; where config.json does not name it, say "
            "load(..., config={'mask_token_id': ...})."
        )
    asked = Asked(
        model=model, prompts=prompts, mask_id=mask_id, use_cache=use_cache, draft=draft, workspaces=workspaces,
        kept=kept,
    )  # fmt: skip
    kind = config.visibility or model.config.visibility
    if predicts_next(model, kind):
        return _token_by_token(asked, config)
    if config.speculate:
        raise ValueError(
            f"speculate={config.speculate} is for models of which a row predicts the next token and sees none behind "
            f"it; this one has visibility={kind!r}, shift={model.config.shift}. Leave it out."
        )
    if (trained := check_layout(kind)) is not None:
        return _in_blocks(asked, config, kind, trained)
    return _in_any_order(asked, config) if kind == ORDERED else _whole(asked, config, kind)


def _token_by_token(asked: Asked, config: DecodeConfig) -> Prepared:
    """For a model that predicts the next token."""
    _refuse_given(asked, config, "a model that predicts the next token, and sees none behind it")
    check_prompts((asked.prompts.documents != PADDING).sum(1).tolist())
    check_drafts(asked.model, config.speculate)
    stream = asked.stream(config.max_new_tokens, "causal", config.cfg_scale, CachePolicy.of(config.cache))
    config = token_by_token(config)
    canvas = whole_blocks(lengths_of(asked.model, asked.prompts), config.max_new_tokens, 1, asked.mask_id)
    return CausalPredictor(stream, cfg_scale=config.cfg_scale), canvas, config


def _in_blocks(asked: Asked, config: DecodeConfig, kind: str, trained: int) -> Prepared:
    """For a model of blocks of `trained` tokens."""
    if config.blocks_ahead:
        raise ValueError(f"blocks_ahead={config.blocks_ahead}: with visibility={kind!r} no block sees those behind it.")
    _refuse_given(asked, config, f"visibility={kind!r}: such a model fills its blocks from left to right")
    first = config.prompt_first and asked.model.config.shift
    calls = {"store_calls": first or (config.store_calls and asked.use_cache is not False), "prompt_first": first}
    length, config = config.max_new_tokens, replace(config, **calls).in_whole_blocks(trained)
    lengths = lengths_of(asked.model, asked.prompts)
    canvas = whole_blocks(lengths, length, config.block_length or trained, asked.mask_id, **calls)
    told, policy = f"block:{config.block_length}", CachePolicy.of(config.cache)
    stream = asked.stream(canvas.ids.shape[1], kind, config.cfg_scale, policy, told)
    alone = (config.sub_block_length or config.block_length) if config.sub_block_cache else None
    predict = BlockPredictor(stream, canvas, cfg_scale=config.cfg_scale, sub_block_length=alone, behind=first)
    return predict, canvas, config


def _refuse_given(asked: Asked, config: DecodeConfig, whom: str) -> None:
    """Raises ValueError where something stands on the canvas from the beginning, which is not for `whom`."""
    if config.suffix_ids or asked.draft is not None:
        said = f"suffix_ids={config.suffix_ids}" if asked.draft is None else "draft="
        raise ValueError(f"{said} is not for {whom}.")


def _in_any_order(asked: Asked, config: DecodeConfig) -> Prepared:
    """For a model that knows every order."""
    check_ordered(config)
    config, canvas = _canvas(asked, replace(config, store_calls=False, prompt_first=False))
    stream = asked.stream(canvas.ids.shape[1], ORDERED, config.cfg_scale, CachePolicy.of(config.cache))
    masks = {"cfg_masks_draft": config.cfg_masks_draft, "most": at_most(config)}
    return OrderedPredictor(stream, cfg_scale=config.cfg_scale, **masks), canvas, config


def _whole(asked: Asked, config: DecodeConfig, kind: str) -> Prepared:
    """For a model that sees the whole canvas."""
    policy = CachePolicy.of(config.cache)
    first = config.prompt_first and asked.model.config.shift and (kind != "full" or policy is not None)
    in_loop = first and policy is not None
    config, canvas = _canvas(asked, replace(config, store_calls=False, prompt_first=in_loop))
    stream, length = asked.stream(canvas.ids.shape[1], kind, config.cfg_scale, policy), config.max_new_tokens
    if policy is not None:
        return _approximate(stream, asked, config, policy), canvas, config
    canvas = replace(canvas, space=getattr(asked.model, "space", None))
    opened = {"block_length": config.block_of(length), "blocks_ahead": config.blocks_ahead}
    predict = WholePredictor(stream, cfg_scale=config.cfg_scale, cfg_masks_draft=config.cfg_masks_draft, **opened)
    if first:
        place = torch.zeros(len(canvas), 1, dtype=torch.int64, device=asked.model.device)
        # Its row is the prompt's last, so this says what computing the prompt has said already: it is no call.
        greedy = replace(config, temperature=0.0, top_p=1.0)
        canvas = canvas.commit(place, estimate(predict(canvas, place), asked.mask_id, greedy).tokens, place == 0)
    return predict, canvas, config


def decode(
    predict: Predict,
    canvas: Canvas,
    config: DecodeConfig,
    model: Any,
    draws: list[Generator],
    length: int,
    workspaces: Workspaces,
    constraint: Constraint | None = None,
) -> Iterator[Step]:
    """The steps of `denoise`, the canvas cut to `length` tokens; in the end its cache goes back to `workspaces`."""
    try:
        process = SPECULATIVE if config.speculate else process_of(model)
        for step in denoise(predict, canvas, config, draws, constraint, process=process):
            yield replace(step, ids=step.ids[:, :length], committed=step.committed[:, :length])
    finally:
        workspaces.give(predict.stream.cache if isinstance(predict, PREDICTORS) else None)


def _approximate(stream: Stream, asked: Asked, config: DecodeConfig, policy: CachePolicy) -> ApproximatePredictor:
    """Where all rows take as many calls for each block, as none does with a draft, the predictor is told."""
    length, device = stream.length, stream.lengths.device
    images = F.pad(asked.prompts.image_slots.to(device) != TEXT, (0, length)).repeat(stream.copies, 1)
    given = asked.draft is not None or bool(config.suffix_ids)
    return ApproximatePredictor(
        stream,
        policy,
        config.block_of(length),
        images,
        cfg_scale=config.cfg_scale,
        cfg_masks_draft=config.cfg_masks_draft,
        period=None if given else config.calls_per_block(length),
    )


def _canvas(asked: Asked, config: DecodeConfig) -> tuple[DecodeConfig, Canvas]:
    """The canvas, with the draft and what `suffix_ids` put behind it; and its settings, of which blocks and calls are
    those without an ending."""
    rows, length, mask_id, device = len(asked.prompts), config.max_new_tokens, asked.mask_id, asked.model.device
    canvas = _drafted(rows, length, mask_id, device, asked.draft)
    if not config.suffix_ids:
        return config, canvas
    suffix = torch.tensor(config.suffix_ids, device=device)
    config = replace(
        config,
        max_new_tokens=length + len(suffix),
        block_length=config.block_of(length),
        steps=None,
        block_steps=config.steps_per_block(length) if config.num_to_transfer is None else None,
    )
    ids = torch.cat([canvas.ids, suffix.expand(rows, -1)], 1)
    return config, Canvas.of(ids, ids != mask_id, mask_id)


def _drafted(rows: int, length: int, mask_id: int, device: torch.device, draft: Tensor | None) -> Canvas:
    if draft is None:
        return Canvas.blank(rows, length, mask_id, device)
    if draft.ndim != 2 or draft.shape[0] != rows or draft.shape[1] > length or draft.is_floating_point():
        raise ValueError(
            f"draft is {list(draft.shape)} of {draft.dtype}; it must be whole numbers [{rows}, at most {length}], "
            f"the mask token {mask_id} where nothing is known."
        )
    ids = torch.full((rows, length), mask_id, device=device)
    ids[:, : draft.shape[1]] = draft
    return Canvas.of(ids, ids != mask_id, mask_id)
