"""Decoding models of which a row predicts the next token: one token after another, each computed once.

A call feeds the last known token alone, or with it drafts of those behind, and asks for what follows each; there is no
row for the token that is asked for. The first call on a CPU feeds the prompt too. What a draft has left in the cache is
written over once another token stands in its place.

Shapes: B rows of the batch (twice the requests under guidance), N canvas tokens, K places asked for, n tokens that a
row predicts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmllm.nn.cache import KVCache
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.stream import Stream, ask, guided

HEAD = "mtp"  # the head that says what stands behind the next token
WALK: dict[str, Any] = {"block_length": 1, "block_steps": 1}
KEPT = (
    *("max_new_tokens", "temperature", "top_p", "suppress_ids", "eos_token_id", "stop_sequences"),
    *("constraint", "choices", "cfg_scale", "visibility", "speculate"),
)


def token_by_token(config: DecodeConfig) -> DecodeConfig:
    """The settings that mean something here; which token comes next, and how many calls it takes, are not for choice.

    Raises:
        ValueError: drafts with a constraint, which allows tokens one by one.
    """
    if config.speculate and (config.constraint is not None or config.choices is not None):
        raise ValueError(
            f"speculate={config.speculate}: a constraint is followed token by token; leave one of them out."
        )
    return DecodeConfig(**{name: getattr(config, name) for name in KEPT}, **WALK)


def check_drafts(model: Any, speculate: int) -> None:
    """Raises ValueError where the model has no heads that draft `speculate` tokens."""
    heads = getattr(model.config, "heads", None) or {}
    most = heads[HEAD]["n"] - 1 if HEAD in heads else 0
    if speculate > most:
        raise ValueError(
            f"speculate={speculate}: this model's heads draft {most} tokens; "
            + (f"say at most {most}, or " if most else "leave it out, or ")
            + f"train with objective.name=autoregressive, objective.options.mtp={speculate + 1}."
        )


def check_prompts(lengths: list[int]) -> None:
    """Raises ValueError for a prompt of no rows: then nothing predicts the first token."""
    if 0 in lengths:
        raise ValueError(
            f"Request {lengths.index(0)} has an empty prompt, and a token is predicted by the row before it; begin "
            "with a token such as the end of sequence, as the training texts did."
        )


class CausalPredictor:
    """`predictor(canvas, rows) -> logits [B, K, V]` for `denoise`, where all before `rows` [B, K] is known.

    Args:
        stream: the requests, none with an empty prompt; without a cache all before `rows` is fed in every call.
        cfg_scale: guidance, 0 for none.
    """

    def __init__(self, stream: Stream, *, cfg_scale: float = 0.0):
        self.stream, self.cfg_scale = stream, cfg_scale
        self._begun = stream.cache is not None and stream.static
        if self._begun:  # so that every call is as wide
            stream.store(left=1)

    def __call__(self, canvas: Canvas, rows: Tensor) -> Tensor:
        return self._feed(canvas, canvas.ids, rows, next_token)

    def drafting(self, canvas: Canvas, ids: Tensor, rows: Tensor) -> Tensor:
        """Logits [B, K, n, V] of the tokens at the canvas positions `rows` [B, K], which stand in order and may reach
        beyond the canvas, and of those behind each: given `ids` [B, N], the canvas with drafts on it."""
        return self._feed(canvas, ids, rows, tokens_ahead)

    @torch.no_grad()
    def _feed(self, canvas: Canvas, ids: Tensor, rows: Tensor, call: Any) -> Tensor:
        stream = self.stream
        stream.follow(canvas.requests)
        places = rows.repeat(stream.copies, 1) + stream.lengths[:, None] - 1  # of those that predict
        start, end = places[:, 0], (places[:, -1] + 1).minimum(stream.lengths + stream.length - 1)
        width = rows.shape[1]
        if stream.cache is None:
            start, width = torch.zeros_like(start), stream.given + stream.length
        elif not self._begun:
            start = start.minimum(torch.tensor(stream.loaded, device=start.device))
        window = stream.run(start, end, width)
        nothing = torch.zeros(len(start), device=start.device)
        said = stream.feed(ids.repeat(stream.copies, 1), *window, places, nothing, call=call)
        stream.stored()
        self._begun = stream.cache is not None
        return guided(said, self.cfg_scale)


def next_token(model: Any, cache: KVCache | None, *inputs: Tensor) -> Tensor:
    """Logits [B, K, V] of the token behind each of the rows asked for; `inputs` as those of `stream.ask`."""
    return ask(model, cache, inputs, rows=inputs[-2], following=True).logits


def tokens_ahead(model: Any, cache: KVCache | None, *inputs: Tensor) -> Tensor:
    """Logits [B, K, n, V] of the token behind each of the rows asked for, and of those behind that."""
    output = ask(model, cache, inputs, rows=inputs[-2], following=True, heads={HEAD: inputs[-2]})
    return torch.cat([output.logits[..., None, :], output.heads[HEAD]], -2)
