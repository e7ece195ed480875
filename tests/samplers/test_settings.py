"""Settings of published samplers on models whose every answer is known: quotas, orders, editing, what is never said."""

from __future__ import annotations

import pytest
import torch

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig, decode_config
from dmllm.samplers.denoise import denoise
from dmllm.samplers.estimate import estimate
from dmllm.samplers.rules import low_confidence
from dmllm.types import Step
from tests.samplers.table import NoiseModel, generators


def fill(model, config: DecodeConfig, batch: int, length: int) -> list[Step]:
    return list(denoise(model, Canvas.blank(batch, length, model.mask), config, generators(*range(batch))))


def commits(steps: list[Step]) -> list[int]:
    """Tokens that each call committed in the first row."""
    return torch.tensor([0, *(int(step.committed[0].sum()) for step in steps)]).diff().tolist()


def test_by_time_a_call_commits_the_share_of_time_that_passes_and_the_last_the_rest() -> None:
    """Dream's quota: of m open tokens int(m (1 - s/t)), which may be none; every step is a call."""
    for steps, eps in ((5, 1e-3), (16, 1e-3), (20, 0.2)):
        taken = commits(fill(NoiseModel(), DecodeConfig(steps=steps, schedule="time", eps=eps), 1, 16))
        times, left, expected = torch.linspace(1, eps, steps + 1), 16, []
        for call in range(steps):
            share = 1 - times[call + 1] / times[call]
            expected.append(int(left * share) if call < steps - 1 else left)
            left -= expected[-1]
        assert taken == expected
    assert 0 in taken


@pytest.mark.parametrize("remasking", ["low_confidence", "random", "origin", "sequential"])
def test_under_every_order_time_ends_with_all_known_after_exactly_its_steps(remasking: str) -> None:
    chosen = {"steps": 6, "block_length": 6, "schedule": "time", "remasking": remasking}
    steps = fill(NoiseModel(), DecodeConfig(max_new_tokens=12, **chosen), 4, 12)
    assert steps[-1].num_forwards.tolist() == [6] * 4
    assert steps[-1].committed.all()


def test_origin_draws_each_token_by_itself_and_one_order_draws_a_number() -> None:
    """The counts after a call vary from row to row as a binomial's do; a quota's do not."""
    config = DecodeConfig(steps=4, schedule="time", remasking="origin")
    model = NoiseModel(seeds=tuple(range(400)))
    after = fill(model, config, 400, 20)[0].committed.sum(1).double()
    share = (1 - 1e-3) / 4
    assert abs(float(after.mean()) - 20 * share) < 0.4
    assert abs(float(after.var()) - 20 * share * (1 - share)) < 1.0
    fixed = DecodeConfig(steps=4, schedule="time", remasking="random")
    assert float(fill(model, fixed, 400, 20)[0].committed.sum(1).double().var()) == 0


def test_a_fixed_quota_is_the_blocks_whatever_is_known_already() -> None:
    known = torch.arange(8)[None] < 3
    canvas = Canvas.of(torch.zeros(1, 8, dtype=torch.int64), known, 49)
    for schedule, expected in (("fixed", [3, 2]), ("even", [2, 2, 1])):
        steps = list(denoise(NoiseModel(), canvas, DecodeConfig(block_steps=3, schedule=schedule), generators(0)))
        assert torch.tensor([3, *(int(s.committed.sum()) for s in steps)]).diff().tolist() == expected
    assert commits(fill(NoiseModel(), DecodeConfig(block_steps=3, schedule="fixed", block_length=8), 1, 16)) == [
        3, 3, 2, 3, 3, 2,
    ]  # fmt: skip


def test_a_number_to_transfer_is_taken_in_every_call() -> None:
    assert commits(fill(NoiseModel(), DecodeConfig(num_to_transfer=3), 1, 8)) == [3, 3, 2]


def test_in_sequence_the_leftmost_come_first() -> None:
    config = DecodeConfig(max_new_tokens=16, steps=4, remasking="sequential", block_length=8)
    for step in fill(NoiseModel(), config, 2, 16):
        assert not step.committed.long().diff(dim=1).gt(0).any()


def test_suppressed_tokens_have_no_part_and_distrusted_ones_are_chosen_but_last() -> None:
    def predict(canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*rows.shape, 6)
        logits[..., 1] = torch.where(rows % 2 == 0, 9.0, 0.0)  # even positions are sure of 1, odd ones nearly of 2
        logits[..., 2] = torch.where(rows % 2 == 1, 5.0, 1.0)
        return logits

    def run(**options) -> list[Step]:
        return list(denoise(predict, Canvas.blank(1, 6, 5), DecodeConfig(**options), generators(0)))

    assert run()[0].committed[0].tolist() == [True] + [False] * 5
    assert run()[-1].ids[0].tolist() == [1, 2] * 3
    assert run(suppress_ids=[1])[-1].ids[0].tolist() == [2] * 6
    for remasking in ("low_confidence", "margin", "entropy", "random", "sequential"):
        steps = run(distrust_ids=[1], remasking=remasking)
        assert steps[2].committed[0].tolist() == [False, True] * 3
        assert steps[-1].ids[0].tolist() == [1, 2] * 3
    assert len(run(distrust_ids=[1], threshold=0.5)) == 1 + 3  # of the distrusted none is sure enough


def test_the_masks_probability_speaks_against_a_token_where_it_counts() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0, 3.0]]])  # the mask, 3, is the most probable
    for counts in (False, True):
        seen = estimate(logits, 3, DecodeConfig(count_mask=counts))
        assert int(seen.tokens) == 0
        shares = (logits if counts else logits[..., :3]).softmax(-1)
        torch.testing.assert_close(low_confidence(seen, torch.zeros(1, 1)), 1 - shares[..., 0])
    sure = estimate(torch.tensor([[[0.0, 500.0, 0.0, 900.0]]]), 3, DecodeConfig(count_mask=True))
    assert float(sure.against) == 1


class Changing:
    """Says 1 everywhere while anything is unknown, then 2 at `last` positions more with every call."""

    mask = 5

    def __init__(self, last: int = 2):
        self.last, self.full = last, 0

    def __call__(self, canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        inside = canvas.committed.gather(1, rows).all()
        self.full += int(inside)
        token = torch.where(inside & (rows < self.full) & (rows < self.last), 2, 1)
        return torch.nn.functional.one_hot(token, 6).float() * 9


def test_editing_goes_on_over_a_full_canvas_until_nothing_changes_and_never_touches_what_was_given() -> None:
    known = torch.tensor([[True, False, False, False]])
    canvas = Canvas.of(torch.tensor([[3, 0, 0, 0]]), known, 5)
    config = DecodeConfig(steps=1, editing_threshold=0.5)
    steps = list(denoise(Changing(last=3), canvas, config, generators(0)))
    assert [step.ids[0].tolist() for step in steps] == [[3, 1, 1, 1]] * 2  # the first such call changes what is given
    blank = list(denoise(Changing(), Canvas.blank(1, 4, 5), config, generators(0)))
    assert [step.ids[0].tolist() for step in blank] == [[1, 1, 1, 1], [2, 1, 1, 1], [2, 2, 1, 1], [2, 2, 1, 1]]
    limited = DecodeConfig(steps=1, editing_threshold=0.5, max_post_steps=1)
    assert len(list(denoise(Changing(), Canvas.blank(1, 4, 5), limited, generators(0)))) == 2
    none = DecodeConfig(steps=1, editing_threshold=1.0)
    assert len(list(denoise(Changing(), Canvas.blank(1, 4, 5), none, generators(0)))) == 2


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"schedule": "tine"}, "did you mean time"),
        ({"eps": 0.0}, "eps=0.0 must lie between 0 and 1"),
        ({"editing_threshold": 2}, "editing_threshold=2 is a probability between 0 and 1, or None for no editing."),
        ({"max_post_steps": -1}, "max_post_steps=-1 must be a whole number, at least 0."),
        ({"num_to_transfer": 0}, "num_to_transfer=0 must be a whole number, at least 1 or None."),
        ({"steps": 4, "block_steps": 2}, "steps=4 and block_steps=2 say the same thing twice; give one of them."),
        ({"suppress_ids": 7}, "suppress_ids=7 must be a list of token ids."),
    ],
)
def test_errors_say_what_to_type(options: dict, advice: str) -> None:
    with pytest.raises(ValueError) as error:
        decode_config({"max_new_tokens": 4, **options})
    assert advice in str(error.value)


def test_a_call_that_counts_tokens_in_one_way_sets_a_checkpoints_other_way_aside() -> None:
    assert decode_config({"steps": 4}, {"block_steps": 2, "max_new_tokens": 8}).block_steps is None
    assert decode_config({"max_new_tokens": 4}, {"block_steps": 2}).block_steps == 2
