"""log p(answer | prompt, images): exact where a model says it, else by views or orders drawn at random.

Shapes: B requests, S views or orders, n tokens of an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from dmllm.computed import Kept
from dmllm.nn.visibility import ORDERED
from dmllm.prompted import keeps_cache, predicts_next, stream_of
from dmllm.samplers import check_masks, process_of
from dmllm.samplers.causal import check_prompts
from dmllm.samplers.likelihood import chain_rule, draw_views, likelihood
from dmllm.samplers.ordered import draw_ranks, order_values
from dmllm.samplers.whole import WholePredictor
from dmllm.types import PADDING, Batch


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
        blank, streams = mask_id if cfg_scale else None, 2 if ordered else 1
        given = {"cached": cached, "blank": blank, "kept": kept, "streams": streams}
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
