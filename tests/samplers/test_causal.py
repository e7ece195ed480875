"""One token a call: a tiny random model that predicts the next token, with a cache, in batches, and its likelihoods."""

from __future__ import annotations

import itertools

import pytest
import torch

import dmllm.samplers.causal
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.pipeline import Pipeline
from tests.exact import Joint, assert_drawn_from
from tests.samplers.test_blocks import MASK, make, prompts, seeds
from tests.test_as_on_a_gpu import act
from tests.test_pipeline import make as with_pictures
from tests.test_pipeline import picture

STOPS = [1, 2, 3, 4, 5, 6]
SETTINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.6, "eos_token_id": STOPS},
    {"cfg_scale": 0.8, "eos_token_id": STOPS},
    {"temperature": 1.0, "cfg_scale": 0.5, "suppress_ids": [7, 8, 9]},
]


def causal(mtp: int = 1) -> Pipeline:
    """Fed in whole what `make` gives, of which a row predicts the next token."""
    pipe = make(shift=True, visibility="causal")
    if mtp > 1:
        torch.manual_seed(1)
        pipe.model.adapt(heads={"mtp": {"n": mtp}})
        for parameter in pipe.model.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return causal()


def greedily(pipe: Pipeline, ids: list[int], count: int) -> list[int]:
    """Without a cache or a loop: the most probable token behind all that is known, again and again."""
    found = list(ids)
    for _ in range(count):
        logits = pipe.logits([[*found, 0]])[0, -1]
        logits[MASK] = -torch.inf
        found.append(int(logits.argmax()))
    return found[len(ids) :]


def fed(pipe: Pipeline, *asked, **options):
    """The outcome, and how many rows each call is fed."""
    rows, forward = [], pipe.model.forward

    def watching(*args, **kwargs):
        rows.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    pipe.model.forward = watching
    try:
        return pipe.generate(*asked, **options), rows
    finally:
        del pipe.model.forward


def test_each_token_is_the_most_probable_one_behind_those_before_it(pipe: Pipeline) -> None:
    ids, mask = prompts()
    found = pipe.generate(ids, mask)
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        assert found.sequences[row, 9:].tolist() == greedily(pipe, own[real].tolist(), 11)
    assert found.num_forwards.tolist() == [11] * 5


def test_the_prompt_is_fed_once_and_then_the_last_token_alone(pipe: Pipeline) -> None:
    assert fed(pipe, [[1] * 9])[1] == [9] + [1] * 10
    assert fed(pipe, *prompts())[1] == [9] + [1] * 10
    assert fed(pipe, [[1] * 9], use_cache=False)[1] == list(range(9, 20))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_with_a_cache_tokens_are_those_without(pipe: Pipeline, options: dict) -> None:
    stored, plain = (pipe.generate(*prompts(), generator=seeds(), use_cache=c, **options) for c in (None, False))
    assert torch.equal(stored.sequences, plain.sequences)
    assert torch.equal(stored.num_forwards, plain.num_forwards)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_row_of_a_batch_equals_the_same_request_alone(pipe: Pipeline, options: dict) -> None:
    ids, mask = prompts()
    together = pipe.generate(ids, mask, generator=seeds(), **options)
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = pipe.generate(own[real][None], generator=seeds()[row : row + 1], **options)
        assert torch.equal(alone.sequences[0, int(real.sum()) :], together.sequences[row, 9:])
        assert alone.num_forwards[0] == together.num_forwards[row]
    if "eos_token_id" in options:
        assert len(set(together.num_forwards.tolist())) > 1, "rows end when they have said so"


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_gpus_loop_finds_the_tokens_of_a_cpus(
    pipe: Pipeline, options: dict, use_cache: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipe.generate(*prompts(), generator=seeds(), use_cache=use_cache, **options)
    act(monkeypatch)
    static, rows = fed(pipe, *prompts(), generator=seeds(), use_cache=use_cache, **options)
    assert torch.equal(plain.sequences, static.sequences)
    assert torch.equal(plain.num_forwards, static.num_forwards)
    if use_cache is None:
        assert rows == [8] + [1] * (len(rows) - 1), "all but the prompts' last rows, then shapes that stay the same"


def test_settings_of_other_models_change_nothing(pipe: Pipeline) -> None:
    """What is asked of a model that fills in may stay in a recipe when what is learned changes."""
    plain = pipe.generate(*prompts())
    for options in (
        {"steps": 1},
        {"block_length": 4, "threshold": 0.1, "remasking": "entropy"},
        {"num_to_transfer": 4, "editing_threshold": 0.5},
        {"store_calls": True, "prompt_first": True, "block_length": 4},
    ):
        found = pipe.generate(*prompts(), **options)
        assert torch.equal(found.sequences, plain.sequences)
        assert torch.equal(found.num_forwards, plain.num_forwards)


def test_what_cannot_be_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="Request 1 has an empty prompt, and a token is predicted by the row before"):
        pipe.generate([[1, 2], [0, 0]], [[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="empty prompt"):
        pipe.score(torch.zeros(1, 0, dtype=torch.int64), [[3]])
    with pytest.raises(ValueError, match="draft= is not for a model that predicts the next token"):
        pipe.generate([[1, 2]], draft=[[MASK, 3]])
    with pytest.raises(ValueError, match=r"suffix_ids=\[3\] is not for a model that predicts the next token"):
        pipe.generate([[1, 2]], suffix_ids=[3])
    with pytest.raises(ValueError, match="cache=dual is for models with full attention"):
        pipe.generate([[1, 2]], cache="dual")
    with pytest.raises(ValueError, match="hidden= is for models that mask"):
        pipe.score([[1, 2]], [[3]], hidden=[[True]])


def test_an_answer_follows_a_constraint_token_by_token() -> None:
    pipe = with_pictures("causal")
    pipe.model.config.shift = True
    answers = ["yes", "no", "a red dot"]
    said = pipe.chat(["what?", "and now?"], [picture(0), None], choices=[answers, answers[:2]], max_new_tokens=12)
    assert said[0].text in answers
    assert said[1].text in answers[:2]
    assert pipe.chat("what?", constraint="[ab]{3}", max_new_tokens=8).text.strip("ab") == ""


def test_a_picture_is_answered_alike_alone_and_beside_others() -> None:
    pipe = with_pictures("causal", image_prefix=True)
    pipe.model.config.shift = True
    asked, shown = ["what?", "and where is it?", "now?"], [picture(0), [picture(1), picture(2)], None]
    together = pipe.chat(asked, shown, generator=0, temperature=0.8)
    assert together == [pipe.chat(*one, generator=0, temperature=0.8) for one in zip(asked, shown, strict=True)]
    assert len({reply.text for reply in together}) > 1


@pytest.mark.parametrize("use_cache", [None, False])
def test_a_likelihood_is_exact_and_takes_one_call(pipe: Pipeline, use_cache: bool | None) -> None:
    ids, answers = [[1, 2, 3], [4, 5, 6]], [[7, 8, 9, 10], [11]]
    found = pipe.score(ids, answers, use_cache=use_cache, num_samples=1)
    for row, (prompt, answer) in enumerate(zip(ids, answers, strict=True)):
        logits = pipe.logits([prompt + answer])[0, len(prompt) :].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(answer)[:, None]).double().sum()
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-4)
    calls, forward = [], pipe.model.forward
    pipe.model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    pipe.score(ids[:1], answers[:1], use_cache=use_cache)
    del pipe.model.forward
    assert len(calls) == (1 if use_cache is False else 2), "the prompt's rows, if they are kept, and the answer's"


def small(vocab: int = 4, mtp: int = 1) -> Pipeline:
    """So few words that every text can be scored."""
    torch.manual_seed(3)
    shape = {"vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DmllmConfig(
        backbone=shape, mask_token_id=vocab - 1, eos_token_id=0, pad_token_id=0, visibility="causal", shift=True
    )
    model = MultimodalModel(config)
    if mtp > 1:
        model.adapt(heads={"mtp": {"n": mtp}})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return Pipeline(model, None, {"eos_token_id": []}, prompt_room=0)


def texts(pipe: Pipeline, length: int, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """All texts without the mask token, and their log-likelihoods."""
    words = int(pipe.special.mask)
    every = torch.tensor(list(itertools.product(range(words), repeat=length)))
    return every, pipe.score([prompt] * len(every), every)


def exactly(pipe: Pipeline, length: int, prompt: list[int]) -> Joint:
    """The distribution of answers, the mask token's probability shared out at each of their places."""
    every, _ = texts(pipe, length, prompt)
    logits = torch.cat([pipe.logits([prompt + text])[:, len(prompt) :] for text in every.tolist()])
    shares = logits[..., :-1].double().log_softmax(-1)
    probs = shares.gather(-1, every[..., None]).squeeze(-1).sum(1).exp()
    return Joint(int(pipe.special.mask), length, probs=probs)


def test_the_likelihoods_of_all_texts_are_a_distribution() -> None:
    pipe = small()
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    assert float(pipe.score([[1, 2]] * len(every), every).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_tokens_are_drawn_from_the_models_distribution() -> None:
    pipe, count = small(), 3000
    joint = exactly(pipe, 3, [1, 2])
    assert float(joint.probs.sum()) == pytest.approx(1, abs=1e-6)
    draws = [torch.Generator().manual_seed(seed) for seed in range(count)]
    found = pipe.generate([[1, 2]] * count, max_new_tokens=3, temperature=1.0, generator=draws)
    assert_drawn_from(joint, found.sequences[:, 2:])


def test_ranking_says_what_scoring_says() -> None:
    pipe = with_pictures("causal")
    pipe.model.config.shift = True
    ranked = pipe.rank("what?", ["red", "a blue dot"], picture(0))
    prompt = pipe.processor.prompt("what?", [picture(0)]).input_ids
    for one in ranked:
        alone = pipe.score(prompt[None], [one.ids], images=[picture(0)])
        assert one.log_prob == pytest.approx(float(alone), abs=1e-4)
        assert one.standard_error == 0


def test_holes_are_refused() -> None:
    pipe = with_pictures("causal")
    pipe.model.config.shift = True
    with pytest.raises(ValueError, match="filled from what stands on both sides, and with visibility='causal'"):
        pipe.infill("a [MASK:2] dot")


def test_heads_are_named_alike_where_they_are_learned_and_where_they_draft() -> None:
    from dmllm.objectives import autoregressive

    assert autoregressive.HEAD == dmllm.samplers.causal.HEAD
