"""A model that has been given its prompts: what the denoising loop calls.

The pictures are encoded once and the prompts embedded once. Where no prompt row sees the canvas, which the visibility
rule itself tells, the prompts' keys and values are computed once too, and a call feeds the canvas alone; that changes
no result. Otherwise a call feeds prompts and canvas together. Block-causal models: `samplers.blocks`.

Shapes: B requests, P prompt rows (padded on the right), N canvas tokens, K positions asked for, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dmllm.models.projectors import resize_maps
from dmllm.nn.cache import KVCache
from dmllm.nn.visibility import Visibility, check_layout, layout
from dmllm.requests import fingerprint
from dmllm.samplers.approximate import ApproximatePredictor
from dmllm.samplers.blocks import BlockPredictor, whole_blocks
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import Predict
from dmllm.samplers.estimate import estimate
from dmllm.samplers.likelihood import draw_views, likelihood
from dmllm.samplers.policy import CachePolicy
from dmllm.samplers.stream import Stream, asked_twice, guided
from dmllm.types import PADDING, TEXT, Batch


def prepare(
    model: Any,
    prompts: Batch,
    config: DecodeConfig,
    mask_id: int,
    use_cache: bool | None = None,
    draft: Tensor | None = None,
) -> tuple[Predict, Canvas, DecodeConfig]:
    """What `denoise` takes for these prompts, of one row a request: the model given them, a canvas, settings.

    Args:
        draft: [B, D] ids that the canvas begins with, open where they are `mask_id`; None is a blank canvas.

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
    config, draft = _with_suffix(config, draft, len(prompts), mask_id, kind)
    length, scale, policy = config.max_new_tokens, config.cfg_scale, CachePolicy.of(config.cache)
    first = config.prompt_first and model.config.shift and (kind != "full" or policy is not None)
    stores = first or (config.store_calls and use_cache is not False)
    in_loop = first and (trained is not None or policy is not None)
    config = replace(config, store_calls=stores and trained is not None, prompt_first=in_loop)
    if policy is not None:
        _check_policy(policy, kind, use_cache)
        canvas = _canvas(len(prompts), length, mask_id, model.device, draft)
        predict = _approximate(model, prompts, canvas, config, policy)
        return predict, canvas, config
    if trained is None:
        predict = Predictor(
            model,
            prompts,
            length,
            mask_id,
            cfg_scale=scale,
            cfg_masks_draft=config.cfg_masks_draft,
            use_cache=use_cache,
            visibility=kind,
        )
        canvas = _canvas(len(prompts), length, mask_id, model.device, draft)
        if first:
            place = torch.zeros(len(canvas), 1, dtype=torch.int64, device=model.device)
            # Its row is the prompt's last, so this says what computing the prompt has said already: it is no call.
            greedy = replace(config, temperature=0.0, top_p=1.0)
            canvas = canvas.commit(place, estimate(predict(canvas, place), mask_id, greedy).tokens, place == 0)
        return predict, canvas, config
    config = config.in_whole_blocks(trained)
    assert config.block_length is not None
    lengths = (prompts.documents != PADDING).sum(1).to(model.device)
    calls = {"store_calls": config.store_calls, "prompt_first": config.prompt_first}
    canvas = whole_blocks(lengths, length, config.block_length, mask_id, **calls)
    with torch.no_grad():
        stream, _, positions = _streams(model, prompts, canvas.ids.shape[1], mask_id if scale else None)
    width = canvas.ids.shape[1]
    predict = BlockPredictor(
        Stream(
            model,
            stream,
            positions,
            lengths.repeat(2 if scale else 1),
            width,
            f"block:{config.block_length}",
            None if use_cache is False else KVCache(stream.shape[1] + width),
        ),
        canvas,
        cfg_scale=scale,
        sub_block_length=(config.sub_block_length or config.block_length) if config.sub_block_cache else None,
    )
    return predict, canvas, config


def _check_policy(policy: CachePolicy, kind: str, use_cache: bool | None) -> None:
    """Raise ValueError where visibility `kind` or `use_cache` goes against an approximate cache."""
    if kind != "full":
        raise ValueError(
            f"cache={policy.kind} is for models with full attention; with visibility={kind!r} what can be kept is "
            "kept anyway, exactly. Leave cache out."
        )
    if use_cache is not None:
        raise ValueError(f"use_cache={use_cache} and cache={policy.kind} say different things; give one of them.")


@torch.no_grad()
def _approximate(
    model: Any, prompts: Batch, canvas: Canvas, config: DecodeConfig, policy: CachePolicy
) -> ApproximatePredictor:
    twice, length = 2 if config.cfg_scale else 1, canvas.ids.shape[1]
    stream, documents, positions = _streams(model, prompts, length, canvas.mask_id if config.cfg_scale else None)
    lengths = (prompts.documents != PADDING).sum(1).to(model.device).repeat(twice)
    images = F.pad(prompts.image_slots.to(model.device) != TEXT, (0, length)).repeat(twice, 1)
    fed = Stream(model, stream, positions, lengths, length, "full", KVCache(documents.shape[1]))
    return ApproximatePredictor(
        fed,
        policy,
        config.block_of(length),
        images,
        cfg_scale=config.cfg_scale,
        cfg_masks_draft=config.cfg_masks_draft,
    )


@dataclass(frozen=True)
class _Prompts:
    """The prompts of some requests, ready to be fed."""

    stream: Tensor  # [B, P, D] embeddings
    positions: Tensor  # [B, P + N] or [4, B, P + N]
    visibility: Visibility  # of P + N rows
    cache: KVCache | None

    def select(self, rows: Tensor) -> _Prompts:
        cache = None if self.cache is None else self.cache.select(rows)
        if cache is not None:
            first, size = self.stream.shape[1], self.visibility.rank.shape[1]
            cache.put(torch.arange(first, size, device=rows.device).expand(len(rows), -1))
        positions = self.positions.index_select(-2, rows)
        return _Prompts(self.stream[rows], positions, self.visibility.select(rows), cache)


class Predictor:
    """`predictor(canvas, rows) -> logits [B, K, V]` for `samplers.denoise`.

    Args:
        model: a `MultimodalModel`, or what is called like one.
        prompts: one row a request, without labels.
        length: N.
        mask_id: the mask token.
        cfg_scale: above 0, each request is also asked without its prompt (every prompt row a mask token, image rows
            included) and the logits are un + (cfg_scale + 1)(cond - un).
        cfg_masks_draft: whether it is then asked without what was given on the canvas too.
        use_cache: None caches where it is exact; False never.
        visibility: a name of `LAYOUTS`; None is the model's own.

    Raises:
        ValueError: `use_cache=True` where a cache would change the result.
    """

    def __init__(
        self,
        model: Any,
        prompts: Batch,
        length: int,
        mask_id: int,
        *,
        cfg_scale: float = 0.0,
        cfg_masks_draft: bool = False,
        use_cache: bool | None = None,
        visibility: str | None = None,
    ):
        self.model, self.cfg_scale, self.visibility = model, cfg_scale, visibility or model.config.visibility
        self._masks_draft = cfg_masks_draft
        with torch.no_grad():
            stream, documents, positions = _streams(model, prompts, length, mask_id if cfg_scale else None)
            canvas = torch.arange(documents.shape[1], device=documents.device) >= stream.shape[1]
            rule = layout(self.visibility, documents=documents, canvas=canvas.expand_as(documents))
            cache = self._cache(stream, positions, rule, use_cache)
        self._all = self._now = _Prompts(stream, positions, rule, cache)
        self._requests: Tensor | None = None

    @torch.no_grad()
    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """Logits [B, K, V] at the canvas positions `rows` [B, K]."""
        now = self._prompts_of(canvas.requests)
        given = now.stream.shape[1]
        ids, time = asked_twice(canvas, self.cfg_scale, self._masks_draft), canvas.time
        if self.cfg_scale:
            rows, time = rows.repeat(2, 1), time.repeat(2)
        stream, positions, visibility = self.model.embed(ids), now.positions, now.visibility
        if now.cache is None:
            stream, rows = torch.cat([now.stream, stream], 1), rows + given
        else:
            positions, visibility = positions[..., given:], _columns(visibility, slice(given, None))
        logits = self.model(
            inputs_embeds=stream, positions=positions, visibility=visibility, cache=now.cache, time=time, rows=rows
        ).logits
        return guided(logits, self.cfg_scale)

    def _prompts_of(self, requests: Tensor) -> _Prompts:
        """The prompts of the rows that are left; selected anew only when rows have left."""
        if self._requests is not requests:
            whole = len(self._all.stream) // (2 if self.cfg_scale else 1)
            if len(requests) == whole:
                self._now = self._all
            else:
                self._now = self._all.select(torch.cat([requests, requests + whole]) if self.cfg_scale else requests)
            self._requests = requests
        return self._now

    def _cache(
        self, stream: Tensor, positions: Tensor, visibility: Visibility, use_cache: bool | None
    ) -> KVCache | None:
        """The prompts' keys and values; None where there are none, or where they depend on the canvas."""
        given = stream.shape[1]
        if use_cache is False or not given:
            return None
        timed = (getattr(self.model.config, "backbone", None) or {}).get("time_conditioning")
        if timed or bool(visibility.dense()[:, :, :given, given:].any()):
            if use_cache:
                why = "is told the time" if timed else "sees the canvas"
                raise ValueError(
                    f"use_cache=True: with visibility={self.visibility!r} the prompt {why}, so what is cached would "
                    "change; leave use_cache out."
                )
            return None
        batch, places = len(stream), torch.arange(visibility.rank.shape[1], device=stream.device)
        cache = KVCache(len(places))
        cache.put(places[:given].expand(batch, -1))
        self.model(
            inputs_embeds=stream,
            positions=positions[..., :given],
            visibility=_columns(visibility, slice(given)),
            cache=cache,
            rows=places[:0].expand(batch, -1),
        )
        cache.put(places[given:].expand(batch, -1))
        return cache


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
    hidden: Tensor | None,
    batch_size: int,
    **options: Any,
) -> Tensor:
    """log p(answer | prompt) in nats for each pair, [B] float64 (see `samplers.likelihood`).

    Args:
        prompts: each a batch of one; `options` are those of `Predictor`.
        answers: [n] int64 each.
        hidden: [S, n] bool, in place of `num_samples` drawn views; for one answer.

    Raises:
        ValueError: numbers or shapes do not fit, or the answer is not on one canvas.
    """
    kind = model.config.visibility
    if kind not in ("full", "prefix"):
        raise ValueError(f"Likelihoods need a model that masks a whole answer at once, not visibility={kind!r}.")
    if len(answers) != len(prompts) or not all(answer.ndim == 1 and len(answer) for answer in answers):
        raise ValueError(f"answer_ids: {len(answers)} for {len(prompts)} prompts; give each one that is not empty.")
    found = []
    for prompt, answer, own in zip(prompts, answers, draws, strict=True):
        views = draw_views(len(answer), num_samples, own).to(answer.device) if hidden is None else hidden
        if views.shape[1:] != answer.shape or not bool(views.any(1).all()) or (hidden is not None and len(answers) > 1):
            raise ValueError(
                f"hidden is {tuple(views.shape)} for {len(answers)} answers; it takes [views, {len(answer)}] for one "
                "answer, with something hidden in each view."
            )
        predict = Predictor(model, prompt, len(answer), mask_id, **options)
        found.append(likelihood(predict, answer, views, mask_id, batch_size))
    return torch.stack(found)


def encode_distinct(model: Any, prompts: Batch) -> Tensor | None:
    """The image features of a batch [T * rows, D], each distinct tile encoded once; None without images."""
    if prompts.pixel_values is None:
        return None
    if prompts.image_grids is not None:
        return _encode_pictures(model, prompts.pixel_values, prompts.image_grids)
    places: dict[str, int] = {}
    order = [places.setdefault(fingerprint(tile), len(places)) for tile in prompts.pixel_values]
    first = [order.index(k) for k in range(len(places))]
    features = model.encode_images(prompts.pixel_values[first].to(model.device))
    per_tile = features.view(len(places), -1, features.shape[-1])
    features = per_tile[torch.tensor(order, device=features.device)].flatten(0, 1)
    return features if prompts.image_resizes is None else resize_maps(features, prompts.image_resizes, model.image_grid)


def _encode_pictures(model: Any, tiles: Tensor, grids: Tensor) -> Tensor:
    """The features of pictures of native size [T, D], each distinct picture encoded once."""
    pictures = tiles.split(grids.prod(1).tolist())
    keys = [fingerprint(picture, grid) for picture, grid in zip(pictures, grids, strict=True)]
    distinct = {key: number for number, key in reversed(list(enumerate(keys)))}
    chosen = sorted(distinct.values())
    pixels = torch.cat([pictures[number] for number in chosen]).to(model.device)
    features = model.encode_images(pixels, image_grids=grids[chosen]).split(grids[chosen].prod(1).tolist())
    return torch.cat([features[chosen.index(distinct[key])] for key in keys])


def _streams(model: Any, prompts: Batch, length: int, mask_id: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts' embeddings [B, P, D]; documents [B, P + N] and positions, of the canvas too.

    With `mask_id` they stand a second time below the first, every prompt row a mask token, image rows included.
    """
    features = encode_distinct(model, prompts)
    prompts = prompts.to(model.device)
    stream = model.embed(prompts.input_ids, prompts.image_slots, features)
    documents, positions = _with_canvas(prompts, length)
    if mask_id is not None:
        masked = torch.full_like(prompts.input_ids, mask_id)
        stream = torch.cat([stream, model.embed(masked, torch.full_like(prompts.image_slots, TEXT))])
        documents, positions = documents.repeat(2, 1), torch.cat([positions, positions], -2)
    return stream, documents, positions


def _with_canvas(prompts: Batch, length: int) -> tuple[Tensor, Tensor]:
    """Documents [B, P + N] and positions: the canvas continues each prompt's document from its own last position, which
    on three axes is the largest of the three."""
    real, positions = prompts.documents != PADDING, prompts.positions
    after = F.pad(torch.where(real, positions, -1), (1, 0), value=-1).amax(-1, keepdim=True) + 1
    if positions.ndim == 3:
        after = torch.cat([after[:1], after[1:].amax(0, keepdim=True).expand(3, -1, -1)])
    following = after + torch.arange(length, device=real.device)  # [B, N] or [4, B, N]
    documents = torch.cat([prompts.documents, real.new_zeros(len(real), length, dtype=torch.int64)], 1)
    return documents, torch.cat([positions, following], -1)


def _columns(visibility: Visibility, which: slice) -> Visibility:
    return Visibility(visibility.rank[:, which], visibility.canvas[:, which], visibility.document[:, which])
