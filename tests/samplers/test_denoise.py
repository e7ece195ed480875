"""The denoising loop against models whose every answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

import dmllm.samplers.absorbing as loop
from dmllm.samplers.canvas import Canvas, reply_length
from dmllm.samplers.config import REMASKING, DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.types import Step
from tests.samplers.table import NoiseModel, TableModel, generators

RULES = list(REMASKING)


def fill(model, config: DecodeConfig, batch: int, length: int, seeds: tuple[int, ...] | None = None) -> list[Step]:
    canvas = Canvas.blank(batch, length, model.mask)
    return list(denoise(model, canvas, config, generators(*(seeds or range(batch)))))


@pytest.mark.parametrize("remasking", RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_committed_token_never_changes_and_the_mask_is_never_one(remasking, temperature, threshold) -> None:
    model = NoiseModel()
    config = DecodeConfig(
        max_new_tokens=10, steps=9, block_length=4, remasking=remasking, temperature=temperature, threshold=threshold
    )
    steps = fill(model, config, 3, 10)
    ids, committed = torch.full((3, 10), model.mask), torch.zeros(3, 10, dtype=torch.bool)
    for step in steps:
        assert (step.committed >= committed).all()
        assert torch.equal(step.ids[committed], ids[committed])
        assert (step.ids[step.committed] != model.mask).all()
        assert (step.ids[~step.committed] == model.mask).all()
        assert (step.committed.sum(1) > committed.sum(1))[~(committed.all(1))].all()
        for start in (4, 8):  # a block begins when those before it are filled
            begun = step.committed[:, start:].any(1)
            assert step.committed[begun, :start].all()
        ids, committed = step.ids, step.committed
    assert committed.all()
    assert steps[-1].finished.all()
    assert (steps[-1].num_forwards <= 9).all()


def test_quotas_are_even_with_the_remainder_first_and_sum_to_the_block() -> None:
    steps = fill(NoiseModel(), DecodeConfig(max_new_tokens=20, steps=6, block_length=10), 1, 20)
    counts = torch.stack([s.committed.sum() for s in steps]).diff(prepend=torch.zeros(1, dtype=torch.int64))
    assert counts.tolist() == [4, 3, 3, 4, 3, 3]
    assert steps[-1].num_forwards.tolist() == [6]


def published_loop(model: NoiseModel, length: int, block_length: int, steps: int) -> list[torch.Tensor]:
    """LLaDA's generate.py at temperature 0, as published: every position scored, quotas listed beforehand."""
    canvas, states = Canvas.blank(1, length, model.mask), []
    everywhere = torch.arange(length)[None]
    for start in range(0, length, block_length):
        per_block = steps // (length // block_length)
        quotas = [block_length // per_block + (i < block_length % per_block) for i in range(per_block)]
        for quota in quotas:
            probs = model(canvas, everywhere).index_fill(-1, torch.tensor(model.mask), -torch.inf).double().softmax(-1)
            confidence, tokens = probs.max(-1)
            open_here = ~canvas.committed & (everywhere >= start) & (everywhere < start + block_length)
            best = confidence.masked_fill(~open_here, -torch.inf).topk(quota).indices
            canvas = canvas.commit(everywhere, tokens, torch.zeros_like(open_here).scatter(1, best, True))
            states.append(canvas.ids)
    return states


@pytest.mark.parametrize(("length", "block_length", "steps"), [(12, 12, 12), (12, 12, 5), (12, 4, 12), (12, 6, 4)])
def test_the_loop_takes_the_published_steps(length: int, block_length: int, steps: int) -> None:
    expected = published_loop(NoiseModel(), length, block_length, steps)
    taken = fill(NoiseModel(), DecodeConfig(max_new_tokens=length, block_length=block_length, steps=steps), 1, length)
    assert [s.ids.tolist() for s in taken] == [ids.tolist() for ids in expected]


def test_without_steps_one_token_is_committed_a_call() -> None:
    steps = fill(NoiseModel(), DecodeConfig(max_new_tokens=7), 2, 7)
    assert [s.committed.sum(1).tolist() for s in steps] == [[i, i] for i in range(1, 8)]


def test_more_steps_than_tokens_are_not_used() -> None:
    assert len(fill(NoiseModel(), DecodeConfig(max_new_tokens=4, steps=100), 1, 4)) == 4


def test_the_last_block_may_be_shorter() -> None:
    steps = fill(NoiseModel(), DecodeConfig(max_new_tokens=10, block_length=4, steps=6), 1, 10)
    assert [int(s.committed.sum()) for s in steps] == [2, 4, 6, 8, 9, 10]


def test_a_threshold_commits_all_that_is_sure_and_at_least_one() -> None:
    def predict(canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        sure = torch.where(rows % 2 == 0, 9.0, 0.0)  # even positions are certain, odd ones a toss of two
        logits = torch.full((*rows.shape, 5), -9.0)
        logits[..., 1], logits[..., 2] = sure, 0.0
        return logits

    canvas = Canvas.blank(1, 6, 4)
    steps = list(denoise(predict, canvas, DecodeConfig(max_new_tokens=6, threshold=0.9), generators(0)))
    assert steps[0].committed[0].tolist() == [True, False] * 3
    assert [int(s.committed.sum()) for s in steps] == [3, 4, 5, 6]
    everything = list(denoise(predict, canvas, DecodeConfig(max_new_tokens=6, threshold=0.0), generators(0)))
    assert len(everything) == 1


def test_steps_bound_the_calls_under_a_threshold() -> None:
    steps = fill(NoiseModel(scale=0.1), DecodeConfig(max_new_tokens=12, steps=3, threshold=0.99), 1, 12)
    assert [int(s.committed.sum()) for s in steps] == [4, 8, 12]


@pytest.mark.parametrize("remasking", RULES)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "threshold": 0.6}])
def test_a_row_of_a_batch_equals_the_same_row_alone(remasking: str, options: dict) -> None:
    config = DecodeConfig(max_new_tokens=11, block_length=4, remasking=remasking, eos_token_id=[3, 5, 8], **options)
    seeds = (11, 5, 2, 9, 21, 34)
    together = fill(NoiseModel(vocab=16, seeds=seeds), config, 6, 11, seeds)[-1]
    assert together.num_forwards.min() < together.num_forwards.max()  # some finish early
    for row, seed in enumerate(seeds):
        alone = fill(NoiseModel(vocab=16, seeds=(seed,)), config, 1, 11, (seed,))[-1]
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.equal(alone.committed[0], together.committed[row])
        assert alone.num_forwards[0] == together.num_forwards[row]


def test_the_same_seeds_give_the_same_steps_and_other_seeds_others() -> None:
    config = DecodeConfig(max_new_tokens=8, temperature=1.0)
    first, second = fill(NoiseModel(), config, 2, 8), fill(NoiseModel(), config, 2, 8)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[-1].ids, fill(NoiseModel(), config, 2, 8, (7, 8))[-1].ids)


def test_a_row_stops_at_an_end_of_sequence_once_all_before_it_is_known() -> None:
    order = [3, 0, 1, 2, 4, 5]  # position 3 is surest, and ends the reply

    def predict(canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*rows.shape, 5)
        token = torch.where(rows == 3, 2, 1)
        sureness = torch.tensor([order.index(i) for i in range(6)])[rows]
        return logits.scatter_(-1, token[..., None], (9.0 - sureness)[..., None])

    steps = list(denoise(predict, Canvas.blank(1, 6, 4), DecodeConfig(eos_token_id=2), generators(0)))
    assert [bool(s.finished) for s in steps] == [False, False, False, True]
    last = steps[-1]
    assert last.committed[0].tolist() == [True] * 4 + [False] * 2
    assert last.num_forwards.tolist() == [4]
    length, stopped = reply_length(last.ids, last.committed, (2,))
    assert length.tolist() == [3]
    assert stopped.tolist() == [True]
    never = list(denoise(predict, Canvas.blank(1, 6, 4), DecodeConfig(eos_token_id=[]), generators(0)))
    assert len(never) == 6


def test_what_is_given_stays_and_what_is_complete_needs_no_call() -> None:
    model = TableModel()
    known = torch.tensor([[True, False, True], [True, True, True]])
    canvas = Canvas.of(torch.tensor([[1, 0, 2], [2, 2, 2]]), known, model.mask)
    steps = list(denoise(model, canvas, DecodeConfig(), generators(0, 1)))
    assert steps[-1].num_forwards.tolist() == [1, 0]
    assert torch.equal(steps[-1].ids[known], torch.tensor([1, 2, 2, 2, 2]))
    assert canvas.ids[0, 1] == model.mask  # the caller's canvas is as it was
    full = Canvas.of(torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool), model.mask)
    only = list(denoise(model, full, DecodeConfig(), generators(0)))
    assert len(only) == 1
    assert only[0].num_forwards.tolist() == [0]


def test_a_known_token_that_looks_like_a_mask_is_known() -> None:
    """What is known travels as a boolean, so a prompt or infill may hold the mask token itself."""
    model = NoiseModel()
    canvas = Canvas.of(torch.tensor([[model.mask, 3]]), torch.tensor([[True, False]]), model.mask)
    last = list(denoise(model, canvas, DecodeConfig(), generators(0)))[-1]
    assert last.ids[0, 0] == model.mask
    assert last.num_forwards.tolist() == [1]


def test_only_unknown_rows_of_the_active_block_are_asked_for_on_a_cpu() -> None:
    model = TableModel(vocab=2, length=6)
    fill(model, DecodeConfig(max_new_tokens=6, block_length=3), 1, 6)
    for canvas, rows in model.calls:
        assert not canvas.committed.gather(1, rows).any()
        assert (rows // 3 == canvas.block[:, None]).all()


@pytest.mark.parametrize("remasking", RULES)
def test_asking_for_the_whole_block_as_on_a_gpu_gives_the_same_tokens(remasking: str, monkeypatch) -> None:
    config = DecodeConfig(max_new_tokens=10, block_length=4, steps=6, remasking=remasking, temperature=1.0)
    compact = fill(NoiseModel(), config, 3, 10)
    open_rows, widths = loop._open_rows, set()

    def whole(*given, compact: bool):
        found = open_rows(*given, compact=False)
        widths.add(found[0].shape[1])
        return found

    monkeypatch.setattr(loop, "_open_rows", whole)
    static = fill(NoiseModel(), config, 3, 10)
    assert widths == {4}
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(compact, static, strict=True))


def test_finished_rows_leave_the_batch() -> None:
    model = NoiseModel(vocab=12, seeds=(0, 1, 2, 3))
    sizes: list[list[int]] = []

    def watching(canvas: Canvas, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(canvas.requests.tolist())
        return model(canvas, rows)

    config = DecodeConfig(block_length=2, eos_token_id=[0, 1, 2])
    steps = list(denoise(watching, Canvas.blank(4, 12, model.mask), config, generators(*range(4))))
    assert len(sizes[-1]) < len(sizes[0])
    assert [sum(r in s for s in sizes) for r in range(4)] == steps[-1].num_forwards.tolist()


def test_generators_advance_alike_whatever_is_known() -> None:
    """Two rows with the same generator state draw the same numbers even when one has less to fill."""
    config = DecodeConfig(temperature=1.0, remasking="random")
    ends = []
    for known in (0, 2):
        g = Generator().manual_seed(0)
        canvas = Canvas.of(torch.zeros(1, 6, dtype=torch.int64), torch.arange(6)[None] < known, 49)
        steps = denoise(NoiseModel(), canvas, config, [g])
        next(steps)
        ends.append(torch.rand(1, generator=g))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "options",
    [
        {"remasking": "random"},
        {"remasking": "sequential", "steps": 5},
        {"remasking": "random", "block_steps": 3, "block_length": 6, "sub_block_length": 3},
        {"remasking": "origin", "schedule": "time", "steps": 7},
        {"remasking": "origin", "schedule": "time", "steps": 7, "remdm": "conf"},
        {"remasking": "random", "fill_behind_eos": False, "eos_token_id": [1, 2, 3], "num_to_transfer": 2},
    ],
    ids=str,
)
def test_a_rule_that_looks_at_nothing_asks_for_what_is_committed_and_finds_the_same(options, monkeypatch) -> None:
    config = DecodeConfig(temperature=1.0, **options)
    found = []
    for blind in (True, False):
        if not blind:
            monkeypatch.setattr(loop, "_is_blind", lambda config: False)
        asked, model = [], NoiseModel()

        def watching(canvas: Canvas, rows: torch.Tensor, asked=asked, model=model) -> torch.Tensor:
            asked.append(rows.shape[1])
            return model(canvas, rows)

        watching.mask = model.mask  # type: ignore[attr-defined]
        found.append((fill(watching, config, 4, 12), asked))
    (few, narrow), (many, wide) = found
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.num_forwards, other.num_forwards)
    fresh = torch.stack([step.committed for step in few]).sum(-1).diff(dim=0).amax(1)
    if "remdm" not in options:
        assert narrow[1:] == fresh.clamp(min=1).tolist()
    assert sum(narrow) < sum(wide)
