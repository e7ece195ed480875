"""What samplers draw from a model with exact conditionals: the data where that is a truth, else a law known in advance.

The law of a sampler is found by following every state of a small canvas with its probability, without drawing anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from dmllm.samplers.blocks import whole_blocks
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.samplers.estimate import draw
from dmllm.samplers.quota import rates
from dmllm.samplers.stream import guided
from tests.exact import Joint, assert_drawn_from, chi_square, generators, quantile, total_variation

Moves = Iterator[tuple[float, dict[int, int]]]
"""What a step may commit, {place: token}, each with its probability."""

HITTING: dict[str, Any] = {"schedule": "first_hitting", "remasking": "random"}
ANCESTRAL: dict[str, Any] = {"schedule": "time", "remasking": "origin"}


def drawn_by(joint: Joint, rows: int = 4000, canvas: Canvas | None = None, **options: Any) -> Tensor:
    """Texts that the sampler draws, [rows, L]."""
    canvas = Canvas.blank(rows, joint.length, joint.mask) if canvas is None else canvas
    steps = denoise(joint.predict, canvas, DecodeConfig(temperature=1.0, **options), generators(*range(rows)))
    return list(steps)[-1].ids


def law(joint: Joint, step: Callable[[Tensor, list[int]], Moves]) -> Tensor:
    """The distribution over texts, [X], of a sampler whose step sees the conditionals [L, V] and the open places."""
    states, found = {(-1,) * joint.length: 1.0}, torch.zeros(len(joint.texts), dtype=torch.float64)
    place = {tuple(text): i for i, text in enumerate(joint.texts.tolist())}
    while states:
        state, chance = states.popitem()
        if state in place:
            found[place[state]] += chance
            continue
        ids = torch.tensor([state])
        for share, tokens in step(joint.conditionals(ids, ids >= 0)[0], [i for i, t in enumerate(state) if t < 0]):
            after = tuple(tokens.get(i, t) for i, t in enumerate(state))
            states[after] = states.get(after, 0.0) + chance * share
    return found


def all_tokens(probs: Tensor, places: list[int] | tuple[int, ...]) -> Moves:
    """Every way to fill `places`, each drawn by itself."""
    for tokens in itertools.product(range(probs.shape[1]), repeat=len(places)):
        yield float(probs[list(places), list(tokens)].prod()), dict(zip(places, tokens, strict=True))


def in_random_order(count: int) -> Callable[[Tensor, list[int]], Moves]:
    """`count` places a step, drawn among the open ones, each token drawn by itself."""

    def step(probs: Tensor, places: list[int]) -> Moves:
        groups = list(itertools.combinations(places, min(count, len(places))))
        for group in groups:
            yield from ((chance / len(groups), tokens) for chance, tokens in all_tokens(probs, group))

    return step


def by_entropy(count: int) -> Callable[[Tensor, list[int]], Moves]:
    """The `count` places of least entropy."""

    def step(probs: Tensor, places: list[int]) -> Moves:
        entropies = torch.special.entr(probs).sum(-1)
        yield from all_tokens(probs, sorted(places, key=lambda i: float(entropies[i]))[:count])

    return step


def by_the_drawn_tokens_probability(probs: Tensor, places: list[int]) -> Moves:
    """A token drawn at every place, and of these the most probable one (LLaDA and Dream at a temperature of 1)."""
    for chance, tokens in all_tokens(probs, places):
        best = max(places, key=lambda i: float(probs[i, tokens[i]]))
        yield chance, {best: tokens[best]}


ONE_TOKEN: list[dict[str, Any]] = [
    *({"remasking": order} for order in ("random", "entropy", "margin", "sequential")),
    {"remasking": "random", "block_length": 3},
    {"remasking": "entropy", "block_length": 2},
    HITTING,
    {**HITTING, "block_length": 2, "noise_schedule": "cosine"},
]


@pytest.mark.parametrize("options", ONE_TOKEN, ids=str)
def test_one_token_a_call_draws_from_the_data(options: dict[str, Any]) -> None:
    joint = Joint(2, 4)
    assert_drawn_from(joint, drawn_by(joint, **options))


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("options", [{"remasking": "entropy"}, HITTING], ids=str)
def test_whole_blocks_one_after_the_other_draw_from_the_data(length: int, options: dict[str, Any]) -> None:
    """The canvas of block-causal models, on which blocks are counted from the beginning of the prompt."""
    joint = Joint(2, 4, seed=1)
    canvas = whole_blocks(torch.zeros(3000, dtype=torch.int64), 4, length, joint.mask)
    assert_drawn_from(joint, drawn_by(joint, 3000, canvas, **options))


def test_what_is_known_conditions_what_is_drawn() -> None:
    joint = Joint(3, 3)
    ids, known = torch.tensor([[0, 2, 0]]), torch.tensor([[False, True, False]])
    fits = joint.probs * (joint.texts[:, 1] == 2)
    canvas = Canvas.of(ids.expand(3000, -1), known.expand(3000, -1), joint.mask)
    for options in ({"remasking": "entropy"}, HITTING):
        assert_drawn_from(joint, drawn_by(joint, 3000, canvas, **options), fits / fits.sum())


@pytest.mark.parametrize(
    ("order", "count", "step"),
    [
        ("random", 2, in_random_order(2)),
        ("random", 4, in_random_order(4)),
        ("entropy", 2, by_entropy(2)),
        ("sequential", 3, lambda probs, places: all_tokens(probs, places[:3])),
    ],
)
def test_several_tokens_a_call_miss_the_data_by_what_they_say_of_each_other(order: str, count: int, step) -> None:
    """The factorisation error: the total variation that the law says, measured on what is drawn."""
    joint = Joint(2, 4, sharpness=2.0)
    expected = law(joint, step)
    drawn = drawn_by(joint, remasking=order, num_to_transfer=count)
    assert_drawn_from(joint, drawn, expected)
    error = total_variation(expected, joint.probs)
    assert error > 0.02
    assert chi_square(joint, drawn) > 2 * quantile(len(joint.probs) - 1)
    assert abs(total_variation(joint.counts(drawn) / len(drawn), joint.probs) - error) < 0.02


def test_ranking_by_the_probability_of_what_was_drawn_is_biased_and_by_entropy_it_is_not() -> None:
    """Even at one token a call: where an improbable token was drawn, the place waits, and is drawn anew."""
    joint = Joint(3, 3)
    biased, exact = law(joint, by_the_drawn_tokens_probability), law(joint, by_entropy(1))
    assert total_variation(exact, joint.probs) < 1e-12
    assert total_variation(biased, joint.probs) == pytest.approx(0.427, abs=1e-3)
    assert_drawn_from(joint, drawn_by(joint, remasking="low_confidence"), biased)
    assert torch.special.entr(biased).sum() < joint.entropy - 0.5, "what is probable is drawn too often"


def ancestral_law(joint: Joint, config: DecodeConfig, steps: int) -> tuple[Tensor, list[Tensor]]:
    """The distribution over texts that `steps` calls of the process leave, [X], and what is known after each, [L].

    Every place of a state by itself: an open one is committed, a known one masked again, with the call's two rates.
    """
    states = torch.tensor(list(itertools.product(range(joint.vocab + 1), repeat=joint.length)))  # [S, L]; V is the mask
    known = states < joint.vocab
    probs = joint.conditionals(states, known).nan_to_num()
    chance = (~known).all(1).double()
    shares = []
    for call in range(steps):
        sigma, commit = (float(rate) for rate in rates(config, steps, torch.tensor([call])))
        if call == steps - 1:
            sigma, commit = 0.0, 1.0
        opened = torch.cat([probs * commit, torch.full_like(probs[..., :1], 1 - commit)], -1)  # [S, L, V + 1]
        stays = torch.nn.functional.one_hot(states, joint.vocab + 1).double()
        kept = (1 - sigma) * stays
        kept[..., joint.vocab] += sigma
        each = torch.where(known[..., None], kept, opened)
        moves = torch.stack([each[:, i, states[:, i]] for i in range(joint.length)]).prod(0)  # [S, S]
        chance = chance @ moves
        shares.append(chance @ known.double())
    return chance[known.all(1)], shares


PROCESSES: list[dict[str, Any]] = [
    {},
    {"noise_schedule": "cosine"},
    {"noise_schedule": "polynomial"},
    {"remdm": "cap", "eta": 0.3},
    {"remdm": "rescale", "eta": 0.7, "noise_schedule": "cosine"},
    {"remdm": "loop", "eta": 0.2},
    {"remdm": "forward_backward"},
    {"remdm": "psi", "eta": 0.5},
]


@pytest.mark.parametrize("options", PROCESSES, ids=str)
def test_the_process_run_backwards_draws_from_its_law_and_keeps_what_is_known_at_each_time(options: dict) -> None:
    """Ancestral steps and ReMDM's: P(known at time s) is alpha_s, and the law comes to the data as calls are added."""
    joint = Joint(2, 3)
    config = DecodeConfig(temperature=1.0, **ANCESTRAL, **options)
    few, shares = ancestral_law(joint, config, 6)
    for call, share in enumerate(shares[:-1]):
        torch.testing.assert_close(share, alpha(config, 6, call + 1).expand(3), atol=1e-6, rtol=0)
    assert_drawn_from(joint, drawn_by(joint, 3000, steps=6, **ANCESTRAL, **options), few)
    errors = []
    for calls in (6, 24, 96):
        scaled = replace(config, eta=config.eta * 6 / calls)  # as many tokens masked again, shared by the calls
        errors.append(total_variation(ancestral_law(joint, scaled, calls)[0], joint.probs))
    assert errors[0] > 3 * errors[1] > 9 * errors[2], "in inverse proportion to the calls"
    if not options:
        assert errors == pytest.approx([0.0716, 0.0180, 0.0045], abs=1e-4)
    if options.get("remdm") == "cap":
        assert total_variation(ancestral_law(joint, config, 96)[0], joint.probs) > 4 * errors[2], "unscaled it stays"


def alpha(config: DecodeConfig, steps: int, call: int) -> Tensor:
    """What the process says is known after so many calls, from its definition."""
    t = torch.linspace(1, config.eps, steps + 1)[call].double()
    if config.remdm == "loop":
        early = (1 - t) / (1 - 0.55) * 0.9
        return early if t > 0.55 else 1 - t / 0.05 * 0.1 if t <= 0.05 else torch.tensor(0.9, dtype=torch.float64)
    masked = {"linear": t, "cosine": (torch.pi / 2 * (1 - t)).cos(), "polynomial": t**2}[config.noise_schedule]
    return 1 - masked


@pytest.mark.parametrize("noise", ["linear", "cosine"])
def test_hitting_times_are_order_statistics_and_do_not_depend_on_the_place(noise: str) -> None:
    """Of n masked tokens the j-th is shown when n + 1 - j of n + 1 parts are masked, on average (Zheng et al. 2024)."""
    joint, times, canvases = Joint(2, 4), [], []

    def predict(canvas: Canvas, rows: Tensor) -> Tensor:
        times.append(canvas.time)
        canvases.append(canvas.committed)
        return joint.predict(canvas, rows)

    rows = 3000
    config = DecodeConfig(noise_schedule=noise, temperature=1.0, **HITTING)
    steps = list(denoise(predict, Canvas.blank(rows, 4, joint.mask), config, generators(*range(rows))))
    masked = torch.stack(times).double()
    if noise == "cosine":
        masked = (torch.pi / 2 * (1 - masked)).cos()
    assert (masked.diff(dim=0) < 0).all()
    torch.testing.assert_close(masked.mean(1), torch.arange(4, 0, -1).double() / 5, atol=0.02, rtol=0)
    spread = torch.tensor([4.0, 6.0, 6.0, 4.0]).double() / (25 * 6)  # Beta(5 - j, j)
    torch.testing.assert_close(masked.var(1), spread, atol=0.003, rtol=0)
    for place in range(4):
        first = steps[0].committed[:, place]
        assert abs(float(first.double().mean()) - 0.25) < 0.04
        assert abs(float(masked[0, first].mean()) - 0.8) < 0.03
    assert all((after.sum(1) == n).all() for n, after in enumerate(canvases))


def test_guidance_of_no_scale_is_the_model_itself() -> None:
    """And of a small one it comes to that: un + (s + 1)(cond - un), not un + s (cond - un)."""
    both = torch.randn(2, 3, 7, generator=Generator().manual_seed(0))
    assert guided(both, 0.0) is both
    torch.testing.assert_close(guided(both, 1e-6), both[:1], atol=1e-5, rtol=0)
    same = both[:1].repeat(2, 1, 1)
    torch.testing.assert_close(guided(same, 3.0), both[:1])


def test_gumbel_noise_in_float32_loses_rare_tokens_and_inverting_the_distribution_does_not() -> None:
    """The race of a step of 2000 in which half of the mass is on 50,000 rare tokens: in float32 a uniform number is a
    multiple of 2^-24, and so is the largest of 50,000, so that rare tokens hardly ever win against the mask."""
    rare, steps, count = 50_000, 2000, 600_000
    numbers = torch.rand(3, count, dtype=torch.float64, generator=Generator().manual_seed(0))
    largest = numbers ** (1 / torch.tensor([1.0, 1.0, rare], dtype=torch.float64))[:, None]  # of each group of equals
    mass = torch.tensor([1 - 1 / steps, 0.5 / steps, 0.5 / steps / rare], dtype=torch.float64)[:, None]

    def share_of_rare(uniform: Tensor) -> float:
        wins = torch.bincount((mass / -uniform.log()).argmax(0), minlength=3)
        return float(wins[2] / wins[1:].sum())

    rounded = (largest * 2**24).floor().clamp(min=1) / 2**24
    assert share_of_rare(largest) == pytest.approx(0.5, abs=0.08)
    assert share_of_rare(rounded) < 0.35
    scores = torch.cat([torch.zeros(1), torch.full((rare,), 1 / rare).log()])
    ours = torch.rand(200, dtype=torch.float64, generator=Generator().manual_seed(1))
    drawn = draw(scores.expand(200, -1), ours, 1.0, 1.0)
    assert float((drawn > 0).double().mean()) == pytest.approx(0.5, abs=0.08)
    assert len(drawn[drawn > 0].unique()) > 0.98 * int((drawn > 0).sum()), "each rare token about once"
