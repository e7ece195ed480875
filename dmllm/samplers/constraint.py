"""Constrained decoding on a canvas that is filled in any order: the finished text is one of a language, always.

Each call sees the canvas as a chain: what is known is fixed, what is asked for has the model's probabilities, what is
not asked for yet is free. Weighted by the automaton of the language (forward and backward messages over its states)
the model's distributions become those *given that the text will match*: by these the decoding rules judge doubt. The
tokens are those of one whole text: the most probable one (Viterbi), or at a temperature one drawn from the exact
posterior (backward messages, then forward). Any part of it may be committed, for the rest of it remains possible.

Where the text can go on in one way only, its tokens are committed at once, whatever a call's quota.

Source: Suresh et al., DINGO, arXiv:2505.23061 (Viterbi over a block); sums and draws are the textbook's, choosing by
the posterior is ours. Shapes: B rows of one constraint, N tokens of a text, W places of the window from the first
unknown one to the last known or asked for, K positions asked for, S states, E edges, C classes, T tokens with a class,
V vocabulary. Log-weights; -inf is impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.samplers.automaton import TokenAutomaton
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig

NEVER = -1e4  # what the model or the settings rule out has this weight: taken only where nothing else matches
OUTSIDE = -1e3  # further weight of what top_p leaves out
AT_ONCE = 1 << 24  # logits of rows that are worked on together


@dataclass(frozen=True)
class Guided:
    """What a call says under the constraints."""

    logits: Tensor  # [B, K, V]: of constrained rows the logarithms of the posterior
    tokens: Tensor  # [B, K]: of constrained rows the tokens of a text that matches, else -1
    certain: Tensor  # [B, K] bool: nothing else can stand there

    def settle(self, tokens: Tensor, chosen: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """What is committed: of constrained rows the tokens of that text, and all that is certain."""
        return torch.where(self.tokens < 0, tokens, self.tokens), chosen | self.certain & asked


class Constraint:
    """`guide` for `denoise`: an automaton for each row of the first canvas, None where any text will do.

    Args:
        length: N, the tokens of an answer; a canvas may be longer.
    """

    def __init__(self, automata: Sequence[TokenAutomaton | None], length: int):
        self.automata, self.length = list(automata), length
        self._there: dict[int, TokenAutomaton] = {}

    def check(self, canvas: Canvas) -> None:
        """Raises ValueError where the answer, or what is given of it, leaves no room for a text that matches."""
        for automaton, own in self._groups(canvas):
            known = canvas.committed[own, : self.length]
            nothing = torch.zeros(len(own), 0, dtype=torch.int64, device=own.device)
            chain = _Chain(automaton, canvas, own, nothing, nothing.bool(), self.length)
            ahead = F.pad(chain.backward(None)[:, 0], (0, 1), value=-torch.inf).gather(1, chain.state[:, None])
            if bool(ahead.isfinite().all()):
                continue
            least, limit = automaton.least(self.length + len(automaton)), self.length
            if bool(known.any()) and least is not None and least <= limit:
                raise ValueError("constraint: what draft= gives cannot be completed to a text that matches.")
            if least is not None and least > limit:
                raise ValueError(
                    f"constraint: the shortest text that matches has {least} tokens, max_new_tokens={limit}; "
                    f"say max_new_tokens={least} or more."
                )
            raise ValueError(
                f"constraint: no text that matches has exactly max_new_tokens={limit} tokens, and no end token may "
                "fill the rest; set eos_token_id."
            )

    def __call__(
        self,
        canvas: Canvas,
        config: DecodeConfig,
        logits: Tensor,
        rows: Tensor,
        asked: Tensor,
        uniform: Tensor,
        greedy: Tensor | None = None,
    ) -> Guided:
        """One call's logits [B, K, V] at `rows` [B, K], under the constraints.

        Args:
            asked: [B, K] bool, which are unknown and may be committed.
            uniform: [B, K] float64 in [0, 1), for draws.
            greedy: [B] bool, rows that take the most probable text though tokens are drawn.
        """
        tokens, certain = torch.full_like(rows, -1), torch.zeros_like(asked)
        asked, logits = asked & (rows < self.length), logits.to(torch.float32, copy=True)
        for automaton, own in self._groups(canvas):
            known = canvas.ids[own].gather(1, rows[own])
            tokens[own] = torch.where(canvas.committed[own].gather(1, rows[own]), known, -1)  # is not to be edited
            own = own[asked[own].any(1)]
            at_once = AT_ONCE // (max(rows.shape[1], 1) * len(automaton.live))
            for part in own.split(max(at_once, 1)) if len(own) else []:
                chain = _Chain(automaton, canvas, part, rows[part], asked[part], self.length)
                found = _decode(chain, config, logits[part], uniform[part], None if greedy is None else greedy[part])
                inside = asked[part]
                logits[part] = torch.where(inside[..., None], found.logits, logits[part])
                tokens[part] = torch.where(inside, found.tokens, tokens[part])
                certain[part] = inside & found.certain
        return Guided(logits, tokens, certain)

    def _groups(self, canvas: Canvas) -> list[tuple[TokenAutomaton, Tensor]]:
        """The rows of each constraint."""
        found: dict[int, tuple[TokenAutomaton, list[int]]] = {}
        for row, request in enumerate(canvas.requests.tolist()):
            if (own := self.automata[request]) is not None:
                found.setdefault(id(own), (own, []))[1].append(row)
        device = canvas.ids.device
        for key, (own, _) in found.items():
            if key not in self._there or self._there[key].table.device != device:
                self._there[key] = own.to(device)
        return [(self._there[key], torch.tensor(rows, device=device)) for key, (_, rows) in found.items()]


class _Chain:
    """The window of the rows `own` of a canvas: which of its places are known, asked for and free."""

    def __init__(
        self, automaton: TokenAutomaton, canvas: Canvas, own: Tensor, rows: Tensor, asked: Tensor, length: int
    ):
        ids, known = canvas.ids[own, :length], canvas.committed[own, :length]
        behind = torch.arange(1, length + 1, device=ids.device) * known
        begin = int(known.long().argmin(1).min())
        end = max(int(torch.cat([behind, (rows + 1) * asked], 1).max()), begin)
        classes = automaton.classes[ids]
        state = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        for place in range(begin):
            state = automaton.table[state, classes[:, place]].long()
        self.automaton, self.state = automaton, state  # [B], where the window begins; S where nothing goes on
        self.after = torch.where(automaton.reach(length - end), 0.0, -torch.inf).double()  # [S], behind the window
        self.known, self.classes = known[:, begin:end], classes[:, begin:end]  # [B, W]
        place = torch.where(asked, rows - begin, end - begin)
        slots = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        none = torch.full((len(ids), end - begin + 1), -1, device=ids.device)
        self.slot = none.scatter(1, place, slots)[:, :-1]  # [B, W], which of what is asked for; -1 where it is not
        self.place = torch.where(asked, place, 0)  # [B, K], where in the window

    @property
    def free(self) -> Tensor:
        return ~self.known & (self.slot < 0)

    def edges(self, scores: Tensor | None, place: int) -> Tensor:
        """The weights [B, E] of a place's edges; `scores` [B, K, E] are those of what is asked for."""
        a, classes = self.automaton, self.classes[:, place]
        follows = a.table.T[classes][:, a.source] == a.target  # what a known token allows
        weights = torch.where(self.known[:, place, None] & ~follows, -torch.inf, 0.0).double()
        if scores is None:
            return weights
        slot = self.slot[:, place, None]
        asked = scores.gather(1, slot.clamp(min=0)[..., None].expand(-1, 1, scores.shape[-1])).squeeze(1)
        return torch.where(slot >= 0, asked, weights)

    def _gathered(self, weights: Tensor, index: Tensor, place: int, best: bool) -> Tensor:
        total, most = _by(weights, index, len(self.automaton))
        return most if best else torch.where(self.free[:, place, None], most, total)  # what is free counts no ways

    def backward(self, scores: Tensor | None, *, best: bool = False) -> Tensor:
        """[B, W + 1, S]: the weight of all, or the best, that can follow each state at each place."""
        a, messages = self.automaton, [self.after.expand(len(self.known), -1)]
        for place in reversed(range(self.known.shape[1])):
            weights = self.edges(scores, place) + messages[-1][:, a.target]
            messages.append(self._gathered(weights, a.source, place, best))
        return torch.stack(messages[::-1], 1)

    def forward(self, scores: Tensor) -> Tensor:
        """[B, W + 1, S]: the weight of all that leads to each state."""
        a = self.automaton
        start = torch.arange(len(a), device=self.state.device) == self.state[:, None]
        messages = [torch.where(start, 0.0, -torch.inf).double()]
        for place in range(self.known.shape[1]):
            weights = self.edges(scores, place) + messages[-1][:, a.source]
            messages.append(self._gathered(weights, a.target, place, best=False))
        return torch.stack(messages, 1)


def _decode(chain: _Chain, config: DecodeConfig, logits: Tensor, uniform: Tensor, greedy: Tensor | None) -> Guided:
    a = chain.automaton
    banned = torch.isin(a.live, torch.tensor(config.suppress_ids, dtype=a.live.dtype, device=a.live.device))
    weights = logits[..., a.live].masked_fill_(banned, -torch.inf)  # [B, K, T]
    weights = (weights - weights.amax(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).min)).clamp_(min=NEVER)
    scores = _scores(a, weights)
    posterior, certain = _posterior(chain, weights, scores)
    spread = torch.full_like(logits, NEVER)
    spread[..., a.live] = posterior.to(logits.dtype)
    if not config.draws_tokens or greedy is not None:
        tokens = _best(chain, weights, scores)
    if config.draws_tokens:
        if config.temperature != 1:
            weights = weights / config.temperature
            scores = _scores(a, weights)
        if config.top_p < 1:
            inside = _nucleus(_posterior(chain, weights, scores)[0], config.top_p)
            weights = torch.where(inside, weights, weights + OUTSIDE)
            scores = _scores(a, weights)
        drawn = _drawn(chain, weights, scores, uniform)
        tokens = drawn if greedy is None else torch.where(greedy[:, None], tokens, drawn)
    return Guided(spread, tokens, certain)


def _by(values: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the maximum of values [..., n] that have the same index [n], each [..., count]."""
    index = index.expand_as(values)
    most = values.new_full((*values.shape[:-1], count), -torch.inf).scatter_reduce_(-1, index, values, "amax")
    level = most.masked_fill(most == -torch.inf, 0.0)
    total = torch.zeros_like(most).scatter_add_(-1, index, (values - level.gather(-1, index)).exp_())
    return level + total.log(), most


class _Scores(NamedTuple):
    """Of what is asked for, from the weights of its tokens: `total` of all, and `best`."""

    of_class: Tensor  # [B, K, C] total
    total: Tensor  # [B, K, E]
    best: Tensor  # [B, K, E]


def _scores(a: TokenAutomaton, weights: Tensor) -> _Scores:
    total, best = (found.double() for found in _by(weights, a.classes[a.live], a.table.shape[1]))
    of_edges = [_by(found[..., a.pair_class], a.pair_edge, len(a.source)) for found in (total, best)]
    return _Scores(total, of_edges[0][0], of_edges[1][1])


def _posterior(chain: _Chain, weights: Tensor, scores: _Scores) -> tuple[Tensor, Tensor]:
    """log p(token | the text matches) of the tokens [B, K, T]; and where there is nothing to choose, [B, K] bool."""
    a = chain.automaton
    into, out_of = chain.forward(scores.total), chain.backward(scores.total)
    place = chain.place[..., None].expand(-1, -1, len(a))
    into, behind = into.gather(1, place), out_of.gather(1, place + 1)
    edges = (into[..., a.source] + behind[..., a.target])[..., a.pair_edge]
    around = _by(edges, a.pair_class, a.table.shape[1])[0]  # [B, K, C]
    whole = (around + scores.of_class).logsumexp(-1, keepdim=True)
    posterior = weights + (around - whole)[..., a.classes[a.live]]
    size = torch.bincount(a.classes, minlength=a.table.shape[1])
    ways = ((around > -torch.inf) * size).sum(-1)
    before = (into + out_of.gather(1, place))[..., : a.end]
    return posterior.clamp(min=NEVER), (ways == 1) | (before == -torch.inf).all(-1)


def _best(chain: _Chain, weights: Tensor, scores: _Scores) -> Tensor:
    """The tokens [B, K] of the most probable text."""
    a = chain.automaton
    messages, state, path = chain.backward(scores.best, best=True), chain.state, [chain.state]
    for place in range(chain.known.shape[1]):
        ahead = chain.edges(scores.best, place) + messages[:, place + 1][:, a.target]
        edge = ahead.masked_fill(a.source != state[:, None], -torch.inf).argmax(1)
        state = a.target[edge]
        path.append(state)
    states = torch.stack(path, 1)
    now, after = states.gather(1, chain.place), states.gather(1, chain.place + 1)
    fits = (a.table[now] == after[..., None])[..., a.classes[a.live]]
    return a.live[weights.masked_fill(~fits, -torch.inf).argmax(-1)]


def _drawn(chain: _Chain, weights: Tensor, scores: _Scores, uniform: Tensor) -> Tensor:
    """Tokens [B, K] of a text drawn from the posterior, each by one number of `uniform` [B, K]."""
    a, rows = chain.automaton, torch.arange(len(weights), device=weights.device)
    messages, state = chain.backward(scores.total), chain.state
    tokens = torch.zeros_like(chain.place)
    for place in range(chain.known.shape[1]):
        slot, ahead = chain.slot[:, place], messages[:, place + 1]
        here = slot.clamp(min=0)
        follow = a.table[state].long()[:, a.classes[a.live]]  # [B, T], the dead state where a token does not fit
        mass = weights[rows, here].double() + F.pad(ahead, (0, 1), value=-torch.inf).gather(1, follow)
        cumulative = (mass - mass.amax(-1, keepdim=True)).exp().cumsum(-1)
        total = cumulative[:, -1:]
        target = (uniform[rows, here][:, None] * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
        which = torch.searchsorted(cumulative, target, right=True).clamp(max=len(a.live) - 1)
        tokens[rows, here] = torch.where(slot >= 0, a.live[which[:, 0]], tokens[rows, here])
        any_edge = (ahead[:, a.target]).masked_fill(a.source != state[:, None], -torch.inf).argmax(1)
        fixed = a.table[state, chain.classes[:, place]].long()
        moved = torch.where(slot >= 0, follow.gather(1, which)[:, 0], a.target[any_edge])
        state = torch.where(chain.known[:, place], fixed, moved)
    return tokens


def _nucleus(logs: Tensor, top_p: float) -> Tensor:
    """The most probable tokens that together reach `top_p`, [B, K, T] bool."""
    ordered, index = logs.exp().sort(dim=-1, descending=True, stable=True)
    inside = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(inside).scatter(-1, index, inside)
