"""Ranked answers: bounds against exact probabilities, what the views have in common, and one prompt for all answers."""

from __future__ import annotations

import itertools

import pytest
import torch

import dmllm
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.pipeline import Pipeline
from dmllm.samplers.likelihood import Noise
from dmllm.scoring import Question
from tests.test_pipeline import make, picture

MASK, PROMPT = 49, [[1, 2, 3, 4, 5, 6]]


def bare(visibility: str, shift: bool = False) -> Pipeline:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DmllmConfig(
        backbone=shape, mask_token_id=MASK, eos_token_id=48, pad_token_id=47, visibility=visibility, shift=shift
    )
    model = MultimodalModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return Pipeline(model)


def values(pipe: Pipeline, answer: list[int], count: int = 600, **options) -> torch.Tensor:
    """What the views say of the answer, [S, blocks]."""
    prompt = pipe._collate([own.example for own in pipe._asked(PROMPT, None, None)[1]])
    question = Question(pipe.model, prompt, len(answer) + 3, MASK, **options)
    noise = Noise.draw(count, len(answer) + 3, torch.Generator().manual_seed(0), len(question.blocks(len(answer))))
    return question.values(torch.tensor(answer), torch.arange(len(answer)), noise, batch_size=7)


def chosen(pipe: Pipeline, ids: list[int], at: list[int], of: list[int], kind: str) -> float:
    """The sum of log p of the tokens `of` at columns `at` of a row."""
    canvas = torch.tensor([[column >= len(PROMPT[0]) for column in range(len(ids))]])
    logits = pipe.logits([ids], visibility=kind, canvas=canvas)[0].log_softmax(-1)
    return sum(float(logits[column, token]) for column, token in zip(at, of, strict=True))


def enumerated(pipe: Pipeline, known: list[int], part: list[int], kind: str) -> float:
    """The bound of `part` behind what is known, over all views of it, by the model's plain forward."""
    total, length = 0.0, len(part)
    for k in range(1, length + 1):
        views = list(itertools.combinations(range(length), k))
        for view in views:
            ids = known + [MASK if i in view else token for i, token in enumerate(part)]
            at = [len(known) + i for i in view]
            total += chosen(pipe, ids, at, [part[i] for i in view], kind) / (k * len(views))
    return total


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("kind", ["full", "prefix"])
def test_the_bound_is_the_mean_over_all_views(kind: str, shift: bool) -> None:
    pipe, answer = bare(kind, shift), [7, 8, 9, 10]
    found = values(pipe, answer)
    assert float(found.mean(0)) == pytest.approx(enumerated(pipe, PROMPT[0], answer, kind), abs=1e-4)
    assert torch.equal(found, found[:1].expand_as(found)), "few enough views are all taken"


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
def test_under_blocks_the_bound_is_that_of_each_block_given_those_before_it(shift: bool) -> None:
    pipe, answer = bare("block:4", shift), [7, 8, 9, 10, 11, 12, 13]
    parts = [answer[:2], answer[2:6], answer[6:]]  # the prompt ends within a block
    found = values(pipe, answer).mean(0)
    for number, part in enumerate(parts):
        known = PROMPT[0] + answer[: answer.index(part[0])]
        assert float(found[number]) == pytest.approx(enumerated(pipe, known, part, "block:4"), abs=1e-4)
    for options in ({"use_cache": False}, {"cfg_scale": 1e-9}):
        torch.testing.assert_close(values(pipe, answer, **options).mean(0), found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["causal", "block:1"])
@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
def test_token_by_token_it_is_the_autoregressive_likelihood(kind: str, shift: bool) -> None:
    """An aligned model is asked at a mask token, a shifted one at the token before; neither sees the answer there."""
    pipe, answer = bare(kind, shift), [7, 8, 9, 10, 11]
    exact = 0.0
    for i, token in enumerate(answer):
        ids = PROMPT[0] + answer[:i] + [MASK]
        exact += chosen(pipe, ids, [len(ids) - 1], [token], kind)
    found = values(pipe, answer, count=2)
    assert found.sum(1).tolist() == pytest.approx([exact, exact], abs=1e-4)


def test_an_answer_has_the_bound_it_has_alone_and_the_prompt_is_fed_once() -> None:
    """Longer answers before and behind it, a cache or none, batches of any size, guidance."""
    pipe = make("prefix")
    answers = ["a longer answer", "no", "yes, it is"]
    fed, forward = [], pipe.model.forward

    def counting(*args, **kwargs):
        fed.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    pipe.model.forward = counting
    options = {"generator": 0, "num_samples": 8, "cfg_scale": 0.3}
    together = pipe.rank("what?", answers, picture(0), **options)
    pipe.model.forward = forward
    prompt = len(pipe.processor.prompt("what?", [picture(0)]))
    assert fed[0] == prompt
    assert max(fed[1:]) == len("a longer answer") + 1, "the prompt stands in the cache"
    for changed in ({"use_cache": False}, {"batch_size": 3}):
        again = pipe.rank("what?", answers, picture(0), **options, **changed)
        assert [one.log_prob for one in again] == pytest.approx([one.log_prob for one in together], abs=1e-3)
    small = next(one for one in together if one.text == "no")
    ids, image = pipe.processor.prompt("what?", [picture(0)]).input_ids, [picture(0)]
    asked = pipe.score(ids[None], [small.ids], images=image, num_samples=4000, generator=1, cfg_scale=0.3)
    assert small.log_prob == pytest.approx(float(asked), abs=1.0)


def test_rows_of_a_batch_are_ranked_as_alone_and_the_order_of_answers_plays_no_part() -> None:
    pipe = make("full")
    questions, pictures = ["what?", "and now?"], [picture(0), None]
    answers = [["red", "green", "blue"], ["yes", "no"]]
    together = pipe.rank(questions, answers, pictures, generator=3, num_samples=16)
    alone = [pipe.rank(*one, generator=3, num_samples=16) for one in zip(questions, answers, pictures, strict=True)]
    for found, own in zip(together, alone, strict=True):
        assert [one.index for one in found] == [one.index for one in own]
        assert [one.log_prob for one in found] == pytest.approx([one.log_prob for one in own], abs=1e-4)
    turned = pipe.rank("what?", answers[0][::-1], picture(0), generator=3, num_samples=16)
    assert [one.text for one in turned] == [one.text for one in together[0]]
    assert [one.log_prob for one in turned] == pytest.approx([one.log_prob for one in together[0]], abs=1e-4)
    first = together[0][0]
    assert first.behind == first.behind_error == 0
    assert all(one.behind == pytest.approx(first.log_prob - one.log_prob) for one in together[0])
    means = pipe.rank("what?", ["red", "a much longer answer"], picture(0), by="per_token", generator=3)
    assert means[0].per_token > means[1].per_token
    assert means[0].per_token == pytest.approx(means[0].log_prob / len(means[0].ids))


def test_what_cannot_be_ranked_is_refused() -> None:
    pipe = make("full")
    assert pipe.rank("what?", []) == []
    for call, said in (
        (lambda: pipe.rank("what?", ["a", ""]), "number 1 is ''"),
        (lambda: pipe.rank("what?", ["<|mask|>"]), "special token"),
        (lambda: pipe.rank("what?", ["a"], by="mean"), "by='mean' is not known"),
        (lambda: pipe.rank("what?", ["a"], num_samples=1), "at least 2"),
        (lambda: pipe.rank(["what?", "and?"], [["a"]]), "answers: 1 for 2 questions"),
        (lambda: pipe.rank("what?", "yes"), "a list of texts"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_the_shipped_model_ranks_first_what_it_answers() -> None:
    pipeline = dmllm.load("dmllm-tiny", device="cpu")
    questions = ["how many objects are there?", "is there a red triangle?"]
    answers = [["3", "4", "5"], ["yes", "no"]]
    ranked = pipeline.rank(questions, answers, ["examples/scene.png"] * 2, generator=0)
    assert [found[0].text for found in ranked] == ["4", "yes"]
    assert all(found[1].behind > 5 for found in ranked)
