"""Denoising by growth: a canvas on which each call inserts masks into gaps and fills some of those that are there.

What is gone at noise level n is inserted at rate 1/n. A call goes from one level to the next, n', evenly spaced from 1
to 0: of the tokens that a gap is said to miss it inserts a share 1 - n'/n, rounded for all gaps of a row together, so
that a row grows by its expectation to within one token, and where calls are many exactly as the process does. The last
call only fills. Which masks are filled is for the rules to say, as many as would be by then; `remasking: origin` fills
each by itself with that probability, as in the process.

`max_new_tokens` is the room there is; how long the answer is comes out. At temperature 0 nothing is drawn, and what
rounding leaves over goes to the next call: a text that grew late would be taken for a short one.
A canvas with known tokens grows between the masks among them and behind the last; a gap between two known tokens, or
between the prompt and one, is closed.

Source: Kim et al., FlexMDM, arXiv:2509.01025, algorithms 1 and 2; code brianlck/FlexMDM, which draws Poisson numbers in
place of rounding together. Time: t = 0 is clean, t = 1 is nothing, and the time a model is told is n.
Shapes: B rows, N places, K positions asked for, V vocabulary; gap i of N + 1 is in front of place i.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dmllm.diffusion.insertion import GONE, MASKED, Insertion, divergence
from dmllm.diffusion.schedules import Linear
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import REMASKING, DecodeConfig
from dmllm.samplers.draws import numbers
from dmllm.samplers.estimate import estimate
from dmllm.samplers.process import Process
from dmllm.samplers.rules import accepted, choose
from dmllm.samplers.stream import is_static
from dmllm.types import Vocabulary

HEAD = "insertion"  # the head that says how many tokens are missing
MOST = 20.0  # of the logarithm of a number of missing tokens; what no row feeds may say anything
USED = (
    *("max_new_tokens", "steps", "remasking", "threshold", "factor", "entropy_bound", "temperature", "top_p"),
    *("suppress_ids", "distrust_ids", "count_mask", "cfg_scale", "cfg_masks_draft", "eos_token_id", "stop_sequences"),
)


def begin(canvas: Canvas, config: DecodeConfig, draws: list[Generator]) -> Canvas:
    """As many places as reach to the last known token, and its gaps; given both, the canvas as it is.

    Raises:
        ValueError: a setting that means nothing here, or a single call.
    """
    _check(config, canvas.ids.shape[1])
    known = canvas.committed
    if canvas.extent is None:
        places = torch.arange(1, known.shape[1] + 1, device=known.device)
        canvas = replace(canvas, extent=(known * places).amax(1))
    if canvas.closed is None:
        before = torch.cat([torch.ones_like(known[:, :1]), known[:, :-1]], 1)
        canvas = replace(canvas, closed=torch.cat([known & before, torch.zeros_like(known[:, :1])], 1))
    grows = (_gaps(canvas) & ~canvas.closed).any(1) & (canvas.extent < known.shape[1])  # type: ignore[operator]
    done = ~grows & ~_masks(canvas).any(1)
    calls = torch.where(done, _calls(config, canvas), 0)
    owed = torch.full((len(canvas), 2), 0.5, dtype=torch.float64, device=known.device)
    return replace(canvas, calls=calls, owed=owed, time=_level(canvas, calls, config))


def finished(canvas: Canvas, config: DecodeConfig) -> Tensor:
    """[B] bool: all calls are spent."""
    return canvas.calls >= _calls(config, canvas)


def advance(
    predict: Any, canvas: Canvas, config: DecodeConfig, draws: list[Generator], constraint: Any = None
) -> Canvas:
    """One model call: what it fills, and what it inserts.

    Args:
        predict: has `with_head` beside, (canvas, rows [B, K], head, others [B, G]) -> logits [B, K, V] and what the
            head says of the rows `others`, of which -1 is the prompt's last.

    Raises:
        ValueError: a constraint, which needs places that stay where they are.
    """
    if constraint is not None:
        raise ValueError("A constraint needs a canvas whose length is known; leave constraint and choices out.")
    size, device = canvas.ids.shape[1], canvas.ids.device
    random = config.draws_tokens or config.draws_order
    uniform = numbers(draws, 2 * size + 2, device) if random else torch.zeros(len(canvas), 2 * size, device=device)
    phase: Tensor = uniform[:, -2:] if random else canvas.owed  # type: ignore[assignment]
    rows, asked = _asked(canvas)
    gaps = torch.arange(-1, size, device=device).expand(len(canvas), -1)
    if not is_static(device):
        gaps = gaps[:, : int(canvas.extent.max()) + 1]  # type: ignore[union-attr]
    logits, expected = predict.with_head(canvas, rows, HEAD, gaps)
    left = _calls(config, canvas) - 1 - canvas.calls  # calls after this one
    share = 1 / left.clamp(min=1)
    filled, fresh, unfilled = _fill(canvas, config, logits, rows, asked, uniform, share, phase[:, 1])
    mean = F.pad(expected.double().clamp(max=MOST).exp(), (0, size + 1 - expected.shape[1])) * share[:, None]
    counts, missing = _together(mean * (left > 0)[:, None], canvas, phase[:, :1])
    grown, calls = insert(filled, counts), canvas.calls + 1
    owed = torch.stack([missing, unfilled], 1)
    grown = replace(grown, calls=calls, forwards=canvas.forwards + 1, accepted=fresh, owed=owed)
    return replace(_ended(grown, config, left == 0), time=_level(grown, calls, config))


@torch.no_grad()
def log_likelihood(
    predict: Any, answer: Tensor, draws: Generator, num_samples: int, batch_size: int, *, mask_id: int
) -> Tensor:
    """A lower bound on log p(answer [n]) in nats, a float64 scalar: the tight one, as a mean over times and states.

    Times are drawn closer together at both ends, where the bound is steep, and weigh as much less.
    """
    device, size = answer.device, len(answer)
    offset = torch.rand((), generator=draws, dtype=torch.float64, device=draws.device).cpu()
    place = ((offset + torch.arange(num_samples, dtype=torch.float64) / num_samples) % 1).clamp(1e-3, 1 - 1e-3)
    t, weight = place**2 * (3 - 2 * place), 6 * place * (1 - place)
    uniform = torch.rand(num_samples, size, 2, generator=draws, dtype=torch.float64, device=draws.device).cpu()
    states = Insertion(Linear(), Linear()).states(t[:, None], uniform)
    order = (states == GONE).long().argsort(dim=1, stable=True).to(device)
    states, t, weight = states.to(device), t.to(device), weight.to(device)
    extent, total = (states != GONE).sum(1), torch.zeros((), dtype=torch.float64, device=device)
    there = torch.arange(size, device=device) < extent[:, None]
    ends = F.pad(torch.where(there, order, size), (1, 1), value=size)
    ends[:, 0] = -1
    missing = (ends.diff(dim=1) - 1).clamp(min=0)  # in each gap, [S, n + 1]
    ids, masks = answer[order], (states.gather(1, order) == MASKED) & there
    for part in torch.arange(num_samples, device=device).split(batch_size):
        canvas = Canvas.of(ids[part], there[part] & ~masks[part], mask_id)
        canvas = replace(canvas, requests=torch.zeros_like(part), extent=extent[part], time=t[part].float())
        rows = torch.arange(-1, size, device=device).expand(len(part), -1)
        logits, expected = predict.with_head(canvas, rows[:, 1:], HEAD, rows)
        logits = logits.float().index_fill(-1, torch.tensor([mask_id], device=device), -torch.inf)
        tokens = -logits.log_softmax(-1).gather(-1, ids[part][..., None]).squeeze(-1)
        counts = divergence(expected, missing[part], tight=True).masked_fill(~_gaps(canvas), 0.0)
        cost = tokens.masked_fill(~masks[part], 0.0).sum(1) + counts.sum(1)
        total -= (cost * weight[part] / t[part]).sum()
    return total / num_samples


def insert(canvas: Canvas, counts: Tensor) -> Canvas:
    """The canvas with `counts` [B, N + 1] masks more in its gaps, as far as there is room; what is behind moves on."""
    assert canvas.extent is not None
    assert canvas.closed is not None
    size = canvas.ids.shape[1]
    moved = counts.cumsum(1).minimum((size - canvas.extent)[:, None])
    places = torch.arange(size + 1, device=counts.device)
    there = places < canvas.extent[:, None]
    to = torch.where(there, places + moved, size)[:, :-1]
    gap = torch.where(places <= canvas.extent[:, None], places + moved, size + 1)
    tail = canvas.extent + moved[:, -1]

    def move(values: Tensor, where: Tensor, empty: int) -> Tensor:
        room = torch.full((len(values), values.shape[1] + 1), empty, dtype=values.dtype, device=values.device)
        return room.scatter(1, where, values)[:, :-1]

    return replace(
        canvas,
        ids=move(canvas.ids, to, canvas.mask_id),
        committed=move(canvas.committed, to, False),
        editable=move(canvas.editable, to, True),
        closed=move(canvas.closed, gap, False),
        extent=tail,
    )


def _fill(
    canvas: Canvas,
    config: DecodeConfig,
    logits: Tensor,
    rows: Tensor,
    asked: Tensor,
    uniform: Tensor,
    share: Tensor,
    phase: Tensor,
) -> tuple[Canvas, Tensor, Tensor]:
    """Some masks filled, about a `share` [B] of them; how many, [B]; and what rounding leaves over, [B]."""
    size = canvas.ids.shape[1]
    seen = estimate(logits, canvas.mask_id, config, uniform[:, :size].gather(1, rows))
    order = uniform[:, size : 2 * size].gather(1, rows)
    doubt = REMASKING.load(config.remasking)(seen, order)
    for token in config.distrust_ids:
        doubt = doubt.masked_fill(seen.tokens == token, torch.finfo(doubt.dtype).max)
    sure = accepted(seen, doubt, asked, config, torch.zeros_like(rows), share)
    due = asked.sum(1) * share.double() + phase
    least = (asked & (order < share[:, None])).sum(1) if config.remasking == "origin" else due.floor().long()
    chosen = choose(doubt, sure, asked, least)
    return canvas.commit(rows, seen.tokens, chosen), chosen.sum(1), due.frac()


def _together(mean: Tensor, canvas: Canvas, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [B, N + 1] of these means, rounded so that also their sums are, and what that leaves over, [B].

    Gaps that do not grow have none.

    Args:
        phase: [B, 1] in [0, 1); drawn evenly, every number is right on average.
    """
    mean = mean.masked_fill(~_gaps(canvas) | canvas.closed, 0.0)  # type: ignore[operator]
    due = mean.cumsum(1) + phase
    sums = due.floor().long()
    return sums.diff(dim=1, prepend=torch.zeros_like(sums[:, :1])), due[:, -1].frac()


def _ended(canvas: Canvas, config: DecodeConfig, last: Tensor) -> Canvas:
    """Behind a complete answer, where there is room and the text may go on, an end of sequence that says so."""
    if not config.stop_ids:
        return canvas
    assert canvas.extent is not None
    assert canvas.closed is not None
    open_end = ~canvas.closed.gather(1, canvas.extent[:, None])
    place = torch.arange(canvas.ids.shape[1], device=canvas.ids.device) == canvas.extent[:, None]
    here = place & open_end & last[:, None]
    return replace(canvas, ids=canvas.ids.masked_fill(here, config.stop_ids[0]), committed=canvas.committed | here)


def _asked(canvas: Canvas) -> tuple[Tensor, Tensor]:
    """The masks' places, [B, K], and which of these are masks; on a GPU, every place."""
    masks = _masks(canvas)
    if is_static(masks.device):
        return torch.arange(masks.shape[1], device=masks.device).expand_as(masks), masks
    rows = (~masks).long().argsort(dim=1, stable=True)[:, : int(masks.sum(1).max())]
    return rows, masks.gather(1, rows)


def _masks(canvas: Canvas) -> Tensor:
    """Which of the N places there are and open, [B, N] bool."""
    assert canvas.extent is not None
    return (torch.arange(canvas.ids.shape[1], device=canvas.ids.device) < canvas.extent[:, None]) & ~canvas.committed


def _gaps(canvas: Canvas) -> Tensor:
    """Which of the N + 1 gaps there are, [B, N + 1] bool."""
    assert canvas.extent is not None
    return torch.arange(canvas.ids.shape[1] + 1, device=canvas.ids.device) <= canvas.extent[:, None]


def _calls(config: DecodeConfig, canvas: Canvas) -> int:
    return config.steps or max(canvas.ids.shape[1], 2)


def _level(canvas: Canvas, calls: Tensor, config: DecodeConfig) -> Tensor:
    """The noise level before a row's next call, [B] float32: how much is gone."""
    return (1 - calls / (_calls(config, canvas) - 1)).clamp(min=0)


def _check(config: DecodeConfig, length: int) -> None:
    """Raises ValueError for a setting that means nothing here."""
    usual = DecodeConfig()
    for name, value in config.chosen.items():
        if name not in USED and not (name == "visibility" and value == "full"):
            raise ValueError(
                f"{name}={value!r:.80} is not for a model that inserts tokens: its canvas has neither blocks nor a "
                f"length; leave it out, or say {name}={getattr(usual, name)!r} where a checkpoint's defaults have it. "
                f"It takes {', '.join(USED)}."
            )
    if config.steps == 1:
        raise ValueError("steps=1: one call inserts and a later one fills; say at least 2.")


INSERTION = Process(advance, finished, begin, grows=True)


def process(vocabulary: Vocabulary) -> Process:
    """The process of a model with these special ids, which can say a likelihood."""
    return replace(INSERTION, log_likelihood=partial(log_likelihood, mask_id=vocabulary.mask))
