"""Which positions are committed, by every rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig, decode_config
from dmllm.samplers.denoise import denoise
from dmllm.samplers.estimate import estimate
from dmllm.samplers.rules import choose, entropy_bound, factor, low_confidence
from dmllm.samplers.schedules import CURVES, commit_counts
from dmllm.types import Step
from tests.families.recorded import Recorded
from tests.samplers.table import NoiseModel, TableModel, chi_square, generators, quantile

SETTINGS: list[dict[str, Any]] = [
    {},
    {"remasking": "margin", "threshold": 0.5},
    {"factor": 1.0},
    {"factor": 0.0, "remasking": "entropy"},
    {"entropy_bound": 1.0},
    {"entropy_bound": 0.3, "remasking": "entropy"},
    {"threshold": 0.2, "kl_threshold": 4.0, "kl_history_length": 1},
    {"early_exit_thresholds": [4.0, 2.0, 1.0]},
    {"early_exit_thresholds": [4.0, 3.0, 1.0], "threshold": 0.7},
    {"threshold": 0.3, "revoke_threshold": 0.5},
    {"factor": 2.0, "revoke_threshold": 0.9},
    {"schedule": "shift"},
    {"schedule": "time", "remasking": "origin", "remdm": "cap", "eta": 0.3},
    {"schedule": "time", "remasking": "origin", "remdm": "rescale", "eta": 1.0},
    {"schedule": "time", "remasking": "origin", "remdm": "conf"},
    {"schedule": "time", "remasking": "origin", "remdm": "loop", "eta": 0.5},
    {"schedule": "time", "remasking": "origin", "remdm": "forward_backward", "noise_schedule": "cosine"},
    {"schedule": "time", "remasking": "origin", "remdm": "psi", "eta": 1.0, "noise_schedule": "polynomial"},
    {"schedule": "time", "remasking": "sequential", "noise_schedule": "cosine"},
    {"schedule": "first_hitting", "remasking": "random", "noise_schedule": "cosine"},
    {"schedule": "carried", "threshold": 0.3},
    {"schedule": "carried", "threshold": 0.2, "remasking": "margin", "kl_threshold": 4.0, "kl_history_length": 1},
    {"schedule": "confident", "threshold": 0.5},
]


def fill(model, canvas: Canvas, config: DecodeConfig, seeds: tuple[int, ...]) -> list[Step]:
    return list(denoise(model, canvas, config, generators(*seeds)))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_every_rule_ends_in_time_keeps_what_it_may_not_change_and_treats_each_row_as_if_alone(
    options: dict[str, Any], data
) -> None:
    length = data.draw(st.integers(1, 9), "length")
    block = data.draw(st.integers(1, length), "block_length")
    hitting, added = (options.get("schedule") == name for name in ("first_hitting", "carried"))
    config = DecodeConfig(
        block_length=block,
        block_steps=data.draw(st.integers(block if hitting else 1, block + 2), "steps"),
        temperature=data.draw(st.sampled_from([0.0, 1.0]), "temperature"),
        **options,
    )
    assert config.block_steps is not None
    seeds = (3, 8, 5)
    known = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3 * length, max_size=3 * length))).view(3, -1)
    model = NoiseModel(vocab=9, seeds=seeds)
    canvas = Canvas.of(torch.randint(0, 8, (3, length)), known, model.mask)
    steps = fill(model, canvas, config, seeds)
    last, before = steps[-1], (canvas.ids, canvas.committed)
    assert last.committed.all()
    assert last.finished.all()
    assert (last.ids != model.mask).all()
    calls = 2 if config.revoke_threshold is not None else 1
    most = max(config.block_steps, block) if added else config.block_steps  # a threshold may add calls there
    assert (last.num_forwards <= -(-length // block) * most * calls).all()
    for step in steps:
        kept = known if config.rewrites else before[1]
        assert torch.equal(step.ids[kept], before[0][kept])
        assert step.committed[kept].all()
        if not config.rewrites and options.get("schedule") != "time":
            assert (step.committed.sum(1) > before[1].sum(1))[~before[1].all(1)].all()
        before = (step.ids, step.committed)
    for row, seed in enumerate(seeds):
        own = Canvas.of(canvas.ids[row : row + 1], known[row : row + 1], model.mask)
        alone = fill(NoiseModel(vocab=9, seeds=(seed,)), own, config, (seed,))[-1]
        assert torch.equal(alone.ids[0], last.ids[row])
        assert alone.num_forwards[0] == last.num_forwards[row]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CURVES), st.sampled_from([0.3, 1.0, 3.0]), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)
)
def test_what_a_curve_or_an_even_share_commits_sums_to_what_there_is(
    curve: str, shift: float, tokens: int, calls: int, more: int
) -> None:
    """MaskGIT's, LaViDa's and LLaDA's counts: at least one in each call until all is known."""
    counts = commit_counts(curve, shift, tokens, calls)
    assert sum(counts) == tokens
    assert min(counts) >= 1
    assert len(counts) == min(tokens, calls)
    for schedule in ("even", "fixed"):
        config = DecodeConfig(block_steps=calls, schedule=schedule)
        steps = fill(NoiseModel(vocab=5), Canvas.blank(1, tokens, 4), config, (more,))
        taken = torch.tensor([0, *(int(step.committed.sum()) for step in steps)]).diff().tolist()
        assert taken == [tokens // calls + (call < tokens % calls) for call in range(len(taken))]
        assert sum(taken) == tokens


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_choosing_takes_the_least_doubtful_asked_for_and_exactly_the_quota(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 9))
    doubt = torch.tensor([data.draw(st.lists(st.floats(0, 1, width=32), min_size=k, max_size=k))])
    asked = torch.tensor([data.draw(st.lists(st.booleans(), min_size=k, max_size=k))])
    quota = data.draw(st.integers(1, 9))
    chosen = choose(doubt, None, asked, torch.tensor([quota]))
    assert not (chosen & ~asked).any()
    assert int(chosen.sum()) == min(quota, int(asked.sum()))
    rest = asked & ~chosen
    if chosen.any() and rest.any():
        assert doubt[chosen].max() <= doubt[rest].min()
    sure = doubt <= 0.3
    more = choose(doubt, sure, asked, torch.tensor([quota]))
    assert torch.equal(more, chosen | (sure & asked))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([1.0, 4.0, 9.0]))
def test_a_factor_takes_the_most_tokens_that_are_sure_for_their_number(seed: int, scale: float, sharp: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    logits, asked = sharp * torch.randn(3, 6, 9, generator=draws), torch.rand(3, 6, generator=draws) < 0.7
    seen = estimate(logits, 8, DecodeConfig())
    for row, taken in enumerate(factor(seen, asked, scale)):
        against = seen.against[row, asked[row]].sort().values.tolist()  # 1 - p, which does not round to nothing
        passing = [n for n in range(1, len(against) + 1) if n == 1 or against[n - 1] <= scale / (n + 1)]
        most = max(passing, default=0)
        most += most == len(against) - 1  # a single one is not left over
        assert int(taken.sum()) == most
        assert seen.against[row, taken].sort().values.tolist() == against[:most]
        assert not (taken & ~asked[row]).any()


# Fast-dLLM's generate() on the logits of the recorded LLaDA: block_length, factor, calls, tokens.
FACTORS = [
    (16, 0.5, 15, [145, 165, 23, 23, 123, 58, 14, 123, 123, 23, 58, 4, 5, 4, 58, 5]),
    (8, 1.0, 14, [165, 165, 165, 165, 166, 166, 166, 165, 171, 171, 42, 166, 108, 166, 171, 141]),
    (16, 1.5, 14, [165, 154, 154, 23, 4, 154, 154, 83, 167, 23, 58, 4, 58, 23, 16, 100]),
    (8, 2.0, 12, [165, 165, 165, 23, 166, 165, 108, 165, 171, 171, 166, 166, 166, 171, 171, 171]),
    (16, 2.5, 7, [165, 154, 154, 23, 36, 165, 154, 165, 154, 23, 7, 4, 58, 83, 23, 23]),
    (16, 4.0, 4, [165, 165, 154, 23, 36, 165, 154, 165, 171, 23, 4, 4, 58, 23, 171, 171]),
]


def test_a_factor_takes_the_calls_and_tokens_of_its_authors_code() -> None:
    recorded = Recorded("llada")
    pipe, prompt = recorded.load(), recorded.inputs["p1"]
    for block_length, scale, calls, tokens in FACTORS:
        options = {"max_new_tokens": 16, "block_length": block_length, "eos_token_id": [], "count_mask": True}
        out = pipe.generate(prompt, factor=scale, **options)
        assert out.sequences[0, prompt.shape[1] :].tolist() == tokens
        assert int(out.num_forwards) == calls


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0, 9.0]), st.sampled_from(["entropy", "low_confidence"]))
def test_an_entropy_bound_takes_the_most_tokens_in_order_that_keep_to_it(seed: int, bound: float, order: str) -> None:
    draws = torch.Generator().manual_seed(seed)
    logits, asked = 4 * torch.randn(3, 6, 9, generator=draws), torch.rand(3, 6, generator=draws) < 0.7
    seen = estimate(logits, 8, DecodeConfig(remasking=order, entropy_bound=bound))
    doubt = seen.entropy if order == "entropy" else low_confidence(seen, torch.zeros(3, 6))
    for row, taken in enumerate(entropy_bound(seen, doubt, asked, bound)):
        places = sorted(asked[row].nonzero().squeeze(1).tolist(), key=lambda i: float(doubt[row, i]))
        entropies = seen.entropy[row].tolist()
        sums = [
            sum(entropies[i] for i in places[:k]) - max(entropies[i] for i in places[:k])
            for k in range(1, len(places) + 1)
        ]
        most = max((k for k, total in enumerate(sums, 1) if total <= bound + 1e-6), default=0)
        assert sorted(taken.nonzero().squeeze(1).tolist()) == sorted(places[:most])


@pytest.mark.parametrize("order", ["entropy", "margin", "random"])
def test_an_entropy_bound_of_nothing_draws_from_the_data_distribution(order: str) -> None:
    """What has no entropy is known, so that committing it too is exact; a bound above is not."""
    model = TableModel(vocab=2, length=4)
    model.probs = torch.where(model.texts[:, 2] == model.texts[:, 0], model.probs, 0)  # one token follows from another
    model.probs /= model.probs.sum()
    exact, loose = (DecodeConfig(remasking=order, temperature=1.0, entropy_bound=bound) for bound in (0.0, 3.0))
    blank, draws = Canvas.blank(4000, 4, model.mask), tuple(range(4000))
    steps = fill(model, blank, exact, draws)
    assert (steps[-1].num_forwards < 4).any()
    assert chi_square(model, steps[-1].ids) < quantile(7)
    wrong = fill(model, blank, loose, draws)[-1].ids
    assert (wrong[:, 0] != wrong[:, 2]).any()


def test_what_changes_from_call_to_call_waits_however_sure_it_is() -> None:
    """Place 0 is sure and stable, place 1 sure of another token in every call, the others are unsure."""

    def predict(canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        token = torch.where(rows == 1, int(canvas.calls[0]) % 3, 1)
        sharp = torch.where(rows < 2, 9.0, 1.0 - 0.1 * rows)
        return torch.nn.functional.one_hot(token, 5).float() * sharp[..., None]

    def committed(**options) -> list[list[int]]:
        steps = fill(predict, Canvas.blank(1, 6, 4), DecodeConfig(threshold=0.9, **options), (0,))
        return [step.committed[0].nonzero().squeeze(1).tolist() for step in steps]

    assert committed()[0] == [0, 1]
    slow = committed(kl_threshold=0.01, kl_history_length=2, distrust_ids=[0, 1, 2, 3])  # the quota takes the first
    assert slow[0] == [0]
    waiting = [6 - len(now) for now in committed(kl_threshold=0.01, kl_history_length=1)]
    assert waiting == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("gap", "calls"), [(8.0, 1), (6.0, 3), (3.0, 7), (2.0, 9)])
def test_an_early_exit_takes_all_once_the_gap_is_wide_enough_for_the_stage(gap: float, calls: int) -> None:
    def predict(canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        return torch.tensor([gap, 0.0, -1.0, 50.0]).expand(*rows.shape, 4)

    steps = fill(predict, Canvas.blank(1, 9, 3), DecodeConfig(early_exit_thresholds=[7.5, 5.0, 2.5]), (0,))
    assert len(steps) == calls
    assert steps[-1].ids.tolist() == [[0] * 9]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"threshold": 0.9, "factor": 1.0}, "threshold=0.9 and factor=1.0 say the same thing twice; give one of them."),
        ({"factor": -1}, "factor=-1 must be 0 or above, or None for the quota alone."),
        ({"entropy_bound": True}, "entropy_bound=True must be a number or None."),
        ({"kl_threshold": 0.01}, "kl_threshold=0.01 is a condition on what threshold commits; say it too."),
        ({"kl_history_length": 0}, "kl_history_length=0 must be a whole number, at least 1."),
        ({"early_exit_thresholds": [1.0]}, "must be three numbers, e.g. [7.5, 5.0, 2.5], or []."),
        ({"revoke_threshold": 0.9}, "goes with a low threshold; say it, e.g. 0.6."),
        ({"remdm": "cap"}, "say schedule='time', remasking='origin'."),
        (
            {"remdm": "cap", "schedule": "time", "remasking": "origin", "choices": ["a"]},
            "remdm='cap' masks again what a constraint rests on; leave one of them out.",
        ),
        ({"remdm": "cab"}, "did you mean cap"),
        ({"noise_schedule": "cosin"}, "did you mean cosine"),
        ({"schedule": "carried"}, "carries over what threshold turns down; say it, e.g. threshold=0.9."),
        ({"schedule": "first_hitting"}, "draws which token of a block is next; say remasking='random'"),
        (
            {"schedule": "first_hitting", "remasking": "random", "steps": 8},
            "schedule='first_hitting' is one token a call; leave out steps and num_to_transfer.",
        ),
        ({"eta": 1.5}, "eta=1.5 must lie between 0 (nothing is masked again) and 1."),
        (
            {"threshold": 0.5, "revoke_threshold": 0.9, "editing_threshold": 0.9},
            "editing_threshold=0.9 and revoke_threshold=0.9 both change what is committed; give one of them.",
        ),
        ({"threshold": 0.5, "revoke_threshold": 0.9, "sub_block_length": 2}, "say sub_block_length=None"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(options: dict, advice: str) -> None:
    with pytest.raises(ValueError) as error:
        decode_config(options)
    assert advice in str(error.value)


def test_a_rule_sets_a_checkpoints_other_rule_aside() -> None:
    hitting = {"schedule": "first_hitting", "remasking": "random"}
    assert decode_config(hitting, {"steps": 8}) == DecodeConfig(schedule="first_hitting", remasking="random")
    assert decode_config({"factor": 1.0}, {"threshold": 0.9}) == DecodeConfig(factor=1.0)
    assert decode_config({"threshold": None}, {"entropy_bound": 0.1}).entropy_bound == 0.1
