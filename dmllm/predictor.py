"""A model that has been given its prompts: what the denoising loop calls.

The pictures are encoded once and the prompts embedded once. Where no prompt row sees the canvas, which the visibility
rule itself tells, the prompts' keys and values are computed once too, and a call feeds the canvas alone; that changes
no result. Otherwise a call feeds prompts and canvas together. Block-causal models: `samplers.blocks`.

Shapes: B requests, P prompt rows (padded on the right), N canvas tokens, K positions asked for, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dmllm.computed import Kept, is_timed
from dmllm.nn.graphs import Workspaces
from dmllm.nn.visibility import ORDERED, check_layout
from dmllm.samplers import check_masks, process_of
from dmllm.samplers.approximate import ApproximatePredictor
from dmllm.samplers.blocks import BlockPredictor, whole_blocks
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.causal import CausalPredictor, check_drafts, check_prompts, token_by_token
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.constraint import Constraint
from dmllm.samplers.denoise import denoise
from dmllm.samplers.estimate import estimate
from dmllm.samplers.likelihood import chain_rule, draw_views, likelihood
from dmllm.samplers.ordered import OrderedPredictor, at_most, check_ordered, draw_ranks, order_values
from dmllm.samplers.policy import CachePolicy
from dmllm.samplers.process import Predict
from dmllm.samplers.speculate import SPECULATIVE
from dmllm.samplers.stream import Stream
from dmllm.samplers.whole import WholePredictor
from dmllm.types import PADDING, PREFIX, TEXT, Batch, Step

PREDICTORS = (ApproximatePredictor, BlockPredictor, CausalPredictor, OrderedPredictor, WholePredictor)


def prepare(
    model: Any,
    prompts: Batch,
    config: DecodeConfig,
    mask_id: int,
    use_cache: bool | None = None,
    draft: Tensor | None = None,
    workspaces: Workspaces | None = None,
    kept: Kept | None = None,
) -> tuple[Predict, Canvas, DecodeConfig]:
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
    kind = config.visibility or model.config.visibility
    trained = check_layout(kind)
    if predicts_next(model, kind):
        return _token_by_token(model, prompts, config, mask_id, use_cache, draft, workspaces, kept)
    if config.speculate:
        raise ValueError(
            f"speculate={config.speculate} is for models of which a row predicts the next token and sees none behind "
            f"it; this one has visibility={kind!r}, shift={model.config.shift}. Leave it out."
        )
    if trained is not None and config.blocks_ahead:
        raise ValueError(f"blocks_ahead={config.blocks_ahead}: with visibility={kind!r} no block sees those behind it.")
    if kind == ORDERED:
        check_ordered(config)
    config, draft = _with_suffix(config, draft, len(prompts), mask_id, kind)
    length, scale, policy = config.max_new_tokens, config.cfg_scale, CachePolicy.of(config.cache)
    first = config.prompt_first and model.config.shift and (kind != "full" or policy is not None)
    stores = first or (config.store_calls and use_cache is not False)
    in_loop = first and (trained is not None or policy is not None)
    config = replace(config, store_calls=stores and trained is not None, prompt_first=in_loop)
    if trained is not None:
        config = config.in_whole_blocks(trained)
        calls = {"store_calls": config.store_calls, "prompt_first": config.prompt_first}
        canvas = whole_blocks(_lengths(model, prompts), length, config.block_length or trained, mask_id, **calls)
    else:
        canvas = _canvas(len(prompts), length, mask_id, model.device, draft)
    cached = keeps_cache(model, prompts, kind, use_cache, policy)
    if trained is not None:
        kind = f"block:{config.block_length}"
    given = {"cached": cached, "masked": mask_id if scale else None, "workspaces": workspaces, "kept": kept}
    stream = stream_of(model, prompts, canvas.ids.shape[1], kind, **given)
    if policy is not None:
        return _approximate(stream, prompts, config, policy, draft is not None), canvas, config
    if trained is not None:
        alone = (config.sub_block_length or config.block_length) if config.sub_block_cache else None
        return BlockPredictor(stream, canvas, cfg_scale=scale, sub_block_length=alone, behind=first), canvas, config
    if kind == ORDERED:
        masks = {"cfg_masks_draft": config.cfg_masks_draft, "most": at_most(config)}
        return OrderedPredictor(stream, cfg_scale=scale, **masks), canvas, config
    canvas = replace(canvas, space=getattr(model, "space", None))
    opened = {"block_length": config.block_of(length), "blocks_ahead": config.blocks_ahead}
    predict = WholePredictor(stream, cfg_scale=scale, cfg_masks_draft=config.cfg_masks_draft, **opened)
    if first:
        place = torch.zeros(len(canvas), 1, dtype=torch.int64, device=model.device)
        # Its row is the prompt's last, so this says what computing the prompt has said already: it is no call.
        greedy = replace(config, temperature=0.0, top_p=1.0)
        canvas = canvas.commit(place, estimate(predict(canvas, place), mask_id, greedy).tokens, place == 0)
    return predict, canvas, config


def predicts_next(model: Any, kind: str) -> bool:
    """Whether, under the visibility `kind`, a row says what follows all that it sees: then one is fed at a time."""
    return kind == "causal" and bool(model.config.shift) and process_of(model).masks


def _token_by_token(
    model: Any,
    prompts: Batch,
    config: DecodeConfig,
    mask_id: int,
    use_cache: bool | None,
    draft: Tensor | None,
    workspaces: Workspaces | None,
    kept: Kept | None,
) -> tuple[Predict, Canvas, DecodeConfig]:
    """As `prepare`, for a model that predicts the next token."""
    if config.suffix_ids or draft is not None:
        said = f"suffix_ids={config.suffix_ids}" if draft is None else "draft="
        raise ValueError(f"{said} is not for a model that predicts the next token, and sees none behind it.")
    check_prompts((prompts.documents != PADDING).sum(1).tolist())
    check_drafts(model, config.speculate)
    cached = keeps_cache(model, prompts, "causal", use_cache, CachePolicy.of(config.cache))
    config = token_by_token(config)
    canvas = whole_blocks(_lengths(model, prompts), config.max_new_tokens, 1, mask_id)
    masked = mask_id if config.cfg_scale else None
    given = {"cached": cached, "masked": masked, "workspaces": workspaces, "kept": kept}
    stream = stream_of(model, prompts, config.max_new_tokens, "causal", **given)
    return CausalPredictor(stream, cfg_scale=config.cfg_scale), canvas, config


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


def keeps_cache(
    model: Any, prompts: Batch, kind: str, use_cache: bool | None, policy: CachePolicy | None = None
) -> bool:
    """Whether keys and values are kept: by the policy, or else where that changes nothing.

    Raises:
        ValueError: visibility `kind` or `use_cache` goes against it.
    """
    if policy is not None and kind != "full":
        raise ValueError(
            f"cache={policy.kind} is for models with full attention; with visibility={kind!r} what can be kept is "
            "kept anyway, exactly. Leave cache out."
        )
    if policy is not None and use_cache is not None:
        raise ValueError(f"use_cache={use_cache} and cache={policy.kind} say different things; give one of them.")
    if policy is not None or use_cache is False or check_layout(kind) is not None:
        return use_cache is not False
    timed = is_timed(model)
    changes = timed or kind == "full"
    if changes and use_cache:
        why = "is told the time" if timed else "sees the canvas"
        raise ValueError(
            f"use_cache=True: with visibility={kind!r} the prompt {why}, so what is cached would change; leave "
            "use_cache out."
        )
    return not changes and (prompts.input_ids.shape[1] > 0 or kind == ORDERED)


def _approximate(
    stream: Stream, prompts: Batch, config: DecodeConfig, policy: CachePolicy, given: bool
) -> ApproximatePredictor:
    """Where all rows take as many calls for each block, as none does with a draft `given`, the predictor is told."""
    length, device = stream.length, stream.lengths.device
    images = F.pad(prompts.image_slots.to(device) != TEXT, (0, length)).repeat(stream.copies, 1)
    return ApproximatePredictor(
        stream,
        policy,
        config.block_of(length),
        images,
        cfg_scale=config.cfg_scale,
        cfg_masks_draft=config.cfg_masks_draft,
        period=None if given else config.calls_per_block(length),
    )


@torch.no_grad()
def stream_of(
    model: Any,
    prompts: Batch,
    length: int,
    visibility: str,
    *,
    cached: bool,
    masked: int | None = None,
    workspaces: Workspaces | None = None,
    kept: Kept | None = None,
    streams: int = 1,
) -> Stream:
    """The prompts, pictures encoded, with a canvas of `length` tokens behind each.

    Args:
        cached: whether the stream keeps keys and values.
        masked: a mask token that takes the place of every prompt row, image rows included, in a second copy below.
        workspaces: where a GPU's cache comes from.
        kept: what earlier requests have computed.
        streams: how many times the canvas stands there, at the same positions.
    """
    kept = Kept.of(0, 0) if kept is None else kept
    features, given = kept.images(model, prompts), prompts
    prompts = prompts.to(model.device)
    stream = model.embed(prompts.input_ids, prompts.image_slots, features)
    positions, length = _positions(prompts, length, streams), length * streams
    lengths, copies = _lengths(model, prompts), 1 if masked is None else 2
    if masked is not None:
        hidden = torch.full_like(prompts.input_ids, masked)
        stream = torch.cat([stream, model.embed(hidden, torch.full_like(prompts.image_slots, TEXT))])
        positions, lengths = torch.cat([positions, positions], -2), lengths.repeat(2)
    size, where = stream.shape[1] + length, Workspaces(0) if workspaces is None else workspaces
    cache = where.take(len(stream), size, model) if cached else None
    per_tile = 0 if features is None or given.pixel_values is None else len(features) // len(given.pixel_values)
    loaded, keep = kept.prompts.load(model, cache, visibility, given, per_tile, masked)
    told = {
        "prefix": (prompts.documents == PREFIX).sum(1).repeat(copies),
        "counts": (given.documents != PADDING).sum(1).tolist() * copies,
        "loaded": loaded,
        "keep": keep,
    }
    return Stream(model, stream, positions, lengths, length, visibility, cache, copies=copies, **told)


def _lengths(model: Any, prompts: Batch) -> Tensor:
    return (prompts.documents != PADDING).sum(1).to(model.device)


def _with_suffix(
    config: DecodeConfig, draft: Tensor | None, rows: int, mask_id: int, kind: str
) -> tuple[DecodeConfig, Tensor | None]:
    """The settings and the draft of a canvas with `suffix_ids` behind it: blocks and calls are those without them.

    Raises:
        ValueError: visibility `kind` takes neither.
    """
    if check_layout(kind) is not None and (config.suffix_ids or draft is not None):
        said = f"suffix_ids={config.suffix_ids}" if draft is None else "draft="
        raise ValueError(f"{said} is not for visibility={kind!r}: such a model fills its blocks from left to right.")
    if not (suffix := torch.tensor(config.suffix_ids)).numel():
        return config, draft
    length = config.max_new_tokens
    given = _canvas(rows, length, mask_id, torch.device("cpu"), draft).ids
    config = replace(
        config,
        max_new_tokens=length + len(suffix),
        block_length=config.block_of(length),
        steps=None,
        block_steps=config.steps_per_block(length) if config.num_to_transfer is None else None,
    )
    return config, torch.cat([given, suffix.expand(rows, -1)], 1)


def _canvas(rows: int, length: int, mask_id: int, device: torch.device, draft: Tensor | None) -> Canvas:
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


def likelihoods(
    model: Any,
    prompts: list[Batch],
    answers: list[Tensor],
    mask_id: int,
    draws: list[Generator],
    *,
    num_samples: int,
    hidden: Any,
    batch_size: int,
    cfg_scale: float,
    use_cache: bool | None,
    kept: Kept | None = None,
    orders: Any = None,
) -> Tensor:
    """log p(answer | prompt) in nats for each pair, [B] float64 (see `samplers.likelihood`): a bound from random views
    or orders, or where a row predicts the next token itself, in one call.

    Args:
        prompts: each a batch of one.
        answers: [n] int64 each.
        hidden: [S, n] bool, in place of `num_samples` drawn views; for one answer.
        orders: [S, n], in place of drawn ones, for models that know every order; each is exact by itself.

    Raises:
        ValueError: numbers or shapes do not fit, or the answer is not on one canvas.
    """
    kind, bound = model.config.visibility, process_of(model).log_likelihood
    if bound is None:
        check_masks(model, "score()")
    exact, ordered = predicts_next(model, kind), kind == ORDERED
    if (orders is not None and not ordered) or (hidden is not None and ordered):
        raise ValueError(f"visibility={kind!r} takes {'orders= in place of hidden' if ordered else 'no orders'}=.")
    if kind not in ("full", "prefix") and not exact and not ordered:
        raise ValueError(f"Likelihoods need a model that masks a whole answer at once, not visibility={kind!r}.")
    if (exact or bound is not None) and hidden is not None:
        raise ValueError("hidden= is for models that mask; this one has a likelihood of its own. Leave it out.")
    if exact:
        check_prompts([int((prompt.documents != PADDING).sum()) for prompt in prompts])
    if len(answers) != len(prompts) or not all(answer.ndim == 1 and len(answer) for answer in answers):
        raise ValueError(f"answer_ids: {len(answers)} for {len(prompts)} prompts; give each one that is not empty.")
    found = []
    for prompt, answer, own in zip(prompts, answers, draws, strict=True):
        cached = keeps_cache(model, prompt, kind, use_cache)
        masked, streams = mask_id if cfg_scale else None, 2 if ordered else 1
        given = {"cached": cached, "masked": masked, "kept": kept, "streams": streams}
        stream = stream_of(model, prompt, len(answer), kind, **given)
        predict = WholePredictor(stream, cfg_scale=cfg_scale)
        if ordered:
            ranks = draw_ranks(len(answer), num_samples, own, orders).to(answer.device)
            found.append(order_values(stream, answer, ranks, mask_id, batch_size, cfg_scale).mean())
            continue
        if exact:
            found.append(chain_rule(predict, answer, mask_id))
            continue
        if bound is not None:
            found.append(bound(predict, answer, own, num_samples, batch_size))
            continue
        views = draw_views(len(answer), num_samples, own) if hidden is None else torch.as_tensor(hidden).bool()
        if views.shape[1:] != answer.shape or not bool(views.any(1).all()) or (hidden is not None and len(answers) > 1):
            raise ValueError(
                f"hidden is {tuple(views.shape)} for {len(answers)} answers; it takes [views, {len(answer)}] for one "
                "answer, with something hidden in each view."
            )
        found.append(likelihood(predict, answer, views.to(answer.device), mask_id, batch_size))
    return torch.stack(found)


def _positions(prompts: Batch, length: int, streams: int) -> Tensor:
    """Positions [B, P + N] or [4, B, P + N]: the canvas continues each prompt from its own last one, which on three
    axes is the largest of the three; once for each stream."""
    real, positions = prompts.documents != PADDING, prompts.positions
    after = F.pad(torch.where(real, positions, -1), (1, 0), value=-1).amax(-1, keepdim=True) + 1
    if positions.ndim == 3:
        after = torch.cat([after[:1], after[1:].amax(0, keepdim=True).expand(3, -1, -1)])
    following = after + torch.arange(length, device=real.device)  # [B, N] or [4, B, N]
    return torch.cat([positions, *[following] * streams], -1)
