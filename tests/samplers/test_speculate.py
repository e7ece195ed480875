"""Self-speculation: the same tokens, or the same distribution, in fewer calls."""

from __future__ import annotations

import pytest
import torch

from dmllm.objectives import build_objective
from dmllm.pipeline import Pipeline
from tests.exact import assert_drawn_from
from tests.objectives.test_block import batch_of, draws_for
from tests.samplers.test_blocks import make, prompts, seeds
from tests.samplers.test_causal import STOPS, causal, exactly, fed, small
from tests.test_as_on_a_gpu import act

DRAWN = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.6, "eos_token_id": STOPS},
    {"temperature": 1.0, "cfg_scale": 0.5, "suppress_ids": [7, 8, 9]},
]
GREEDY = [{}, {"eos_token_id": STOPS}, {"cfg_scale": 0.8}]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return causal(mtp=4)


@pytest.fixture(scope="module")
def trained() -> Pipeline:
    """Has learned to count, with heads that look three tokens further."""
    torch.manual_seed(0)
    pipe = Pipeline(small(vocab=24, mtp=4).model, None, {"max_new_tokens": 20, "eos_token_id": []}, prompt_room=0)
    learned = build_objective("autoregressive", {"mtp": 4}, pipe.special, "causal")
    optimiser = torch.optim.AdamW(pipe.model.parameters(), lr=5e-3)
    start = torch.arange(23)
    batch = batch_of((start[:, None] + torch.arange(24)) % 23)
    for _ in range(200):
        losses = learned.loss(pipe.model, learned.prepare(batch, draws_for(batch)))
        sum(loss.total / loss.count for loss in losses.values()).backward()
        optimiser.step()
        optimiser.zero_grad()
    pipe.model.eval()
    return pipe


def test_a_trained_models_drafts_are_kept(trained: Pipeline) -> None:
    """Twenty tokens: three drafts and one more in every call but the first, which has no drafts yet."""
    plain = trained.generate([[3], [7]])
    assert plain.sequences[0].tolist() == [(3 + i) % 23 for i in range(21)]
    assert plain.num_forwards.tolist() == [20, 20]
    for drafts, calls in ((1, 11), (2, 8), (3, 6)):
        found = trained.generate([[3], [7]], speculate=drafts)
        assert torch.equal(found.sequences, plain.sequences)
        assert found.num_forwards.tolist() == [calls, calls]
    drawn = trained.generate([[3]], speculate=3, temperature=0.5, generator=0)
    assert torch.equal(drawn.sequences, plain.sequences[:1])
    assert int(drawn.num_forwards) < 10


def test_a_text_ends_where_it_says_so_within_the_drafts(trained: Pipeline) -> None:
    plain, found = (trained.generate([[3], [7]], eos_token_id=12, speculate=drafts) for drafts in (0, 3))
    assert torch.equal(plain.sequences, found.sequences)
    assert found.num_forwards.tolist() == [3, 2]


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_whatever_the_heads_say_tokens_are_those_of_one_call_a_token(
    pipe: Pipeline, options: dict, drafts: int, use_cache: bool | None
) -> None:
    plain = pipe.generate(*prompts(), use_cache=use_cache, **options)
    found = pipe.generate(*prompts(), use_cache=use_cache, speculate=drafts, **options)
    assert torch.equal(found.sequences, plain.sequences)
    assert (found.num_forwards <= plain.num_forwards).all()


@pytest.mark.parametrize("options", [*GREEDY, *DRAWN], ids=str)
def test_with_a_cache_alone_or_as_on_a_gpu_tokens_are_the_same(pipe: Pipeline, options: dict, monkeypatch) -> None:
    ids, mask = prompts()
    found = pipe.generate(ids, mask, generator=seeds(), speculate=2, **options)
    again = pipe.generate(ids, mask, generator=seeds(), speculate=2, use_cache=False, **options)
    assert torch.equal(found.sequences, again.sequences)
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = pipe.generate(own[real][None], generator=seeds()[row : row + 1], speculate=2, **options)
        assert torch.equal(alone.sequences[0, int(real.sum()) :], found.sequences[row, 9:])
        assert alone.num_forwards[0] == found.num_forwards[row]
    act(monkeypatch)
    static, rows = fed(pipe, ids, mask, generator=seeds(), speculate=2, **options)
    assert torch.equal(static.sequences, found.sequences)
    assert torch.equal(static.num_forwards, found.num_forwards)
    assert set(rows[1:]) == {3}, "the last token and two drafts"


def test_a_call_feeds_the_last_token_and_the_drafts(trained: Pipeline) -> None:
    """Near the end of the answer no more drafts are fed than it has room for."""
    assert fed(trained, [[3, 4, 5]], speculate=3, max_new_tokens=8)[1] == [6, 4, 3]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}], ids=str)
def test_tokens_are_drawn_from_the_distribution_that_one_call_a_token_draws_from(options: dict) -> None:
    """Heads of random weights, whose drafts are often refused."""
    pipe, count = small(mtp=3), 3000
    joint = exactly(pipe, 3, [1, 2])
    if options:
        joint.probs = nucleus(pipe, joint, [1, 2], options["top_p"])
    draws = [torch.Generator().manual_seed(seed) for seed in range(count)]
    asked = {"max_new_tokens": 3, "temperature": 1.0, "generator": draws, "speculate": 2}
    found = pipe.generate([[1, 2]] * count, **asked, **options)
    assert_drawn_from(joint, found.sequences[:, 2:])
    calls = torch.bincount(found.num_forwards, minlength=4)
    assert (calls[[2, 3]] > 100).all(), "some drafts are kept, and some are not"


def nucleus(pipe: Pipeline, joint, prompt: list[int], top_p: float) -> torch.Tensor:
    """The probabilities of all texts where at each place only the most probable words that reach top_p remain."""
    probs = torch.ones(len(joint.texts), dtype=torch.float64)
    for number, text in enumerate(joint.texts.tolist()):
        shares = pipe.logits([prompt + text])[0, len(prompt) :, :-1].double().softmax(-1)
        for share, word in zip(shares, text, strict=True):
            order = share.argsort(descending=True)
            kept = order[share[order].cumsum(0) - share[order] < top_p]
            probs[number] *= share[word] / share[kept].sum() if word in kept.tolist() else 0.0
    return probs


def test_drafts_that_cannot_be_made_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"heads draft 3 tokens; say at most 3, or train with .*mtp=5"):
        pipe.generate([[1, 2]], speculate=4)
    with pytest.raises(ValueError, match=r"heads draft 0 tokens; leave it out, or train with .*mtp=2"):
        causal().generate([[1, 2]], speculate=1)
    with pytest.raises(ValueError, match="speculate=2 is for models of which a row predicts the next token"):
        make(visibility="full").generate([[1, 2]], speculate=2)
    with pytest.raises(ValueError, match="speculate=2: a constraint is followed token by token"):
        pipe.generate([[1, 2]], speculate=2, choices=["a"])
    with pytest.raises(ValueError, match="speculate"):
        pipe.generate([[1, 2]], speculate=-1)
