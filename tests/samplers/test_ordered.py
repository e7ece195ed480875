"""Decoding in any order: what is stored changes nothing, and a call says what training's two streams say."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

import dmllm.samplers.absorbing
import dmllm.samplers.ahead
import dmllm.samplers.denoise
import dmllm.samplers.stream
from dmllm.models.multimodal import MultimodalModel
from dmllm.objectives import build_objective
from dmllm.pipeline import Pipeline
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.samplers.ordered import OrderedPredictor
from dmllm.samplers.stream import Stream
from dmllm.types import Batch
from tests.exact import Joint, assert_drawn_from, generators
from tests.samplers.test_ahead import Late, Replayed
from tests.samplers.test_blocks import make, prompts, seeds, watched
from tests.test_pipeline import make as chatting
from tests.test_pipeline import picture

SETTINGS = [
    {},
    {"remasking": "random", "temperature": 1.0},
    {"remasking": "sequential", "temperature": 0.7, "cfg_scale": 0.8, "eos_token_id": [1, 2, 3, 4, 5, 6]},
    {"remasking": "entropy", "steps": 4},
    {"block_length": 4, "threshold": 0.1, "temperature": 0.7, "cfg_scale": 0.5, "top_p": 0.9},
    {"steps": 5, "schedule": "time", "remasking": "origin", "remdm": "rescale", "eta": 0.8, "temperature": 1.0},
    {"steps": 11, "schedule": "time", "remasking": "origin", "remdm": "conf", "temperature": 1.0, "cfg_scale": 0.3},
    {"threshold": 0.1, "kl_threshold": 0.5, "kl_history_length": 1},
    {"num_to_transfer": 3, "block_length": 4, "max_new_tokens": 12, "remasking": "random"},
]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return make(visibility="permutation")


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_with_what_is_known_stored_logits_and_tokens_are_those_without(pipe: Pipeline, options: dict) -> None:
    stored, few = watched(pipe, **options)
    plain, many = watched(pipe, **options, use_cache=False)
    assert torch.equal(stored.sequences, plain.sequences)
    assert torch.equal(stored.num_forwards, plain.num_forwards)
    few = [call for call in few if call[1].shape[1]]  # the first computes the prompts
    assert sum(rows for rows, _ in few) < sum(rows for rows, _ in many)
    if {"remdm", "threshold"} & set(options):  # rows differ in how many places are open, and what pads them differs
        return
    for (_, mine), (_, theirs) in zip(few, many, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_row_of_a_batch_equals_the_same_request_alone(pipe: Pipeline, options: dict, use_cache: bool | None) -> None:
    ids, mask = prompts()
    together = pipe.generate(ids, mask, generator=seeds(), use_cache=use_cache, **options)
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = pipe.generate(own[real][None], generator=seeds()[row : row + 1], use_cache=use_cache, **options)
        assert torch.equal(alone.sequences[0, int(real.sum()) :], together.sequences[row, 9:])
        assert alone.num_forwards[0] == together.num_forwards[row]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_gpus_loop_finds_the_tokens_of_a_cpus(pipe: Pipeline, options: dict, monkeypatch) -> None:
    plain = pipe.generate(*prompts(), generator=seeds(), **options)
    for module in (dmllm.samplers.stream, dmllm.samplers.denoise, dmllm.samplers.absorbing):
        monkeypatch.setattr(module, "is_static", lambda device: True)
    monkeypatch.setattr(dmllm.samplers.stream, "Graphed", Replayed)
    monkeypatch.setattr(dmllm.samplers.ahead, "Flag", Late)
    static, calls = watched(pipe, **options)
    assert torch.equal(plain.sequences, static.sequences)
    assert torch.equal(plain.num_forwards, static.num_forwards)
    if options.get("remasking") == "random":
        count = options.get("num_to_transfer", 1)
        assert {rows for rows, _ in calls[2:]} == {2 * count}, "what became known last, and what comes next"


def training_says(model: MultimodalModel, ids: torch.Tensor, prompt: int, order: list[int]) -> float:
    """-log p of what stands behind the prompt, as the objective has it."""
    row, length = ids[None], len(order)
    batch = Batch(
        input_ids=row,
        labels=row.clone(),
        image_slots=torch.full_like(row, -1),
        documents=torch.zeros_like(row),
        positions=torch.arange(row.shape[1])[None],
        indices=torch.zeros(1, dtype=torch.int64),
    )
    batch.labels[:, :prompt] = -100
    rank = torch.full_like(row, -1)
    rank[0, prompt:] = torch.tensor(order).argsort()
    learned = build_objective("permutation", {}, model.config.special, "permutation")
    with torch.no_grad():
        loss = learned.loss(model, learned.arrange(batch, rank))["permutation"]
    assert float(loss.count) == length
    return float(loss.total)


@pytest.mark.parametrize("remasking", ["random", "sequential", "low_confidence"])
def test_what_the_calls_say_of_the_tokens_is_what_training_says_in_the_same_order(pipe, remasking) -> None:
    """One token a call, each known token fed once: its logits are those of the query stream; `score` says the same."""
    seen, forward = [], pipe.model.forward

    def watching(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append((kwargs["inputs_embeds"].shape[1], kwargs["visibility"].canvas[0], output.logits[0]))
        return output

    pipe.model.forward = watching
    ids = [[5, 6, 7]]
    out = pipe.generate(ids, generator=0, temperature=1.0, remasking=remasking, max_new_tokens=6)
    del pipe.model.forward
    known = [step.committed[0].tolist() for step in out.trajectory]
    order = [next(i for i in range(6) if now[i] and not before[i]) for before, now in itertools.pairwise(
        [[False] * 6, *known])]  # fmt: skip
    assert (order == list(range(6))) == (remasking == "sequential")
    total = 0.0
    for number, (rows, canvas, logits) in enumerate(seen[1:]):
        queries = 6 - number if remasking == "low_confidence" else 1
        assert (rows, int(canvas.sum())) == (queries + (number > 0), queries), "and the token that became known last"
        row = logits.log_softmax(-1)[0 if len(logits) == 1 else sorted(order[number:]).index(order[number])]
        total -= float(row[out.sequences[0, 3 + order[number]]])
    assert total == pytest.approx(training_says(pipe.model, out.sequences[0], 3, order), rel=1e-4)
    scored = pipe.score(ids, out.sequences[:, 3:], orders=[order])
    assert -float(scored) == pytest.approx(total, rel=1e-4)


def test_logits_of_a_canvas_are_those_of_the_first_call_each_place_by_itself(pipe: Pipeline) -> None:
    ids, canvas = torch.tensor([[5, 6, 7, 49, 49, 49, 49]]), torch.tensor([[False] * 3 + [True] * 4])
    plain = pipe.logits(ids, canvas=canvas)[:, 3:]
    said, forward = [], pipe.model.forward
    pipe.model.forward = lambda **given: said.append(forward(**given)) or said[-1]
    pipe.generate(ids[:, :3], max_new_tokens=4)
    del pipe.model.forward
    torch.testing.assert_close(said[1].logits, plain, atol=1e-5, rtol=0)
    ids[0, 5] = 11
    assert torch.equal(pipe.logits(ids, canvas=canvas)[:, [3, 4, 6]], plain[:, [0, 1, 3]]), "no place sees another"


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.5}, {"use_cache": False}])
def test_a_score_is_the_mean_of_the_chain_rule_over_orders(pipe: Pipeline, options: dict) -> None:
    """Of all orders if they are given, of random ones if not; no matter how many a call takes."""
    ids, answer = [[5, 6, 7], [8, 9, 1]], [[1, 2, 3], [4, 4, 4, 4]]
    every = [list(order) for order in itertools.permutations(range(3))]
    alone = torch.stack([pipe.score(ids[:1], answer[:1], orders=[order], **options) for order in every])
    assert float(alone.std()) > 0.01, "the orders of a random model say different things"
    together = pipe.score(ids[:1], answer[:1], orders=every, batch_size=4, **options)
    torch.testing.assert_close(together, alone.mean(0), atol=1e-5, rtol=0)
    drawn = pipe.score(ids, answer, num_samples=600, generator=0, **options)
    assert float(drawn[0]) == pytest.approx(float(together), abs=5 * float(alone.std()) / 600**0.5)
    if not options:
        chain = -training_says(pipe.model, torch.tensor([*ids[0], *answer[0]]), 3, every[4])
        assert float(alone[4]) == pytest.approx(chain, rel=1e-5)


def test_answers_are_ranked_by_the_same_orders_and_holes_are_filled_from_both_sides() -> None:
    pipe = chatting("permutation")
    answers, options = ["red", "green", "a longer one"], {"generator": 0, "num_samples": 200}
    ranked = pipe.rank("what?", answers, picture(0), **options)
    ids = pipe.processor.prompt("what?", [picture(0)]).input_ids
    for one in ranked:
        said = pipe.score(ids[None], [one.ids], images=[picture(0)], num_samples=200, generator=7)
        assert one.log_prob == pytest.approx(float(said), abs=6 * max(one.standard_error, 0.02))
    assert [one.log_prob for one in ranked] == sorted((one.log_prob for one in ranked), reverse=True)
    assert ranked[1].behind_error < 1.5 * (ranked[0].standard_error + ranked[1].standard_error)
    text = "A [MASK:3] is left of the [MASK:2]."
    filled = [pipe.infill(text, "what?", picture(0), use_cache=cached).text for cached in (None, False)]
    assert filled[0] == filled[1]
    assert filled[0].startswith("A ")
    assert filled[0].endswith(".")
    other = pipe.infill(text.replace("left", "west"), "what?", picture(0))
    assert other.filled != pipe.infill(text, "what?", picture(0)).filled


@pytest.mark.parametrize("image_prefix", [False, True])
def test_pictures_and_questions_are_given_and_computed_once(image_prefix: bool) -> None:
    pipe = chatting("permutation", image_prefix=image_prefix)
    questions, pictures = ["hi", "what is left of the red one?", "what?"], [picture(0), None, [picture(1), picture(2)]]
    options = {"max_new_tokens": 6, "remasking": "random", "temperature": 0.5}
    stored = pipe.chat(questions, pictures, generator=[*generators(0, 1, 2)], **options)
    plain = pipe.chat(questions, pictures, generator=[*generators(0, 1, 2)], use_cache=False, **options)
    assert stored == plain
    for row, own in enumerate(zip(questions, pictures, strict=True)):
        assert pipe.chat(*own, generator=row, **options) == stored[row]
    assert pipe.chat("hi", picture(3), generator=0, **options) != stored[0], "the picture is seen"


def test_a_prompt_that_begins_as_an_earlier_one_but_goes_on_otherwise_is_computed_anew() -> None:
    """Every row of a prompt sees all of it."""
    pipe = make(visibility="permutation")
    fresh, kept = (Pipeline(pipe.model, None, pipe.generation, prompt_room=room) for room in (0, 1 << 20))
    for ids in ([[1, 2, 3, 4]], [[1, 2, 3, 5]], [[1, 2, 3]], [[1, 2, 3, 4]]):
        assert torch.equal(fresh.generate(ids).sequences, kept.generate(ids).sequences)
    assert kept.prompts.hits == 4, "the last prompt is the first again"


class Exact:
    """The toy as a model: embeddings are the ids, and logits the exact conditionals of what a row sees."""

    def __init__(self, joint: Joint):
        self.joint = joint

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[..., None].double()

    def __call__(self, *, inputs_embeds, positions, visibility, rows, **_) -> SimpleNamespace:
        size = inputs_embeds.shape[1]
        flat = (rows + torch.arange(len(rows))[:, None] * size).flatten()
        found = self.joint.score(
            input_ids=inputs_embeds[..., 0].long(), positions=positions, visibility=visibility, rows=flat
        )
        return SimpleNamespace(logits=found.logits.view(*rows.shape, -1))


@pytest.mark.parametrize(
    "options",
    [{"remasking": "random"}, {"remasking": "sequential"}, {"remasking": "entropy"}, {"block_length": 2}],
    ids=str,
)
def test_one_token_a_call_with_exact_conditionals_draws_from_the_data_distribution(options) -> None:
    joint, count = Joint(3, 3), 3000
    nothing = torch.zeros(count, 0, 1, dtype=torch.float64)
    zeros = torch.zeros(count, dtype=torch.int64)
    stream = Stream(Exact(joint), nothing, torch.arange(3).expand(count, -1), zeros, 3, "permutation", None)
    config = DecodeConfig(temperature=1.0, **{"remasking": "random", **options})
    canvas = Canvas.blank(count, 3, joint.mask)
    *_, last = denoise(OrderedPredictor(stream), canvas, config, generators(*range(count)))
    assert (last.num_forwards == 3).all()
    assert_drawn_from(joint, last.ids)


def test_what_a_known_token_cannot_answer_is_refused(pipe: Pipeline) -> None:
    for options in ({"editing_threshold": 0.5}, {"revoke_threshold": 0.5, "threshold": 0.3},
                    {"blocks_ahead": 1, "block_length": 4}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* is not for visibility='permutation'"):
            pipe.generate([[1, 2]], **options)
    with pytest.raises(ValueError, match="takes orders= in place of hidden="):
        pipe.score([[1, 2]], [[3, 4]], hidden=[[True, False]])
    with pytest.raises(ValueError, match="takes no orders="):
        make(visibility="full").score([[1, 2]], [[3, 4]], orders=[[1, 0]])
    with pytest.raises(ValueError, match="must be lists of the places 0 to 1 of the answer, each place once"):
        pipe.score([[1, 2]], [[3, 4]], orders=[[1, 1]])
