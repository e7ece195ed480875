"""One block of each answer noised: what is before it is given, what is behind it hidden, and the bound is the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.objectives import build_objective
from dmllm.objectives.draws import Draws
from dmllm.types import IGNORE, PADDING, PREFIX, Batch, SpecialTokens
from tests.exact import Joint

MASK = 11
SPECIAL = SpecialTokens(mask=MASK, eos=10, pad=10)


def batch_of(ids, documents=None, positions=None) -> Batch:
    ids = torch.as_tensor(ids)
    return Batch(
        input_ids=ids,
        labels=ids.clone(),
        image_slots=torch.full_like(ids, -1),
        documents=torch.zeros_like(ids) if documents is None else torch.as_tensor(documents),
        positions=torch.arange(ids.shape[1]).expand_as(ids) if positions is None else torch.as_tensor(positions),
        indices=torch.arange(len(ids)),
    )


def draws_for(batch: Batch, step: int = 0) -> Draws:
    return Draws(seed=0, step=step, num_examples=len(batch), indices=batch.indices)


def objective(visibility: str = "full", **options):
    return build_objective("masked", options, SPECIAL, visibility)


def mean(learned, model, noised) -> float:
    loss = learned.loss(model, noised)["masked"]
    return float(loss.total / loss.count)


def test_before_the_block_all_is_given_and_behind_it_all_is_hidden():
    """Packed behind a shared picture, with a prompt each: blocks are counted over what has a label."""
    documents = [[PREFIX, PREFIX] + [0] * 9 + [1] * 6 + [PADDING]] * 200
    batch = batch_of(torch.randint(0, 10, (200, 18)), documents)
    batch.labels[:, [0, 1, 2, 3, 11, 17]] = IGNORE
    noised = objective("prefix", noise_block=3, min_noise=1.0).prepare(batch, draws_for(batch))
    scored = torch.zeros(200 * 18, dtype=torch.bool)
    scored[noised.rows] = True
    chosen: list[Counter] = [Counter(), Counter()]
    for row, ids, out in zip(batch.input_ids, noised.batch.input_ids, scored.view(200, 18), strict=True):
        assert torch.equal(ids[[0, 1, 2, 3, 11, 17]], row[[0, 1, 2, 3, 11, 17]])
        for number, (start, end) in enumerate(((4, 11), (12, 17))):
            first = int(out[start:end].int().argmax()) // 3
            chosen[number][first] += 1
            begin, stop = start + 3 * first, min(start + 3 * first + 3, end)
            assert out[begin:stop].all()
            assert out[start:end].sum() == stop - begin
            assert torch.equal(ids[start:begin], row[start:begin])
            assert (ids[begin:end] == MASK).all()
    assert sorted(chosen[0]) == [0, 1, 2]
    assert sorted(chosen[1]) == [0, 1]
    assert min(chosen[0].values()) > 40
    assert min(chosen[1].values()) > 70
    targets = batch.input_ids.flatten()[noised.rows]
    assert torch.equal(noised.targets, targets)


@pytest.mark.parametrize(("length", "options"), [(1, {"min_noise": 1.0}), (3, {"complementary": True})])
def test_with_exact_conditionals_what_is_drawn_has_the_datas_entropy_on_average(length, options):
    """What is all hidden says nothing: a block is learned given what is before it. The last of two has one token."""
    joint = Joint(2, 4, mask=MASK)
    learned, found = objective(noise_block=length, **options), []
    for step in range(16):
        batch = batch_of(joint.draw(1_500, seed=step))
        found.append(mean(learned, joint.score, learned.prepare(batch, draws_for(batch, step))))
    error = float(torch.tensor(found).std()) / 16**0.5
    assert error < 0.02
    assert abs(sum(found) / 16 - joint.entropy / 4) < 4 * error


def tiny(visibility: str) -> MultimodalModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DmllmConfig(backbone={**shape, "initializer_range": 0.3}, mask_token_id=MASK, visibility=visibility)
    model = MultimodalModel(config)
    model.initialise()
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("visibility", ["full", "prefix"])
def test_it_is_what_decoding_block_after_block_on_one_canvas_sees(visibility, complementary):
    """By hand: the row with what is hidden in it, fed to the model as its own decoding lays it out."""
    model = tiny(visibility)
    batch = batch_of(torch.randint(0, 10, (3, 12), generator=torch.Generator().manual_seed(1)))
    batch.labels[:, :3] = IGNORE
    learned = objective(visibility, noise_block=4, complementary=complementary, weight="none", reduction="masked")
    noised = learned.prepare(batch, draws_for(batch, step=1))
    views = 1 + complementary
    shape = noised.batch.input_ids.shape
    row, column = noised.rows // shape[1], noised.rows % shape[1]
    second = (row >= 3) | (column >= 12)
    place = noised.batch.positions.flatten()[noised.rows]
    total = 0.0
    for example in range(3):
        for view in range(views):
            mine = (row % 3 == example) & (second == bool(view))
            out = torch.zeros(12, dtype=torch.bool).index_fill(0, place[mine], True)
            own = place[(row % 3 == example)]
            fed = batch.input_ids[example].masked_fill(out, MASK)
            last = 3 + ((int(own.max()) - 3) // 4 + 1) * 4 if len(own) else 12
            fed[last:] = MASK
            canvas = torch.arange(12)[None] >= 3
            logits = model(fed[None], canvas=canvas).logits[0, out].log_softmax(-1)
            total -= float(logits.gather(1, batch.input_ids[example, out][:, None]).sum())
    share = 3  # blocks of each answer, above and below the line
    loss = learned.loss(model, noised)["masked"]
    assert float(loss.total) == pytest.approx(share * total, rel=1e-5)
    assert float(loss.count) == share * len(noised.rows)


def test_dparallels_settings_hide_each_token_of_one_block_in_one_of_two_views():
    settings = {"min_noise": 0.5, "max_noise": 0.5, "complementary": True, "weight": "none", "reduction": "masked"}
    learned = objective(noise_block=4, confidence=2.0, confidence_temperature=0.5, **settings)
    batch = batch_of(torch.randint(0, 10, (50, 12)))
    noised = learned.prepare(batch, draws_for(batch))
    assert len(noised.rows) == 50 * 4
    assert len(noised.rows.remainder(50 * 12).unique()) == 50 * 4
    assert 70 < int((noised.rows < 50 * 12).sum()) < 130
    assert float(noised.counts["confidence"]) == 100


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="under block every block is learned in that way"):
        build_objective("block", {"noise_block": 4}, SPECIAL, "block:4")
    with pytest.raises(ValueError, match="use elbo, clipped or none"):
        objective(noise_block=4, weight="cart")
